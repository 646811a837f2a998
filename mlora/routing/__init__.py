"""Entries become a plan: which adapters there are, what their names mean, and where layers find the result."""
