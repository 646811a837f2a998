"""Merge strategies: against PEFT's `add_weighted_adapter`, dense fp64 formulas, and their own laws."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.lowering.delta import BaseLinear, Delta
from mlora.merge import COMBINATION_TYPES, Merge, combine, merge_module

IN, OUT = 24, 40


def module(seed: int = 0) -> BaseLinear:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    return BaseLinear("m", IN, OUT, lambda: weight, lambda: None)


def lora(seed: int, rank: int = 4, scale: float = 0.5) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(rank, IN, generator=draw), torch.randn(rank, OUT, generator=draw), scale)


def dense(delta: Delta, weight: Tensor | None = None) -> Tensor:
    assert delta.a is not None and delta.b is not None
    change = delta.scale * delta.b.double().t() @ delta.a.double()
    if delta.gain is not None and weight is not None:
        change = change + delta.gain.double()[:, None] * weight.double()
    if delta.in_gain is not None and weight is not None:
        change = change + delta.in_gain.double() * weight.double()
    return change


def strategy(tensors: list[Tensor], weights: list[float], kind: str, density: float, sign: str) -> Tensor:
    """The formulas in fp64, without dare's mask."""
    if kind not in ("linear", "cat"):
        kept = []
        for tensor in tensors:
            order = tensor.abs().flatten().argsort(descending=True)[: int(density * tensor.numel())]
            mask = torch.zeros(tensor.numel(), dtype=torch.bool)
            mask[order] = True
            kept.append(tensor * mask.view(tensor.shape))
        tensors = kept
    stack = torch.stack(tensors)
    w = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * tensors[0].dim())
    if "ties" not in kind:
        return (w * stack).sum(0)
    vote = stack.sum(0) if sign == "total" else stack.sign().sum(0)
    agree = stack.sign() == torch.where(vote >= 0, 1.0, -1.0)
    return (w * stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# Delta space


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["linear", "cat", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd", "svd"])
def test_delta_space_is_the_dense_formula(kind: str, sign: str) -> None:
    deltas, weights = [lora(1, 3), lora(2, 5, 2.0), lora(3, 1)], [0.7, -0.4, 1.5]
    density = None if kind in ("linear", "cat", "svd") else 0.6
    how = Merge(list("abc"), weights, kind, density=density, majority_sign_method=sign, svd_rank=IN)
    want = strategy([dense(d) for d in deltas], weights, "linear" if kind == "svd" else kind, density or 1, sign)
    merged = merge_module(deltas, how, module())
    assert relative(dense(merged), want) < 2e-6
    assert merged.error < 2e-6


def test_the_error_is_the_distance_and_the_result_the_best_of_its_rank() -> None:
    deltas = [lora(1), lora(2)]
    how = Merge(list("ab"), [1, 1], "ties", density=0.5, svd_rank=3)
    want = strategy([dense(d) for d in deltas], [1, 1], "ties", 0.5, "total")
    merged = merge_module(deltas, how, module())
    s = torch.linalg.svdvals(want)
    best = float(s[3:].norm() / s.norm())
    assert merged.rank == 3
    assert relative(dense(merged), want) == pytest.approx(merged.error, rel=1e-4)
    assert merged.error == pytest.approx(best, rel=1e-4)


def test_a_large_module_takes_the_iterative_path_and_comes_as_near_as_an_svd() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, outputs = 700, 900
    base = BaseLinear("m", inputs, outputs, lambda: torch.zeros(outputs, inputs), lambda: None)
    deltas = [Delta(torch.randn(8, inputs, generator=draw), torch.randn(8, outputs, generator=draw)) for _ in range(3)]
    merged = merge_module(deltas, Merge(list("abc"), [1, 1, 1], "ties", density=0.3, svd_rank=8), base)
    want = strategy([dense(d) for d in deltas], [1, 1, 1], "ties", 0.3, "total")
    s = torch.linalg.svdvals(want)
    assert merged.error == pytest.approx(float(s[8:].norm() / s.norm()), rel=1e-5)


def test_svd_of_a_sum_never_forms_it() -> None:
    inputs = outputs = 100_000  # the dense delta would take 40 GB
    base = BaseLinear("m", inputs, outputs, lambda: torch.zeros(0), lambda: None)
    draw = torch.Generator().manual_seed(0)
    deltas = [Delta(torch.randn(4, inputs, generator=draw), torch.randn(4, outputs, generator=draw)) for _ in range(2)]
    merged = merge_module(deltas, Merge(list("ab"), [1, 0.5], "svd", svd_rank=8), base)
    assert merged.rank == 8 and merged.error < 1e-6
    x = torch.randn(inputs, generator=draw, dtype=torch.float64)
    want = sum(
        w * (d.b.double().t() @ (d.a.double() @ x))  # type: ignore[union-attr]
        for d, w in zip(deltas, (1, 0.5), strict=True)
    )
    assert merged.a is not None and merged.b is not None
    assert relative(merged.b.double().t() @ (merged.a.double() @ x), want) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_gains_and_shifts_are_merged_as_what_they_change(kind: str) -> None:
    base = module()
    draw = torch.Generator().manual_seed(9)
    dora = Delta(
        torch.randn(2, IN, generator=draw), torch.randn(2, OUT, generator=draw),
        gain=torch.randn(OUT, generator=draw) / 9, shift=torch.randn(OUT, generator=draw),
    )  # fmt: skip
    ia3 = Delta(torch.randn(1, IN, generator=draw), torch.randn(1, OUT, generator=draw), in_gain=torch.randn(IN) / 9)
    density = None if kind == "linear" else 0.5
    rank = None if kind == "linear" else IN
    merged = merge_module([dora, ia3], Merge(list("ab"), [0.6, 0.9], kind, density=density, svd_rank=rank), base)
    want = strategy([dense(dora, base.weight()), dense(ia3, base.weight())], [0.6, 0.9], kind, density or 1, "total")
    assert relative(dense(merged, base.weight()), want) < 2e-6
    assert dora.shift is not None and merged.shift is not None
    shift = strategy([dora.shift.double(), torch.zeros(OUT).double()], [0.6, 0.9], kind, density or 1, "total")
    assert relative(merged.shift.double(), shift) < 1e-6


def test_dare_keeps_values_and_rescales_them_with_a_mask_of_its_own_for_each_adapter() -> None:
    one = merge_module([lora(1)], Merge(["a"], [1], "dare_linear", density=0.25, svd_rank=IN), module())
    ratio = dense(one) / dense(lora(1))
    kept = ratio.abs() > 0.5
    assert 0.2 < kept.double().mean() < 0.3
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 4.0), rtol=1e-3, atol=0)
    both = merge_module(
        [lora(1), lora(1)], Merge(list("ab"), [1, -1], "dare_linear", density=0.25, svd_rank=IN), module()
    )
    assert dense(both).norm() > 0.5 * dense(one).norm()  # equal masks would cancel
    other = Merge(["a"], [1], "dare_linear", density=0.25, svd_rank=IN, seed=1)
    assert not torch.equal(dense(merge_module([lora(1)], other, module())), dense(one))


