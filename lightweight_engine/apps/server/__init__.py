"""The HTTP service: a front that takes requests, and a child process that owns the engine.

The front (FastAPI) loads no torch and computes nothing, so that it answers while the worker is busy, and outlives it.
"""
