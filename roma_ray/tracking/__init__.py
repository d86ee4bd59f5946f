"""Runs in MLflow: one parent run a pipeline or sweep, one child run a stage or trial, all written by the driver."""

from roma_ray.tracking.sweep import SweepTracker, TrialRun
from roma_ray.tracking.tracker import Tracker

__all__ = ["SweepTracker", "Tracker", "TrialRun"]
