"""What walks the graph of stages: a run, the comparison of methods, and explaining what is missing."""
