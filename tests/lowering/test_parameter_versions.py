"""How the factors of experts' parameters lie, by the version of PEFT that wrote them: the `get_delta_weight` of each.

The expected numbers are those of `ParamWrapper` in peft 0.18.1, 0.19.0, 0.19.1 and 0.21.2, each of which was run beside
these formulas when they were written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, inputs_for, logits, make_adapter, rewrite, served
from safetensors.torch import load_file
from torch import Tensor

import mlora
from mlora import errors
from mlora.lowering import BaseLinear, lower

EXPERTS, RANK, ALPHA = 3, 2, 5
FIRST, SECOND = "the first dimension", "the second dimension"  # of the parameter: what lora_A is as wide as

# version -> what lora_A is as wide as where parameters lie as (experts, out, in), and where as (experts, in, out)
VERSIONS = {
    "0.17.1": (FIRST, FIRST),
    "0.18.0": (FIRST, FIRST),
    "0.18.1": (FIRST, FIRST),
    "0.18.0.dev0@abc": (FIRST, FIRST),
    "0.19.0": (FIRST, SECOND),
    "0.19.1": (SECOND, FIRST),
    "0.20.0": (SECOND, FIRST),
    "0.21.2.dev0@UNKNOWN": (SECOND, FIRST),
}


def stand_in(path: str, shape: tuple[int, int], transposed: bool) -> BaseLinear:
    inputs, outputs = shape if transposed else shape[::-1]
    nothing: Any = None
    return BaseLinear(path, inputs, outputs, nothing, nothing, experts=EXPERTS, transposed=transposed)


def factors(shape: tuple[int, int], wide: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, other = shape if wide is FIRST else shape[::-1]
    a = torch.randn(EXPERTS * RANK, one, generator=generator)
    return a, torch.randn(other, RANK * EXPERTS, generator=generator)


def delta_weight(a: Tensor, b: Tensor, wide: str) -> Tensor:
    """PEFT's, in the shape of the parameter: "o r e, e r i -> e i o", or "-> e o i" where it swapped the widths."""
    a, b = a.double().reshape(EXPERTS, RANK, -1), b.double().reshape(-1, RANK, EXPERTS)
    return torch.einsum(f"ore,eri->{'eio' if wide is FIRST else 'eoi'}", b, a) * ALPHA / RANK


def served_weight(delta: Any, transposed: bool) -> Tensor:
    a, b = (part.double().reshape(EXPERTS, RANK, -1) for part in (delta.a, delta.b))
    whole = torch.einsum("ero,eri->eoi", b, a) * delta.scale
    return whole.transpose(1, 2) if transposed else whole


def adapter(version: Any, **stacks: tuple[Tensor, Tensor]) -> mlora.Adapter:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_parameters": sorted(stacks)}
    if version is not None:
        config["peft_version"] = version
    names = ["experts.base_layer", "experts"][-len(stacks) :]
    tensors = {}
    for name, (a, b) in zip(names, stacks.values(), strict=True):
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return mlora.Adapter(config, tensors)


@pytest.mark.parametrize("transposed", [False, True], ids=["(out, in)", "(in, out)"])
@pytest.mark.parametrize("version", VERSIONS)
def test_square_parameters_are_read_as_their_version_wrote_them(version: str, transposed: bool) -> None:
    wide = VERSIONS[version][transposed]
    a, b = factors((6, 6), wide)
    (delta,) = lower(
        adapter(version, w=(a, b)), {"experts.w": stand_in("experts.w", (6, 6), transposed)}
    ).deltas.values()
    want = delta_weight(a, b, wide)
    assert (served_weight(delta, transposed) - want).abs().max() < 1e-6
    assert (served_weight(delta, transposed) - want.transpose(1, 2)).abs().max() > 0.1


UNCLEAR = {
    None: (False, True),
    "": (False, True),
    "here": (False, True),
    "0.19.1.dev0@abc": (False, True),
    "0.18.2.dev0": (True,),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("version", UNCLEAR, ids=str)
def test_square_parameters_of_no_known_version_are_refused(version: Any, transposed: bool) -> None:
    a, b = factors((6, 6), FIRST)
    bases = {"experts.w": stand_in("experts.w", (6, 6), transposed)}
    if transposed not in UNCLEAR[version]:
        assert lower(adapter(version, w=(a, b)), bases).deltas
        return
    with pytest.raises(errors.AdapterError, match=r"experts\.w.*square.*peft_version.*0\.17"):
        lower(adapter(version, w=(a, b)), bases)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wide", [FIRST, SECOND])
@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.21.2"])
def test_widths_tell_of_a_square_one_too(version: Any, wide: str, transposed: bool) -> None:
    """Where they differ they are believed before the version, which who saved a file again may have changed."""
    stacks = {"u": factors((6, 8), wide), "w": factors((6, 6), wide, 1)}
    bases = {
        f"experts.{n}": stand_in(f"experts.{n}", (6, len(b if wide is FIRST else a[0])), transposed)
        for n, (a, b) in stacks.items()
    }
    assert bases["experts.u"].in_features != bases["experts.u"].out_features
    deltas = lower(adapter(version, **stacks), bases).deltas
    for name, (a, b) in stacks.items():
        want = delta_weight(a, b, wide)
        assert (served_weight(deltas[f"experts.{name}"], transposed) - want).abs().max() < 1e-6


def test_a_model_answers_the_same_however_the_factors_lie(tmp_path: Path) -> None:
    base = build("qwen2moe")
    new = make_adapter(tmp_path / "new", base, 1, r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    for key, tensor in load_file(new / "adapter_model.safetensors").items():
        assert tensor.shape[1 - ("lora_B" in key)] == (32 if "lora_A" in key else 48)

    def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for key in [key for key in tensors if "lora_A" in key]:
            a, b = tensors[key], tensors[other := key.replace("lora_A", "lora_B")]
            out[key] = b.reshape(-1, 2, 4).permute(2, 1, 0).flatten(0, 1)
            out[other] = a.reshape(4, 2, -1).permute(2, 1, 0).flatten(1)
        return out

    old = rewrite(new, tmp_path / "old", {"peft_version": "0.18.0"}, turned)
    model, batch = served(base, {"new": new, "old": old}), inputs_for("qwen2moe", 2)
    got = logits(model, batch, adapter_names=["new", "old"])
    assert torch.equal(got[:1], logits(model, batch, adapter_names=["old", "new"])[:1])
    assert (got - logits(base, batch)).abs().max() > 0.01