# Laws


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(["linear", "cat", "svd", "ties", "magnitude_prune", "dare_linear", "dare_ties"]),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    factor=st.floats(-3, 3).filter(lambda x: abs(x) > 0.1),
    sign=st.sampled_from(["total", "frequency"]),
)
def test_laws(kind: str, seeds: list[int], factor: float, sign: str) -> None:
    names, weights = [str(s) for s in seeds], [1 + s / 50 for s in seeds]
    deltas = {str(s): lora(s, 1 + s % 5) for s in seeds}
    density = None if kind in ("linear", "cat", "svd") else 0.5

    def merged(names: list[str], weights: list[float], **options: Any) -> Tensor:
        options = {"density": density, "majority_sign_method": sign, "svd_rank": IN, **options}
        return dense(merge_module([deltas[n] for n in names], Merge(names, weights, kind, **options), module()))

    plain = merged(names, weights)
    torch.testing.assert_close(merged(names, [w * factor for w in weights]), plain * factor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged(names[::-1], weights[::-1]), plain, rtol=1e-4, atol=1e-4)
    if density is not None:
        kept = merged(names, weights, density=1.0)
        want = strategy([dense(deltas[n]) for n in names], weights, kind.replace("dare_", ""), 1, sign)
        torch.testing.assert_close(kept, want, rtol=1e-4, atol=1e-4)
    relative_weights = merged(names, weights, normalize=True)
    torch.testing.assert_close(relative_weights * sum(weights), plain, rtol=1e-4, atol=1e-4)
    one = dense(deltas[names[0]])
    if density is None:
        torch.testing.assert_close(merged(names[:1], [1.0]), one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 24), (300, 400)], ids=["small", "by a sample"])
