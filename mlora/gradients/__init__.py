"""Adapters that are being trained: their parameters, and the gradients of the layers' products."""
