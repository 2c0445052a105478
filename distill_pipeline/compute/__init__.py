"""Where rows are worked on: in this process, in several processes of this machine, or on a Ray cluster, with one result."""
