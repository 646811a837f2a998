"""Merging: in place beside copying the weight, TIES beside PEFT's `ties_svd`, and a cached merge in a request.

What is compared takes turns in one process; figures are medians. Each result is checked against an fp64 oracle before
it is timed; on a mismatch nothing is reported.

    python bench/merge.py --out bench/results/merge.jsonl
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Log, add_arguments, machine, multiply_adds, quantiles, seconds, set_up
from generate import load, make_adapter, rms, tiny_llama, twin
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import mlora
from mlora import layout
from mlora.lowering import BaseLinear, Delta, lower
from mlora.merge import merge_adapters, merge_module
from mlora.ops import dispatch
from mlora.plan.plan import Terms, plan_words

SCALE = 0.5
DENSITY = 0.5
COPY_SPEED = 0.7  # the share of a copy's speed that merging in place is measured against


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--only", choices=GROUPS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15, help="turns of a weight; 20x forwards, a fifth of TIES")
    add_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.rank, args.repeats = 4, 3

    console = set_up(args)
    log = Log(args.out, bench="merge", **machine(), rank=args.rank)
    with torch.inference_mode():
        for group, measure in GROUPS.items():
            if args.only in (None, group):
                measure(console, log, args)


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float, float]]:
    """Median seconds and their 20 % and 80 % quantiles, of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            spent = seconds(call)
            if turn:  # the first warms up
                times[name].append(spent)
    return {name: quantiles(found) for name, found in times.items()}


def refuse(what: str, seen: float, allowed: float) -> None:
    if not seen <= allowed:
        raise SystemExit(f"refused to report: {what}: {seen:.3g} away from fp64, allowed {allowed:.3g}")


# In place


