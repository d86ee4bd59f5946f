"""The stages of a run, each declared beside what it does."""
