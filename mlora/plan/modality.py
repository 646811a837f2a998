"""Models that read more than text: which of their modules do, and whether what a call brings is one input a row.

Images come in one list for all rows of a batch, and placeholder tokens in a row's text say that it has some. A module
of the vision tower sees the list alone: as many images as rows need not be one for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from .call import Call

_PLACEHOLDER = re.compile(r"(image|video|audio|speech)_(token_id|token_index|patch_id)")


def placeholders_of(model: nn.Module) -> tuple[int, ...]:
    """The tokens that stand for images, videos or sounds in the text of `model`, as its config and the configs inside
    name them; none of a model that takes each row's from a place of its own, or reads no text."""
    found: set[int] = set()
    left = [getattr(model, "config", None)]
    while left:
        config = left.pop()
        for name, value in getattr(config, "__dict__", {}).items():
            if _PLACEHOLDER.fullmatch(name) and type(value) is int:
                found.add(value)
            elif hasattr(value, "model_type"):
                left.append(value)
    return tuple(sorted(found))


def foreign_in(model: nn.Module) -> Callable[[str], bool]:
    """Of a model with placeholders: whether the module of a dotted path is foreign, which is to say that it reads
    another modality than text, as towers and the projectors behind them do.

    Text is what lies beside an embedding of tokens, in the decoder, or is an output embedding; and so are heads, which
    lie outside of the base model. Inside of these, a child that holds an encoder of another modality is foreign.
    """
    names = {id(module): name for name, module in model.named_modules()}
    base = getattr(model, "base_model", model)
    foreign = {"": base is model, names.get(id(base), ""): True}
    encoders: list[str] = []
    for name, part in model.named_modules():
        if any(_within(name, encoder) for encoder in encoders):
            continue
        if "text" not in getattr(part, "input_modalities", "text"):
            encoders.append(name)
            continue
        tokens = _asked(part, "get_input_embeddings")
        if isinstance(tokens, nn.Embedding):
            foreign[names[id(tokens)].rpartition(".")[0]] = False
        for text in (_asked(part, "get_output_embeddings"), _asked(part, "get_decoder") if part is model else None):
            if id(text) in names:
                foreign[names[id(text)]] = False
    for encoder in encoders:
        around = _innermost(encoder, foreign)
        if not foreign[around]:
            depth = around.count(".") + 1 if around else 0
            foreign[".".join(encoder.split(".")[: depth + 1])] = True
    return lambda path: foreign[_innermost(path, foreign)]


def _asked(part: Any, name: str) -> Any:
    """What its method says; None where it has none, or one that does not know."""
    try:
        return getattr(part, name)()
    except (AttributeError, NotImplementedError):
        return None


def _within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _innermost(path: str, paths: dict[str, bool]) -> str:
    return max((outer for outer in paths if _within(path, outer)), key=len)


class Others:
    """What one call of the model, or of `generate`, tells of its inputs of other modalities.

    It is asked only by foreign modules that rows' adapters change; on a GPU the first one waits for the ids.
    """

    def __init__(self, call: Call, placeholders: Sequence[int]) -> None:
        self._call = call
        self._placeholders = placeholders
        self._served: set[int] = set()

    def again(self) -> Others:
        """Of the same call, for a part of it that is run once more."""
        return Others(self._call, self._placeholders)

    def attribute(self, x: Tensor, index: int, name: str) -> bool:
        """Whether the first dimension of a foreign module's input counts inputs of which each row has one, in order;
        False if the call has no such input beside text, so that its rows are those of any module. `index`, `name`: the
        module's number and dotted path.

        Of placeholders of one kind in each of n rows every row has an input, and where a module is called once, with n
        inputs, that makes one each: nothing is taken to be known of how many tokens stand for an input.

        Raises:
            AttributionError: it cannot be told to which rows the inputs belong.
        """
        rows = self._rows
        if rows is None:
            return False
        if x.dim() < 2 or x.shape[0] != rows or index in self._served:
            raise errors.AttributionError(
                f"{name} reads another modality than text, and got an input of shape {tuple(x.shape)} that "
                f"cannot be attributed to the batch's rows: {self._why()}. Give each row one such input, use one "
                f"adapter for all rows, or adapters that do not target it"
            )
        self._served.add(index)
        return True

    @cached_property
    def _rows(self) -> int | None:
        """How many rows there are, if each has an input of one and the same modality; 0 if that cannot be told, and
        None without any, or without text."""
        ids = self._call.ids
        if ids is None:
            return None if self._call.kwargs.get("inputs_embeds") is None else 0
        held = torch.stack([(ids == token).any(-1) for token in self._placeholders]).tolist()
        held = [rows for rows in held if any(rows)]
        if not held:
            return None
        return len(ids) if len(held) == 1 and all(held[0]) else 0

    def _why(self) -> str:
        if self._rows:
            return f"it runs again in this call, or on another number than the {self._rows} rows that have some"
        if self._call.ids is None:
            return "the call has no input_ids, whose placeholder tokens would tell"
        return f"not every one has the placeholder token of one modality (of {', '.join(map(str, self._placeholders))})"