class Layer:
    """One bf16 weight and its adapters, as `merge_` and as PEFT's layer hold them."""

    def __init__(self, outputs: int, inputs: int, adapters: int, rank: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.inputs, self.outputs, self.rank, self.names = inputs, outputs, rank, [f"a{i}" for i in range(adapters)]
        self.original = (torch.randn(outputs, inputs, generator=draw) / math.sqrt(inputs)).bfloat16()
        self.a = [(torch.randn(rank, inputs, generator=draw) / inputs).bfloat16() for _ in self.names]
        self.b = [(torch.randn(rank, outputs, generator=draw) / math.sqrt(rank)).bfloat16() for _ in self.names]
        self.weight, self.copied = self.original.clone(), torch.empty_like(self.original)
        rows = np.full((adapters, layout.TABLE_WIDTH), -1, dtype=np.int64)
        rows[:, layout.RANK] = rank
        rows[:, layout.SCALE] = np.float32(SCALE).view(np.uint32)
        parts: list[Tensor] = []
        for i, pair in enumerate(zip(self.a, self.b, strict=True)):
            for column, part in zip((layout.A, layout.B), pair, strict=True):
                rows[i, column] = sum(p.numel() for p in parts)
                parts.append(nn.functional.pad(part.flatten(), (0, -part.numel() % 32)))
        self.arena, self.table = torch.cat(parts), torch.from_numpy(rows)
        recipe: Terms = tuple((i, 1.0) for i in range(adapters))
        self.plan = torch.from_numpy(plan_words([recipe]))
        self.peft = self._peft()

    def _peft(self) -> Any:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        base = nn.Linear(self.inputs, self.outputs, bias=False, dtype=torch.bfloat16)
        base.weight.data = self.original.clone()
        config = LoraConfig(r=self.rank, lora_alpha=SCALE * self.rank)
        layer: Any = Linear(base, "a0", config=config, r=self.rank, lora_alpha=SCALE * self.rank)
        for name in self.names[1:]:
            layer.update_layer(name, self.rank, SCALE * self.rank, config=config)
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a.clone(), b.t().contiguous()
        return layer.eval()

    def merge(self) -> None:
        dispatch.merge_(self.weight, None, self.arena, self.table, self.plan)

    def merge_from(self) -> None:
        dispatch.merge_(self.weight, self.original, self.arena, self.table, self.plan)

    def copy(self) -> None:
        self.copied.copy_(self.original)

    def merge_peft(self) -> None:
        self.peft.merged_adapters.clear()
        self.peft.merge(adapter_names=self.names)

    def check(self) -> None:
        """One rounding of the exact sum, in some rows; PEFT rounds every adapter's delta and every sum."""
        picks = torch.linspace(0, self.outputs - 1, min(self.outputs, 200)).long()
        exact = self.original[picks].double()
        for a, b in zip(self.a, self.b, strict=True):
            exact += SCALE * b[:, picks].double().t() @ a.double()
        size = exact.abs() + 1e-6
        for name, call in (("merge_", self.merge), ("merge_ from a source", self.merge_from)):
            call()
            far = float(((self.weight[picks] - exact).abs() / size).max())
            refuse(f"{name}, {self.outputs}x{self.inputs}", far, 2**-8)
        self.merge_peft()
        moved = rms(exact - self.original[picks])
        refuse("PEFT's merge", rms(self.peft.base_layer.weight[picks] - exact), moved / 2)


def measure_in_place(console: Console, log: Log, args: argparse.Namespace) -> None:
    peak = multiply_adds()
    table = Table(title=f"In place, bf16, rank {args.rank} (ms, medians)")
    for column in (
        "out x in",
        "adapters",
        "copy",
        "merge_",
        "from a source",
        "PEFT",
        "of copy's speed",
        "PEFT / merge_",
        "arithmetic",
        "bound",
        "of bound's speed",
    ):
        table.add_column(column, justify="right")
    for outputs, inputs in ((96, 64), (160, 96)) if args.smoke else ((4096, 4096), (11008, 4096)):
        for adapters in (1, 8):
            layer = Layer(outputs, inputs, adapters, args.rank)
            layer.check()
            calls = {"copy": layer.copy, "merge": layer.merge, "merge_from": layer.merge_from, "peft": layer.merge_peft}
            found = in_turns(calls, args.repeats)
            speed, times = found["copy"][0] / found["merge"][0], found["peft"][0] / found["merge"][0]
            arithmetic = outputs * inputs * adapters * args.rank / peak
            bound = max(arithmetic, found["copy"][0] / COPY_SPEED)
            log.write(
                group="in place", outputs=outputs, inputs=inputs, adapters=adapters, dtype="bfloat16",
                seconds=found, copy_speed_ratio=speed, peft_ratio=times, arithmetic_seconds=arithmetic,
                bound_seconds=bound, multiply_adds_per_second=peak,
            )  # fmt: skip
            shown = [f"{found[name][0] * 1e3:.2f}" for name in calls]
            bounds = [f"{arithmetic * 1e3:.2f}", f"{bound * 1e3:.2f}", f"{bound / found['merge'][0]:.0%}"]
            table.add_row(f"{outputs}x{inputs}", str(adapters), *shown, f"{speed:.0%}", f"{times:.1f}", *bounds)
    console.print(table)
    console.print(
        f"arithmetic: the recipe's multiply-adds at {peak / 1e9:.0f} G a second, the best of bf16 matrix products in "
        f"the caches; bound: that, or a copy at {COPY_SPEED:.0%} of its speed, whichever takes longer"
    )


# TIES


def ties_oracle(deltas: list[Delta]) -> Tensor:
    """Of unit weights, in fp64."""
    kept = []
    for delta in deltas:
        assert delta.a is not None and delta.b is not None
        dense = delta.scale * delta.b.double().t() @ delta.a.double()
        least = dense.abs().flatten().kthvalue(dense.numel() - int(DENSITY * dense.numel()) + 1).values
        kept.append(dense * (dense.abs() >= least))
    stack = torch.stack(kept)
    agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def check_ties(name: str, deltas: list[Delta], ours: Delta, theirs: tuple[Tensor, Tensor], rank: int) -> None:
    """Both are as near to the oracle as its rank allows, to a thousandth of the distance, and ours reports it."""
    want = ties_oracle(deltas)
    s = torch.linalg.svdvals(want)
    best = float(s[rank:].norm() / want.norm())
    assert ours.a is not None and ours.b is not None
    for who, got in (
        ("mlora", ours.b.double().t() @ ours.a.double()),
        ("PEFT", theirs[1].double() @ theirs[0].double()),
    ):
        far = float((got - want).norm() / want.norm())
        refuse(f"{who}'s TIES of {name}, beyond the best of rank {rank}", far / best - 1, 1e-3)
        if who == "mlora":
            refuse(f"the error that TIES of {name} reports", abs(far / ours.error - 1), 1e-3)


def measure_ties(console: Console, log: Log, args: argparse.Namespace) -> None:
    from peft import PeftModel

    model = tiny_llama() if args.smoke else load(args.model)
    names = [f"a{i}" for i in range(4)]
    with tempfile.TemporaryDirectory() as temp:
        folders = [make_adapter(model, Path(temp) / name, args.rank, seed=i) for i, name in enumerate(names)]
        adapters = [mlora.Adapter.from_pretrained(folder) for folder in folders]
        peft: Any = PeftModel.from_pretrained(twin(model), str(folders[0]), adapter_name="a0")
        for folder in folders[1:]:
            peft.load_adapter(str(folder), folder.name)
    runtime = mlora.patch(twin(model))
    lowered = [dict(lower(adapter, runtime.bases).deltas) for adapter in adapters]
    how = mlora.Merge(names, [1.0] * 4, "ties", density=DENSITY, svd_rank=args.rank)
    shapes: dict[tuple[int, int], list[BaseLinear]] = {}
    for name in lowered[0]:
        base = runtime.bases[name]
        shapes.setdefault((base.out_features, base.in_features), []).append(base)

    def peft_of(base: BaseLinear) -> tuple[Tensor, Tensor]:
        target = peft.base_model.model.get_submodule(base.name)
        a, b = target.lora_A["a0"].weight, target.lora_B["a0"].weight
        return peft.base_model._svd_generalized_task_arithmetic_weighted_adapter(  # type: ignore[no-any-return]
            "ties_svd", names, [1.0] * 4, args.rank, target, a, b, DENSITY, "total"
        )

    table = Table(title=f"TIES of four rank-{args.rank} adapters, delta space (median ms a module)")
    for column in ("out x in", "modules", "mlora", "PEFT ties_svd", "PEFT / mlora"):
        table.add_column(column, justify="right")
    totals = {"mlora": 0.0, "peft": 0.0}
    for (outputs, inputs), bases in track(list(shapes.items()), "TIES", console=Console(stderr=True), transient=True):
        spent: dict[str, list[float]] = {"mlora": [], "peft": []}
        for base in (bases[0], bases[-1]):
            deltas = [deltas[base.name] for deltas in lowered]
            check_ties(base.name, deltas, merge_module(deltas, how, base), peft_of(base), args.rank)
            calls = {"mlora": lambda d=deltas, m=base: merge_module(d, how, m), "peft": lambda m=base: peft_of(m)}
            for who, found in in_turns(calls, max(2, args.repeats // 5)).items():
                spent[who].append(found[0])
        mean = {who: statistics.mean(found) for who, found in spent.items()}
        for who in totals:
            totals[who] += mean[who] * len(bases)
        log.write(group="ties", outputs=outputs, inputs=inputs, modules=len(bases), seconds=mean)
        shown = [f"{mean[who] * 1e3:.1f}" for who in totals]
        table.add_row(f"{outputs}x{inputs}", str(len(bases)), *shown, f"{mean['peft'] / mean['mlora']:.1f}")
    whole = seconds(lambda: dict(merge_adapters(lowered, how, runtime.bases)))
    console.print(table)
    ratio = totals["peft"] / totals["mlora"]
    console.print(
        f"The whole model, from two modules of each shape: mlora {totals['mlora']:.1f} s (measured whole, once: "
        f"{whole:.1f} s), PEFT {totals['peft']:.1f} s (extrapolated): {ratio:.1f} times"
    )
    log.write(group="ties whole", extrapolated_seconds=totals, mlora_whole_seconds=whole, peft_ratio=ratio)


# In a request


def measure_request(console: Console, log: Log, args: argparse.Namespace) -> None:
    bare = tiny_llama()
    model = twin(bare)
    runtime = mlora.patch(model)
    with tempfile.TemporaryDirectory() as temp:
        for i, name in enumerate(("a0", "a1")):
            runtime.load_adapter(str(make_adapter(bare, Path(temp) / name, args.rank, seed=i)), name)
    merge = mlora.Merge(["a0", "a1"], [0.7, 0.3], "ties", density=DENSITY)
    runtime.add_merge("by hand", merge)
    as_json = {"ids": ["a1", "a0"], "weights": [0.3, 0.7], "merge_strategy": "ties", "density": DENSITY}
    ids = torch.randint(3, bare.config.vocab_size, (4, 4), generator=torch.Generator().manual_seed(0))
    forms: dict[str, Any] = {"by name": "by hand", "merge": merge, "json": as_json}
    calls = {form: lambda e=entry: model(ids, adapter_names=[e] * len(ids)).logits for form, entry in forms.items()}
    check_request(bare, ids, dict(folded(runtime, merge)), calls)
    found = in_turns(calls, 20 * args.repeats)
    named, low, high = found["by name"]
    extra, spread = {form: found[form][0] - named for form in ("merge", "json")}, high - low
    log.write(group="request", seconds=found, extra_seconds=extra, spread_seconds=spread)
    console.print(
        f"A cached merge in a forward of a two-layer model, 4 rows of 4 tokens: by name {named * 1e6:.0f} us; as a "
        f"Merge {extra['merge'] * 1e6:+.0f} us, as JSON {extra['json'] * 1e6:+.0f} us; the forward's own 20-80 % "
        f"spread is {spread * 1e6:.0f} us"
    )


def folded(runtime: Any, merge: mlora.Merge) -> Iterator[tuple[str, Tensor]]:
    """Each module's merged change of its weight, in fp64."""
    lowered = [runtime._registry.lower(name, runtime._registry[name]) for name in merge.adapters]
    for name, delta in merge_adapters(lowered, merge, runtime.bases):
        if delta.a is not None and delta.b is not None:
            yield name, delta.b.double().t() @ delta.a.double()


def check_request(
    bare: Any, ids: Tensor, changes: Mapping[str, Tensor], calls: Mapping[str, Callable[[], Any]]
) -> None:
    """Logits within twice the bare model's own distance from fp64, and the same ones however the merge is written."""
    exact = copy.deepcopy(bare).double()
    plain = exact(ids).logits
    for name, change in changes.items():
        exact.get_submodule(name).weight += change
    want = exact(ids).logits
    noise = rms(bare(ids).logits - plain)
    if not rms(want - plain) > 4 * noise:
        raise SystemExit("refused to report: the merge moves the logits too little to be checked")
    named = calls["by name"]()
    for form, call in calls.items():
        refuse(f"logits of a merge {form}", rms(call() - want), 2 * noise)
        if not torch.equal(call(), named):
            raise SystemExit(f"refused to report: the logits of a merge as {form} are not those of its name")


GROUPS = {"in-place": measure_in_place, "ties": measure_ties, "request": measure_request}

if __name__ == "__main__":
    main()
