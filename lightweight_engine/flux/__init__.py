"""The Flux.1 model, readable without running anything."""
