"""Operators on tensors: layouts, schemas, the reference and the choice of an implementation."""
