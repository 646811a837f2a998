"""Many runs on one base: each trains an adapter of its own, and all of them share every forward and backward pass."""

from .run import Result, Run
from .trainer import Trainer

__all__ = ["Result", "Run", "Trainer"]
