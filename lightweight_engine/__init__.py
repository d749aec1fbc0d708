"""A Flux.1 image engine."""

__version__ = "0.1.0"