@pytest.mark.parametrize("density", [0.001, 0.3, 0.9, 1.0])
def test_pruning_keeps_a_number_of_values_and_the_first_among_equals(shape: tuple[int, int], density: float) -> None:
    tensor = torch.randint(-5, 6, shape, generator=torch.Generator().manual_seed(0)).float()
    how = Merge(["a"], [1], "magnitude_prune", density=density)
    order = tensor.abs().flatten().argsort(descending=True, stable=True)[: int(density * tensor.numel())]
    want = torch.zeros(tensor.numel())
    want[order] = tensor.flatten()[order]
    assert torch.equal(combine([tensor.clone], [1.0], how, [0]).flatten(), want)


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "dare_linear"])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_factors_are_read_in_any_layout_and_left_alone(kind: str, density: float) -> None:
    how = Merge(list("ab"), [0.7, 0.3], kind, density=density, space="factor")
    plain, shuffled = [lora(1), lora(2)], []
    for delta in plain:
        assert delta.a is not None and delta.b is not None
        shuffled.append(replace(delta, a=delta.a.t().contiguous().t(), b=delta.b.t().contiguous().t()))
    one, two = merge_module(plain, how, module()), merge_module(shuffled, how, module())
    assert one.a is not None and two.a is not None and one.b is not None and two.b is not None
    assert torch.equal(one.a, two.a) and torch.equal(one.b, two.b)
    assert torch.equal(dense(plain[0]), dense(lora(1))) and torch.equal(dense(shuffled[0]), dense(lora(1)))


def test_ties_of_identical_adapters_is_the_adapter() -> None:
    merged = merge_module([lora(1)] * 3, Merge(list("abc"), [1, 1, 1], "ties", density=1.0), module())
    assert relative(dense(merged), dense(lora(1))) < 1e-6


def test_a_module_that_one_adapter_leaves_alone() -> None:
    merged = merge_module([lora(1), None], Merge(list("ab"), [0.5, 2]), module())
    assert relative(dense(merged), 0.5 * dense(lora(1))) < 1e-6


# PEFT


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT, bias=False), nn.Linear(OUT, IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.fixture(scope="module")
def pefted() -> Any:
    torch.manual_seed(0)
    model: Any = None
    for name, alpha in (("a", 8), ("b", 3), ("c", 4)):
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["first", "second"])
        if model is None:
            model = get_peft_model(Two(), config, name)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    return model


def peft_factors(model: Any, names: str) -> list[Delta]:
    layer = model.base_model.model.first
    return [
        Delta(layer.lora_A[n].weight.detach(), layer.lora_B[n].weight.detach().t(), layer.scaling[n]) for n in names
    ]


