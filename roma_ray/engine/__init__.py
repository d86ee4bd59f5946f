"""Forward passes, caches, the training loop and the frame of stages: what a worker does, in one process."""
