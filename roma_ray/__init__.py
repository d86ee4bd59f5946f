"""Routing Manifold Alignment for mixture-of-experts language models, as a Ray job system."""

__version__ = "0.1.0"
