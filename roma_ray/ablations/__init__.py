"""Grids of trials: one shared extraction, then optimizer steps and head-only evaluations on Ray Tune."""
