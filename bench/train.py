"""Time of training steps: mlora's of many adapters in one batch, PEFT's of one, and the bare model's.

`bare` is the model with frozen weights, forward and backward to its embeddings: what any training of adapters inside of
it needs at least. Steps of one kind take turns in one process; figures are medians of the ratios within a turn. Rank 16
on all seven linears.

    one      one adapter, forward and backward, in bf16 and fp32
    many     16 adapters in one step with AdamW of each, against PEFT training one after another
    split    64 adapters, against one with as many tokens, forward and backward
    kept     bytes kept for the backward pass beyond the bare model's, counted
    back     bringing 16 trained adapters back to the kernels, of a step with 16 x 128 tokens

Before any timing, the gradients of two adapters in one batch are checked against PEFT alone.

    python bench/train.py --out bench/results/train.jsonl
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up
from generate import load, tiny_llama, twin
from rich.table import Table
from torch import Tensor

import mlora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument(
        "--only", nargs="*", default=["one", "many", "split", "kept", "back"], help="which of the above"
    )
    parser.add_argument("--turns", type=int, default=5)
    add_arguments(parser)
    args = parser.parse_args()
    console = set_up(args)
    warnings.filterwarnings("ignore", category=UserWarning)
    bench = Bench(args)
    console.print(bench.check())
    log = Log(args.out, benchmark="train", rank=16, **machine())
    table = Table(title="Training steps, ratios of times (of bytes: kept)")
    for column in ("figure", "case", "ratio", "20 % to 80 %", "seconds"):
        table.add_column(column, justify="right" if column == "ratio" else "left")
    for name in args.only:
        for case, over, values, spent in getattr(bench, name)():
            middle, low, high = quantiles(values)
            log.write(figure=name, case=case, over=over, ratio=[middle, low, high], seconds=spent)
            table.add_row(name, f"{case} / {over}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{spent:.3f}")
    console.print(table)


Figure = tuple[str, str, list[float], float]


class Bench:
    """The three kinds of models over one base, for each dtype."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.smoke, self.turns = args.smoke, 1 if args.smoke else args.turns
        self.bases = {torch.bfloat16: tiny_llama() if args.smoke else load(args.model)}
        self.bases[torch.float32] = copy.deepcopy(self.bases[torch.bfloat16]).float()
        for base in self.bases.values():
            base.requires_grad_(False)
        self.kinds: dict[tuple[Any, ...], Any] = {}

    def mlora(self, adapters: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        key = ("mlora", adapters, dtype)
        if key not in self.kinds:
            model = twin(self.bases[dtype])
            runtime = mlora.patch(model, memory=(1 << 24) * adapters * (dtype.itemsize // 2), max_adapters=64)
            for number in range(adapters):
                runtime.add_adapter(f"a{number}", config(), seed=number)
            self.kinds[key] = model
        return self.kinds[key]

    def peft(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        if ("peft", dtype) not in self.kinds:
            from peft import get_peft_model

            torch.manual_seed(0)
            self.kinds["peft", dtype] = get_peft_model(twin(self.bases[dtype]), config())
        return self.kinds["peft", dtype]

    def ids(self, rows: int, tokens: int) -> Tensor:
        vocabulary = self.bases[torch.bfloat16].config.vocab_size
        return torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(rows))

    def bare_step(self, ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
        base = self.bases[dtype]

        def step() -> None:
            embeds = base.get_input_embeddings()(ids).requires_grad_()
            mlora.losses(base(inputs_embeds=embeds, use_cache=False).logits, ids, None)[None].backward()

        return step

    def peft_step(self, ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
        model = self.peft(dtype)

        def step() -> None:
            mlora.losses(model(input_ids=ids, use_cache=False).logits, ids, None)[None].backward()
            clear(model.parameters())

        return step

    def mlora_step(self, adapters: int, ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
        model = self.mlora(adapters, dtype)
        names = [f"a{row * adapters // len(ids)}" for row in range(len(ids))]

        def step() -> None:
            logits = model(input_ids=ids, use_cache=False, adapter_names=names).logits
            sum(mlora.losses(logits, ids, names).values()).backward()
            clear(parameter for name in set(names) for _, parameter in model.mlora.named_parameters(name))

        return step

    def check(self) -> str:
        """Of two adapters of random numbers, in one batch; PEFT has the same ones alone. The oracle is PEFT in fp32."""
        told = []
        for dtype, most in ((torch.float32, 0.0), (torch.bfloat16, 1.5)):  # in 16 bits one batch's noise may be any
            ours, theirs = 0.0, 0.0
            for ids in (self.ids(2, 24), self.ids(2, 25), self.ids(2, 26)):
                mine = self.gradients(dtype, ids)
                for row in range(2):
                    exact = self.gradients(torch.float32, ids, row)
                    ours += distance(mine[row], exact) / 6
                    theirs += distance(self.gradients(dtype, ids, row), exact) / 6
            if not ours <= max(1e-4, most * theirs):
                raise SystemExit(f"refused to report: gradients in {dtype} differ from PEFT's in fp32 by {ours:.4f}")
            told.append(f"{ours:.1e} (PEFT alone: {theirs:.1e}) in {dtype}")
        return f"Gradients of two adapters in one batch differ from PEFT's in fp32 by {' and '.join(told)}"

    def gradients(self, dtype: torch.dtype, ids: Tensor, row: int | None = None) -> Any:
        """PEFT's of one row alone; mlora's of both, one list for each."""
        names = ["a0", "a1"]
        if row is not None:
            own = [p for _, p in fill(((k, p) for k, p in self.peft(dtype).named_parameters() if p.requires_grad), row)]
            mlora.losses(self.peft(dtype)(input_ids=ids[row : row + 1]).logits, ids[row : row + 1], None)[
                None
            ].backward()
            return taken(own)
        model = self.mlora(2, dtype)
        both = [[p for _, p in fill(model.mlora.named_parameters(name), row)] for row, name in enumerate(names)]
        sum(mlora.losses(model(input_ids=ids, adapter_names=names).logits, ids, names).values()).backward()
        return [taken(own) for own in both]

    def one(self) -> list[Figure]:
        figures = []
        shapes = ((2, 8),) if self.smoke else ((8, 128), (1, 128))
        for dtype in (torch.bfloat16, torch.float32):
            for rows, tokens in shapes:
                ids, case = self.ids(rows, tokens), f"{str(dtype)[6:]} {rows} x {tokens}"
                steps = {
                    "bare": self.bare_step(ids, dtype),
                    "peft": self.peft_step(ids, dtype),
                    "mlora": self.mlora_step(1, ids, dtype),
                }
                times = self.alternate(steps)
                figures += [ratio(times, f"{case} {over[0]}", *over) for over in (("mlora", "bare"), ("mlora", "peft"))]
                figures.append(ratio(times, f"{case} peft", "peft", "bare"))
        return figures

    def many(self) -> list[Figure]:
        figures, model, peft = [], self.mlora(16), self.peft()
        names = [f"a{number}" for number in range(16)]
        optimizers = [torch.optim.AdamW([p for _, p in model.mlora.named_parameters(n)], lr=1e-5) for n in names]
        single = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-5)
        for tokens in (4,) if self.smoke else (32, 128, 512):
            ids = self.ids(16, tokens)

            def together(ids: Tensor = ids) -> None:
                logits = model(input_ids=ids, use_cache=False, adapter_names=names).logits
                sum(mlora.losses(logits, ids, names).values()).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

            def alone(ids: Tensor = ids) -> None:
                for row in range(16):
                    own = ids[row : row + 1]
                    mlora.losses(peft(input_ids=own, use_cache=False).logits, own, None)[None].backward()
                    single.step()
                    single.zero_grad()

            times = self.alternate({"peft": alone, "mlora": together})
            figures.append(ratio(times, f"16 x {tokens} peft", "peft", "mlora"))
        return figures

    def split(self) -> list[Figure]:
        ids = self.ids(8, 4) if self.smoke else self.ids(64, 32)
        count = len(ids)
        times = self.alternate({"many": self.mlora_step(count, ids), "one": self.mlora_step(1, ids)})
        return [ratio(times, f"{count} adapters", "many", "one")]

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
        return [("bytes beyond bare, mlora", "peft", [beyond["mlora"] / beyond["peft"]], 0.0)]

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
        return [ratio(times, "16 adapters back", "back", "step")]

    def alternate(self, steps: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(self.turns + 1):
            for name in list(steps) if turn % 2 else list(steps)[::-1]:
                spent = seconds(steps[name])
                if turn:  # the first one warms up
                    times[name].append(spent)
        return times


def ratio(times: dict[str, list[float]], case: str, mine: str, theirs: str) -> Figure:
    values = [a / b for a, b in zip(times[mine], times[theirs], strict=True)]
    return case, theirs, values, quantiles(times[mine])[0]


def config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS)


def fill(parameters: Any, seed: int) -> list[Any]:
    """Random numbers, the same for each kind of model: a fresh adapter's B are zero."""
    draw, filled = torch.Generator().manual_seed(seed), list(parameters)
    with torch.no_grad():
        for _, parameter in filled:
            parameter.copy_((torch.randn(parameter.shape, generator=draw) * 0.02).bfloat16())
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


def clear(parameters: Any) -> None:
    for parameter in parameters:
        parameter.grad = None


if __name__ == "__main__":
    main()
