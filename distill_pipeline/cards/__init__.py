"""Cards that travel with what was made: the student's model card and the filtered set's data card."""
