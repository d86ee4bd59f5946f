"""Runs in MLflow: one parent run a pipeline, one child run a stage, all written by the driver from the artifacts."""

from roma_ray.tracking.tracker import Tracker, tracked

__all__ = ["Tracker", "tracked"]
