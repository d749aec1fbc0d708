"""The engine: requests in, pictures out."""
