"""Teacher signals: what is stored of a teacher's next-token distributions, for students trained without it in memory."""
