"""Judging answers: statistics, guards, shares, and tables of methods and runs."""
