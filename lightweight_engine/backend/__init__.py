"""Tensors, modules and devices. Nothing here has ever heard of Flux."""
