"""Text to train on, or to be judged by: files become rows, rows become examples, examples become batches."""

from .batch import Batch, batch_of
from .examples import Encoded, Example, Form, Pair, check_rows, encode, find_target, prompt_ids, reference_of
from .rows import Rows, read_rows

__all__ = [
    "Batch",
    "Encoded",
    "Example",
    "Form",
    "Pair",
    "Rows",
    "batch_of",
    "check_rows",
    "encode",
    "find_target",
    "prompt_ids",
    "read_rows",
    "reference_of",
]
