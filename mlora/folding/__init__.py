"""Folding a recipe into the base weights, and taking it out again to the bit."""
