"""Larger pictures: resampling, resize modes, tiles, and networks that spandrel reads."""
