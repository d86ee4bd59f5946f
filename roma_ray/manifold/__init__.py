"""The paper's section 4 as pure tensor functions: neighborhoods, adjacency, losses, diagnostics. No file access."""
