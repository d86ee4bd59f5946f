"""One function a figure. Each takes plain figures or arrays of finished artifacts and returns a matplotlib Figure."""
