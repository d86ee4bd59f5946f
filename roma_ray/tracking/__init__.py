"""Runs in MLflow: one parent run a pipeline, sweep or comparison, its children stages, trials or methods; the driver writes all."""

from roma_ray.tracking.tracked_comparison import ComparisonTracker
from roma_ray.tracking.tracker import Tracker

__all__ = ["ComparisonTracker", "Tracker"]
