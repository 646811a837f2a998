"""Time of training steps: mlora's of many adapters in one batch, PEFT's of one, and the bare model's.

`bare` is the model with frozen weights, forward and backward to its embeddings: what any training of adapters inside of
it needs at least. Steps of one kind take turns in one process; figures are medians of the ratios within a turn. Rank 16
on all seven linears. Gradients of two adapters in one batch are checked against PEFT alone before anything is timed.

    bf16, fp32         one adapter, 8 x 128 tokens, forward and backward, over bare and PEFT; fp32 with the least
                       that the processor's arithmetic allows
    short              the same in bf16, 1 x 128 tokens
    dora               one DoRA, 128 tokens, its norm taken anew each step, as PEFT takes it each forward pass
    many32, many128, many512
                       16 adapters with so many tokens each in one step, AdamW included (fused, as transformers' Trainer
                       and mlora's have it), against PEFT one after another
    split              64 adapters x 32 tokens against one adapter with as many, forward and backward
    kept               bytes kept for the backward pass beyond the bare model's, counted, over PEFT's
    back               bringing 16 trained adapters back to the kernels, of a step with 16 x 128 tokens

All of it takes 6 to 8 minutes on two quiet cores; a case takes turns for `--seconds`, and three at least.

    python bench/train.py --out bench/results/train.jsonl
    python bench/train.py --case many32 many128    # 2 minutes
    python bench/train.py --smoke                  # a tiny model, whether it runs
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up
from generate import load, tiny_llama, twin
from rich.table import Table
from torch import Tensor

import mlora
from mlora import layout
from mlora.ops import dispatch

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="which of the above")
    parser.add_argument("--seconds", type=float, default=30, help="of a case's turns, about")
    add_arguments(parser)
    args = parser.parse_args()
    console = set_up(args)
    warnings.filterwarnings("ignore", category=UserWarning)
    bench = Bench(args)
    console.print(bench.check(dora="dora" in args.case))
    log = Log(args.out, benchmark="train", rank=16, **machine())
    table = Table(title="Training steps, ratios of times (of bytes: kept)")
    for column in ("case", "of", "over", "ratio", "asked", "20 % to 80 %", "turns", "seconds"):
        table.add_column(column, justify="right" if column in ("ratio", "turns", "seconds") else "left")
    for case in args.case:
        for one in CASES[case](bench):
            middle, low, high = quantiles(one.values)
            log.write(
                case=case, of=one.of, over=one.over, ratio=[middle, low, high], asked=one.asked, seconds=one.spent
            )
            numbers = f"{middle:.3f}", one.asked, f"{low:.3f} to {high:.3f}", str(len(one.values)), f"{one.spent:.3f}"
            table.add_row(case, one.of, one.over, *numbers)
    console.print(table)


class Figure(NamedTuple):
    """`values`: one ratio a turn. `asked`: what the median should be. `spent`: seconds of `of`, the median."""

    of: str
    over: str
    values: list[float]
    asked: str
    spent: float


class Bench:
    """The three kinds of models over one base, for each dtype."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.smoke, self.seconds = args.smoke, 0.0 if args.smoke else args.seconds
        self.bases = {torch.bfloat16: tiny_llama() if args.smoke else load(args.model)}
        self.bases[torch.float32] = copy.deepcopy(self.bases[torch.bfloat16]).float()
        for base in self.bases.values():
            base.requires_grad_(False)
        self.kinds: dict[tuple[Any, ...], Any] = {}

    def mlora(self, adapters: int, dtype: torch.dtype = torch.bfloat16, dora: bool = False) -> Any:
        key = ("mlora", adapters, dtype, dora)
        if key not in self.kinds:
            model = twin(self.bases[dtype])
            runtime = mlora.patch(model, memory=(1 << 24) * adapters * (dtype.itemsize // 2), max_adapters=64)
            for number in range(adapters):
                runtime.add_adapter(f"a{number}", config(dora), seed=number)
            self.kinds[key] = model
        return self.kinds[key]

    def peft(self, dtype: torch.dtype = torch.bfloat16, dora: bool = False) -> Any:
        if ("peft", dtype, dora) not in self.kinds:
            from peft import get_peft_model

            torch.manual_seed(0)
            self.kinds["peft", dtype, dora] = get_peft_model(twin(self.bases[dtype]), config(dora))
        return self.kinds["peft", dtype, dora]

    def ids(self, rows: int, tokens: int) -> Tensor:
        vocabulary = self.bases[torch.bfloat16].config.vocab_size
        return torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(rows))

    def bare_step(self, ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
        base = self.bases[dtype]

        def step() -> None:
            embeds = base.get_input_embeddings()(ids).requires_grad_()
            mlora.losses(base(inputs_embeds=embeds, use_cache=False).logits, ids, None)[None].backward()

        return step

    def peft_step(self, ids: Tensor, dtype: torch.dtype = torch.bfloat16, dora: bool = False) -> Callable[[], Any]:
        model = self.peft(dtype, dora)

        def step() -> None:
            mlora.losses(model(input_ids=ids, use_cache=False).logits, ids, None)[None].backward()
            clear(model.parameters())

        return step

    def mlora_step(
        self, adapters: int, ids: Tensor, dtype: torch.dtype = torch.bfloat16, dora: bool = False
    ) -> Callable[[], Any]:
        model = self.mlora(adapters, dtype, dora)
        names = [f"a{row * adapters // len(ids)}" for row in range(len(ids))]

        def step() -> None:
            if dora:
                model.mlora.refresh_adapter("a0")
            logits = model(input_ids=ids, use_cache=False, adapter_names=names).logits
            sum(mlora.losses(logits, ids, names).values()).backward()
            clear(parameter for name in set(names) for _, parameter in model.mlora.named_parameters(name))

        return step

    def check(self, dora: bool) -> str:
        """Of two adapters of random numbers, in one batch; PEFT has the same ones alone. The oracle is PEFT in fp32."""
        told = []
        kinds = [(torch.float32, False, 0.0), (torch.bfloat16, False, 1.5)]  # in 16 bits one batch's noise may be any
        for dtype, doras, most in [*kinds, (torch.float32, True, 0.0)] if dora else kinds:
            ours, theirs = 0.0, 0.0
            for ids in (self.ids(2, 24), self.ids(2, 25), self.ids(2, 26)):
                mine = self.gradients(dtype, doras, ids)
                for row in range(2):
                    exact = self.gradients(torch.float32, doras, ids, row)
                    ours += distance(mine[row], exact) / 6
                    theirs += distance(self.gradients(dtype, doras, ids, row), exact) / 6
            what = f"{'DoRA' if doras else 'LoRA'} in {str(dtype)[6:]}"
            if not ours <= max(1e-4, most * theirs):
                raise SystemExit(f"refused to report: gradients of {what} differ from PEFT's in fp32 by {ours:.4f}")
            told.append(f"{ours:.1e} (PEFT alone: {theirs:.1e}) of {what}")
        return f"Gradients of two adapters in one batch differ from PEFT's in fp32 by {', '.join(told)}"

    def gradients(self, dtype: torch.dtype, dora: bool, ids: Tensor, row: int | None = None) -> Any:
        """PEFT's of one row alone; mlora's of both, one list for each."""
        names = ["a0", "a1"]
        if row is not None:
            model = self.peft(dtype, dora)
            own = [p for _, p in fill(((k, p) for k, p in model.named_parameters() if p.requires_grad), row)]
            mlora.losses(model(input_ids=ids[row : row + 1]).logits, ids[row : row + 1], None)[None].backward()
            return taken(own)
        model = self.mlora(2, dtype, dora)
        both = [[p for _, p in fill(model.mlora.named_parameters(name), row)] for row, name in enumerate(names)]
        sum(mlora.losses(model(input_ids=ids, adapter_names=names).logits, ids, names).values()).backward()
        return [taken(own) for own in both]

    def one(self, dtype: torch.dtype, rows: int, bare: str, peft: str) -> list[Figure]:
        """`bare` and `peft`: what is asked of mlora over each."""
        ids = self.ids(2, 8) if self.smoke else self.ids(rows, 128)
        steps = {
            "bare": self.bare_step(ids, dtype),
            "peft": self.peft_step(ids, dtype),
            "mlora": self.mlora_step(1, ids, dtype),
        }
        times = self.alternate(steps)
        asked = (("mlora", "bare", bare), ("mlora", "peft", peft), ("peft", "bare", ""))
        return [ratio(times, *names) for names in asked]

    def fp32(self) -> list[Figure]:
        """`one`, and over bare the least that there can be: its linears' products in both directions, and the LoRA's,
        at the best rate that any product of these shapes reaches here."""
        figures = self.one(torch.float32, 8, "<= 0.95", "")
        bare = figures[0].spent / quantiles(figures[0].values)[0]
        base, tokens = self.bases[torch.float32], 16 if self.smoke else 1024
        shapes = [m.weight.shape for name, m in base.named_modules() if name.rpartition(".")[2] in LINEARS]
        best, spent, work = 0.0, 0.0, 0.0
        for (outputs, inputs), count in Counter(shapes).items():
            x, h, weight = (torch.randn(*shape) for shape in ((tokens, inputs), (tokens, outputs), (outputs, inputs)))
            there, back, own = (
                min(seconds(call) for _ in range(7))
                for call in (lambda: x @ weight.t(), lambda: h @ weight, lambda: product(x, weight))  # noqa: B023
            )
            macs = tokens * outputs * inputs
            best = max(best, macs / min(there, back, own))
            spent += count * (there + back)
            work += count * (2 * macs + 3 * 16 * tokens * (inputs + outputs))
        least = (bare - spent + work / best) / bare
        return [*figures, Figure("bound", "bare", [least], "", least * bare)]

    def dora(self) -> list[Figure]:
        ids = self.ids(1, 8 if self.smoke else 128)
        steps = {"peft": self.peft_step(ids, dora=True), "mlora": self.mlora_step(1, ids, dora=True)}
        return [ratio(self.alternate(steps), "peft", "mlora", ">= 1.5")]

    def many(self, tokens: int, asked: str) -> list[Figure]:
        model, peft, ids = self.mlora(16), self.peft(), self.ids(16, 4 if self.smoke else tokens)
        names = [f"a{number}" for number in range(16)]
        optimizers = [adamw(p for _, p in model.mlora.named_parameters(name)) for name in names]
        single = adamw(p for p in peft.parameters() if p.requires_grad)

        def together() -> None:
            logits = model(input_ids=ids, use_cache=False, adapter_names=names).logits
            sum(mlora.losses(logits, ids, names).values()).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        def alone() -> None:
            for row in range(16):
                own = ids[row : row + 1]
                mlora.losses(peft(input_ids=own, use_cache=False).logits, own, None)[None].backward()
                single.step()
                single.zero_grad()

        return [ratio(self.alternate({"peft": alone, "mlora": together}), "peft", "mlora", asked)]

    def split(self) -> list[Figure]:
        ids = self.ids(8, 4) if self.smoke else self.ids(64, 32)
        count = len(ids)
        times = self.alternate({"many": self.mlora_step(count, ids), "one": self.mlora_step(1, ids)})
        return [ratio(times, "many", "one", "<= 1.15")]

    def kept(self) -> list[Figure]:
        ids = self.ids(2, 8 if self.smoke else 128)
        found = {}
        steps = {"bare": self.bare_step(ids), "peft": self.peft_step(ids), "mlora": self.mlora_step(1, ids)}
        for name, step in steps.items():
            seen: dict[int, int] = {}
            held = {p.untyped_storage().data_ptr() for p in self.bases[torch.bfloat16].parameters()}

            def pack(tensor: Tensor, seen: dict[int, int] = seen, held: set[int] = held) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in held and not isinstance(tensor, torch.nn.Parameter):
                    seen[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                step()
            found[name] = sum(seen.values())
        beyond = {name: found[name] - found["bare"] for name in ("peft", "mlora")}
        return [Figure("mlora", "peft", [beyond["mlora"] / beyond["peft"]], "<= 0.35", 0.0)]

    def back(self) -> list[Figure]:
        model, ids = self.mlora(16), self.ids(16, 4 if self.smoke else 128)
        names = [f"a{number}" for number in range(16)]
        step = self.mlora_step(16, ids)

        def refresh() -> None:
            for name in names:
                model.mlora.refresh_adapter(name)
            with model.mlora.use_adapters(names):
                pass

        times = self.alternate({"back": refresh, "step": step})
        return [ratio(times, "back", "step", "<= 0.02")]

    def alternate(self, steps: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Times of some turns after one that warms up: as many as `seconds` are enough for, 3 to 15."""
        times: dict[str, list[float]] = {name: [] for name in steps}
        warm = sum(seconds(step) for step in steps.values())
        turns = 1 if self.smoke else min(15, max(3, round(self.seconds / warm)))
        for turn in range(turns):
            for name in list(steps) if turn % 2 else list(steps)[::-1]:
                times[name].append(seconds(steps[name]))
        return times


CASES: dict[str, Callable[[Bench], list[Figure]]] = {
    "bf16": lambda bench: bench.one(torch.bfloat16, 8, "<= 1.18", "<= 0.90"),
    "fp32": Bench.fp32,
    "short": lambda bench: bench.one(torch.bfloat16, 1, "", ""),
    "dora": Bench.dora,
    "many32": lambda bench: bench.many(32, ">= 2.4"),
    "many128": lambda bench: bench.many(128, ">= 1.4"),
    "many512": lambda bench: bench.many(512, ">= 1.05"),
    "split": Bench.split,
    "kept": Bench.kept,
    "back": Bench.back,
}


def ratio(times: dict[str, list[float]], of: str, over: str, asked: str) -> Figure:
    values = [a / b for a, b in zip(times[of], times[over], strict=True)]
    return Figure(of, over, values, asked, quantiles(times[of])[0])


def product(x: Tensor, weight: Tensor) -> Tensor:
    """mlora's own, without adapters."""
    table = torch.empty(0, layout.TABLE_WIDTH, dtype=torch.int64)
    none = torch.zeros(layout.PLAN_HEADER, dtype=torch.int32)
    return dispatch.linear(x, weight, None, x.new_empty(0), table, none, weight.shape[1])


def config(dora: bool) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS, use_dora=dora)


def fill(parameters: Any, seed: int) -> list[Any]:
    """Random numbers, the same for each kind of model: a fresh adapter's B are zero. Magnitudes, which are vectors, are
    about as large as norms of rows are."""
    draw, filled = torch.Generator().manual_seed(seed), list(parameters)
    with torch.no_grad():
        for _, parameter in filled:
            about = 2.0 if parameter.dim() == 1 else 0.0
            parameter.copy_((about + torch.randn(parameter.shape, generator=draw) * 0.02).bfloat16())
    return filled


def taken(parameters: list[Any]) -> list[Tensor]:
    """Their gradients, which they have no more then."""
    gradients = [parameter.grad for parameter in parameters]
    clear(parameters)
    return gradients


def distance(mine: list[Tensor], exact: list[Tensor]) -> float:
    """Relative."""
    squares = sum(float((m - e).square().sum()) for m, e in zip(mine, exact, strict=True))
    return (squares / sum(float(e.square().sum()) for e in exact)) ** 0.5


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=1e-5, fused=True)


def clear(parameters: Any) -> None:
    for parameter in parameters:
        parameter.grad = None


if __name__ == "__main__":
    main()
