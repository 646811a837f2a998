"""Files, calls and models as they occur: each row gets what its adapter gives alone, or is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, make_adapter, peft_alone, row_of
from kinds import KINDS, REFUSED, Kind
from torch import Tensor

import mlora

COLUMNS = {torch.float32: "fp32", torch.bfloat16: "16 bits"}
CASES = [(kind, dtype) for dtype in COLUMNS for kind in KINDS if dtype is torch.float32 or not kind.once]
IDS = [f"{kind.name}, {COLUMNS[dtype]}".replace(", ", "-").replace(" ", "-") for kind, dtype in CASES]


@pytest.mark.filterwarnings("ignore:adapter 'a' from")  # of targets without weights
@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=IDS)
def test_kind(kind: Kind, dtype: torch.dtype, tmp_path: Path, verdicts: Any) -> None:
    base = kind.base().to(dtype).float()
    folder = make_adapter(tmp_path / "made", base, 1, **kind.options)
    file = kind.file(folder, tmp_path / "file")
    bare = copy.deepcopy(base).to(dtype)
    model, batch, names = copy.deepcopy(bare), kind.inputs(len(kind.entries)), list(kind.entries)
    runtime = mlora.patch(model, memory=4 << 20)
    with verdicts(kind.name, "llama", COLUMNS[dtype], kind.verdict):
        if kind.verdict == REFUSED:
            with pytest.raises(kind.error) as caught:
                runtime.load_adapter(file, "a", **kind.loading)
                answer(kind, model, batch, adapter_names=names)
            assert all(word in str(caught.value) for word in kind.words), caught.value
            return
        runtime.load_adapter(file, "a", **kind.loading)
        got = answer(kind, model, batch, adapter_names=names)
        want, basic = alone(kind, base, folder, batch), answer(kind, base, batch)
        for row, name in enumerate(names):
            change = (want[row] - basic[row]).abs().max() / basic[row].abs().max()
            assert change > 1e-3 if name and kind.changes else change < 1e-5
        if dtype is torch.float32:
            assert_close(got, want)
            return
        error, allowed = ((one.double() - want).norm().item() for one in (got, alone(kind, bare, folder, batch)))
        assert 0 < error <= 2 * allowed, f"{error:.3g} from the oracle, PEFT {allowed:.3g}"


def alone(kind: Kind, base: Any, folder: Path, batch: Mapping[str, Tensor]) -> Tensor:
    """Each row by a model of its own: the base, or a fresh PEFT model with the adapter."""
    models = {None: base, "a": peft_alone(base, folder)}
    return torch.cat([answer(kind, models[name], row_of(batch, row)) for row, name in enumerate(kind.entries)])


def answer(kind: Kind, model: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return kind.call(model, cast, **options).detach()
