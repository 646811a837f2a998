"""Adapters, mixes and merges, judged by what they do on data: all of them rows of the same batches."""

from .grid import grid
from .report import draw, kept, table_of
from .scores import METRICS, Score, check_metrics, check_texts, evaluate, size

__all__ = ["METRICS", "Score", "check_metrics", "check_texts", "draw", "evaluate", "grid", "kept", "size", "table_of"]
