"""Answering benchmarks: lm-evaluation-harness asks, the sliced models answer."""
