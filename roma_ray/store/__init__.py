"""The storage: files put whole, logs, locks, tensors, tables and scratch. Nothing outside this room opens a file of it."""