@pytest.mark.parametrize("weights", [[0.7, 0.3, 1.1], [0.7, -0.3, 2.0]])
@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_peft(pefted: Any, kind: str, weights: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Factor space is PEFT's, number for number; its `cat` and `_svd` types are delta space's."""
    density = 0.5 if any(word in kind for word in ("ties", "dare", "prune")) else None
    rank = 6 if "svd" in kind else None
    space = "factor" if kind in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "cat") else "delta"

    def every_third(p: Tensor, **_: Any) -> Tensor:
        mask = torch.zeros(p.shape)
        mask.view(-1)[::3] = 1
        return mask

    if "dare" in kind:  # both draw all they like: here, every third value
        monkeypatch.setattr(torch, "bernoulli", every_third)
    model = copy.deepcopy(pefted)
    model.add_weighted_adapter(list("abc"), weights, "merged", kind, density=density, svd_rank=rank)
    (theirs,) = peft_factors(model, ["merged"])  # type: ignore[arg-type]
    how = Merge(list("abc"), weights, kind, density=density, space=space, svd_rank=rank)
    ours = merge_module(peft_factors(pefted, "abc"), how, module())
    assert ours.a is not None and ours.b is not None and theirs.a is not None and theirs.b is not None
    if kind in ("linear", "cat"):
        assert torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b)
    elif space == "factor":
        torch.testing.assert_close(ours.a, theirs.a, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.b, theirs.b, rtol=1e-6, atol=1e-6)
    else:
        # Both cut a matrix to a rank in fp32, and how far that is off depends on the matrix and the machine's LAPACK.
        # PEFT's distance from fp64 tells how much it is here; twice that is the bound of an fp32 method of our own.
        parts = [dense(d) for d in peft_factors(pefted, "abc")]
        if "dare" in kind:
            parts = [every_third(part).double() * part / density for part in parts]
        plain = {"svd": "linear", "dare_linear_svd": "linear", "dare_ties_svd": "ties"}.get(
            kind, kind.removesuffix("_svd")
        )
        u, s, vh = torch.linalg.svd(strategy(parts, weights, plain, 1 if "dare" in kind else density or 1, "total"))
        want = (u[:, :rank] * s[:rank]) @ vh[:rank]
        off, theirs_off = (relative(dense(delta), want) for delta in (ours, theirs))
        assert theirs_off < 1e-5, "the formula is PEFT's"
        assert off <= 2 * theirs_off


# LoRAX


def lorax(tensors: list[Tensor], weights: list[float], kind: str, density: float, sign: str) -> Tensor:
    """LoRAX's merges/strategies.py, formula by formula: weights on A and on B, dare without its rescaling."""
    if "dare" in kind:
        tensors = [t * torch.bernoulli(torch.full_like(t, density)) for t in tensors]
    elif kind == "ties":
        pruned = []
        for t in tensors:
            mask = torch.zeros_like(t).reshape(-1)
            mask[torch.topk(t.abs().reshape(-1), k=int(density * t.numel())).indices] = 1
            pruned.append(t * mask.reshape(t.shape))
        tensors = pruned
    stack = torch.stack(tensors)
    weighted = stack * torch.tensor(weights).view(-1, 1, 1)
    if kind in ("linear", "dare_linear"):
        return weighted.sum(0)
    vote = stack.sum(0) if sign == "total" else stack.sign().sum(0)
    agree = stack.sign() == torch.where(vote >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1.0)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties"])
def test_lorax(kind: str, sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of docs/merging.md gives LoRAX's merges, which take the first adapter's scaling for all."""

    def every_third(p: Tensor, **_: Any) -> Tensor:
        mask = torch.zeros(p.shape)
        mask.view(-1)[::3] = 1
        return mask

    monkeypatch.setattr(torch, "bernoulli", every_third)
    scales, weights, density = [0.5, 2.0, 0.25], [0.7, 0.3, 1.1], 0.5
    deltas = [lora(seed, 4, scale) for seed, scale in enumerate(scales)]
    a, b = ([getattr(d, part) for d in deltas] for part in "ab")
    b = [factor.t() for factor in b]  # (out, rank), as in the files
    want = scales[0] * lorax(b, weights, kind, density, sign) @ lorax(a, weights, kind, density, sign)

    squared = [
        w * w * scales[0] / s * (density * density if "dare" in kind else 1)
        for w, s in zip(weights, scales, strict=True)
    ]
    how = Merge(
        list("abc"), squared, kind, density=None if kind == "linear" else density, majority_sign_method=sign,
        space="factor",
    )  # fmt: skip
    assert relative(dense(merge_module(deltas, how, module())), want.double()) < 2e-6


def test_factors_are_clamped_to_a_quantile_of_their_values() -> None:
    deltas = [lora(1), lora(2)]
    plain = merge_module(deltas, Merge(list("ab"), [1, 1], "svd", svd_rank=8), module())
    clamped = merge_module(deltas, Merge(list("ab"), [1, 1], "svd", svd_rank=8, svd_clamp=0.9), module())
    assert plain.a is not None and plain.b is not None and clamped.a is not None and clamped.b is not None
    high = float(torch.quantile(torch.cat([plain.b.t().flatten(), plain.a.flatten()]), 0.9))
    assert torch.equal(clamped.a, plain.a.clamp(-high, high)) and torch.equal(clamped.b, plain.b.clamp(-high, high))


# What is refused


@pytest.mark.parametrize(
    "values, wanted",
    [
        ({"weights": [1.0]}, "1 weights for 2 adapters; a merge takes one for each"),
        ({"weights": 1.0}, "weights is 1.0; it must be a list"),
        ({"weights": None}, "weights is None; it must be a list"),
        ({"adapters": None}, "adapters is None; it must be a list"),
        ({"weights": [1.0, 1e300]}, "1e.300; it must be a finite number of fp32's range"),
        ({"weights": [1.0, 10**400]}, "fp32's range"),
        ({"weights": np.array([1.0, np.inf])}, "inf"),
        ({"weights": [1.0, math.nan]}, "nan"),
        ({"weights": [1.0, "x"]}, "'x'"),
        ({"weights": [1.0, True]}, "True"),
        ({"adapters": [], "weights": []}, "empty"),
        ({"adapters": "ab"}, "'ab'"),
        ({"combination_type": "tise"}, "'tise'"),
        ({"combination_type": "ties"}, "density is None"),
        ({"combination_type": "ties", "density": 0}, "density is 0"),
        ({"combination_type": "ties", "density": 1.5}, "density is 1.5"),
        ({"density": 0.5}, "no density"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "'most'"),
        ({"svd_rank": 0}, "svd_rank is 0"),
        ({"svd_clamp": 0.5}, "needs an svd"),
        ({"seed": -1}, "seed is -1"),
        ({"space": "weights"}, "'weights'"),
        ({"space": "factor", "svd_rank": 3}, "no svd_rank"),
        ({"space": "factor", "combination_type": "svd"}, "works on deltas"),
        ({"weights": [1.0, -1.0], "normalize": True}, "sum to 0"),
    ],
)
def test_bad_merges(values: dict[str, Any], wanted: str) -> None:
    with pytest.raises(errors.MergeError, match=wanted):
        Merge(**{"adapters": ["a", "b"], "weights": [1.0, 1.0], **values})


def test_factor_space_refuses_what_it_cannot_hold() -> None:
    how = Merge(list("ab"), [1, 1], space="factor")
    with pytest.raises(errors.MergeError, match=r"module m: factor space needs equal ranks.*\[4, 5\]"):
        merge_module([lora(1, 4), lora(2, 5)], how, module())
    with pytest.raises(errors.MergeError, match="a gain, a turn or a bias"):
        merge_module([lora(1), Delta(gain=torch.ones(OUT))], how, module())


# Spellings


def test_spelling_does_not_matter() -> None:
    a = Merge(["sql", "chat"], [0.7, 0.3], "ties", density=0.5)
    b = Merge.from_dict({"ids": ["chat", "sql"], "weights": [0.3, 0.7], "merge_strategy": "ties", "density": 0.5})
    assert a.label == b.label and a.canonical() == b.canonical()
    assert a.label != Merge(["sql", "chat"], [0.7, 0.3], "ties", density=0.6).label
    assert Merge(list("ab"), [1, 3], normalize=True).label == Merge(list("ab"), [0.25, 0.75]).label
    assert Merge(list("ab"), [1, 3], "cat", seed=7).label == Merge(list("ab"), [1, 3]).label
    assert Merge(list("ab"), [1, 3], "ties_svd", density=1).label == Merge(list("ab"), [1, 3], "ties", density=1).label


def test_ludwigs_sources_are_relative() -> None:
    merge = Merge.from_dict({"sources": ["a", "b"], "weights": [1, 3], "combination_type": "linear"})
    assert merge.canonical().weights == (0.25, 0.75)
    assert Merge.from_dict({"sources": ["a", "b"]}).canonical().weights == (0.5, 0.5)


@pytest.mark.parametrize(
    "values, wanted",
    [
        ({"ids": ["a"], "wieghts": [1]}, "no 'wieghts'"),
        ({"ids": ["a"], "adapters": ["a"]}, "beside another name"),
        ({"ids": 3}, "must be a list of names"),
        ({"ids": ["a"], "weights": 1}, "must be a list of numbers"),
        ({"weights": [1]}, "must be a list of names"),
    ],
)
def test_bad_spellings(values: dict[str, Any], wanted: str) -> None:
    with pytest.raises(errors.MergeError, match=wanted):
        Merge.from_dict(values)


def test_exported() -> None:
    assert mlora.Merge is Merge


def test_weights_of_numpy_are_numbers() -> None:
    assert Merge(("a", "b"), np.array([0.5, 2], dtype=np.float32)) == Merge(("a", "b"), (0.5, 2.0))  # type: ignore[arg-type]
