"""Serving: requests that come when they come, on transformers' continuous batching."""
