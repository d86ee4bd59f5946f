"""The configuration: what may be set, and reading it."""
