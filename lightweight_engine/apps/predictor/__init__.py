"""The ``predict()`` service under Cog, but for Cog itself: only ``predict.py`` at the root of the project knows it."""
