"""A decoder layer of 4096 and 14336 (Llama 3's of 8 B) with LoRA on all seven linears, on a GPU: time over the bare
layer's, for decode and prefill, 1, 8 and 64 adapters of rank 16 and 64; PEFT beside it.

    python bench/gpu_layer.py --out bench/results/gpu_layer.jsonl

The model is a Llama of one layer, bf16, with a vocabulary of 256 and no cached tokens, so that next to nothing is timed
that LoRA does not touch. Every case is first compared with PEFT in fp32 with each row's adapter alone, and base rows
with the bare layer's bits; what does not hold is written down as refused, and not timed. Cases run in turns with the
bare layer, called as usual (`eager`: Python and launches included) and as one CUDA graph (`graph`: the GPU's own time).
PEFT's mixed batches cannot be captured. `--smoke` is a tiny layer on the CPU, without the capture.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Log, gpu_arguments, machine, set_up
from generate import Case, made, make_adapter, patched, peft_model, rms
from operators import time_sweeps
from torch import Tensor

from mlora.layers.warmup import warmup

DECODE, PREFILL = 64, 2048  # tokens of a forward
COUNTS, RANKS = (1, 8, 64), (16, 64)


@dataclass
class Batch:
    """Row r of the batch uses adapter `names[r]`; distinct ones lie side by side."""

    rank: int
    names: list[str]

    @property
    def distinct(self) -> list[str]:
        return list(dict.fromkeys(self.names))


@dataclass
class Models:
    """Of the same weights: the bare layer, mlora's, PEFT's, and PEFT's in fp32."""

    bare: Any
    served: Any
    peft: Any
    exact: Any


def main() -> None:
    args, device = gpu_arguments(__doc__, 15, table)
    console = set_up(args)
    if args.smoke:
        args.repeats = 2
        console.print("A tiny layer on the CPU: nothing is timed on a GPU, and the ratios mean nothing")
    log = Log(args.out, bench="gpu_layer", smoke=args.smoke, **machine(device))
    counts, ranks = ((1, 4), (4,)) if args.smoke else (COUNTS, RANKS)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temp, torch.no_grad():  # in inference mode no layers share a launch
        models = load(Path(temp), device, max(counts), ranks)
        for phase, rows, length in shapes(counts, args.smoke):
            draw = torch.Generator().manual_seed(1)
            ids = torch.randint(3, models.bare.config.vocab_size, (rows, length), generator=draw).to(device)
            graphs = Graphs(models, ids)
            for rank in ranks:
                for count in counts if phase == "decode" else (rows,):
                    batch = Batch(rank, [f"r{rank}a{r * count // rows}" for r in range(rows)])
                    what = {"phase": phase, "tokens": ids.numel(), "rank": rank, "adapters": count}
                    for record in run(models, graphs, ids, batch, args.repeats):
                        log.write(**what, **record)
                        console.print(told(what, record))


def load(folder: Path, device: str, count: int, ranks: tuple[int, ...]) -> Models:
    sizes = {"num_hidden_layers": 1, "vocab_size": 256}
    if device == "cuda":
        sizes |= {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    bare = made(4096 if device == "cuda" else 64, torch.bfloat16, **sizes)
    folders = [make_adapter(bare, folder / f"r{rank}a{i}", rank, seed=i) for rank in ranks for i in range(count)]
    bare = bare.to(device)
    served = patched(bare, folders, max(sum(f.stat().st_size for f in one.iterdir()) for one in folders), fused=True)
    if device == "cuda":
        warmup(served)  # nothing may be compiled while a graph is captured
    return Models(bare, served, peft_model(bare, folders), peft_model(copy.deepcopy(bare).float(), folders))


def shapes(counts: tuple[int, ...], smoke: bool) -> Iterator[tuple[str, int, int]]:
    """Phase, rows, tokens of a row: a token for each row in decode, a row for each adapter in prefill."""
    decode, prefill = (4, 16) if smoke else (DECODE, PREFILL)
    yield "decode", decode, 1
    for count in counts:
        yield "prefill", count, prefill // count


class Graphs:
    """The forwards of some ids as CUDA graphs, each made when first asked for; on the CPU what would be captured."""

    def __init__(self, models: Models, ids: Tensor) -> None:
        self.models, self.ids = models, ids
        self.made: dict[str, tuple[Callable[[], object], Tensor]] = {}
        torch._dynamo.reset()  # or another shape would be compiled for all shapes

    def get(self, name: str) -> tuple[Callable[[], object], Tensor]:
        """What runs the graph of one of `Models`, and the logits that it leaves. A patched model is captured as
        compiled code, which reads the plan from memory that stays, and the others are compiled in the same way."""
        if name not in self.made:
            model = getattr(self.models, name)
            step = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
            self.made[name] = self._capture(lambda: step(input_ids=self.ids, use_cache=False).logits)
        return self.made[name]

    def _capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        if self.ids.device.type == "cpu":
            out = step().clone()
            return lambda: out.copy_(step()), out
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                out = step()
        return graph.replay, out


def run(models: Models, graphs: Graphs, ids: Tensor, batch: Batch, repeats: int) -> Iterator[dict[str, Any]]:
    """Records of one workload: a ratio to the bare layer, or what was refused or could not be done, and why."""

    def forward(case: Case) -> Callable[[], Tensor]:
        return lambda: case.model(input_ids=ids, use_cache=False, **case.routing).logits

    want, allowed, reason = judged(models, ids, batch)
    if reason:
        yield {"refused": reason}
        return
    models.peft.set_adapter(batch.distinct[0])
    mixed = {"adapter_names": batch.names} if len(batch.distinct) > 1 else {}
    cases = [
        Case("mlora, base rows", models.served),
        Case("mlora", models.served, {"adapter_names": batch.names}),
        Case("PEFT", models.peft, mixed),
    ]
    base, *times = time_sweeps([forward(case) for case in (Case("", models.bare), *cases)], 1, repeats)
    for case, its in zip(cases, times, strict=True):
        yield ratio(case.name, "eager", base, its)
    for case in cases[:2]:
        entries = case.routing.get("adapter_names")
        try:
            bare, _ = graphs.get("bare")
            mine, logits = graphs.get("served")
            with models.served.mlora.use_adapters(entries) if entries else nullcontext():
                mine()
                error = rms(logits - want) if entries else rms(logits - forward(Case("", models.bare))())
                if not error <= allowed:
                    yield {
                        "case": case.name,
                        "way": "graph",
                        "refused": f"RMS error {error:.3g}, allowed {allowed:.3g}",
                    }
                    continue
                base, its = time_sweeps([bare, mine], 1, repeats)
        except Exception as error:  # of any library on the way; what else there is goes on
            yield {"case": case.name, "way": "graph", "skipped": f"{type(error).__name__}: {error}"[:300]}
            continue
        yield ratio(case.name, "graph", base, its)


def judged(models: Models, ids: Tensor, batch: Batch) -> tuple[Tensor, float, str]:
    """What the logits must be, by PEFT in fp32 with each row's adapter alone; the RMS error that is allowed, twice that
    of PEFT in the base's dtype; and why the workload must not be timed, or ""."""
    plain = models.bare(input_ids=ids, use_cache=False).logits
    if not torch.equal(models.served(input_ids=ids, use_cache=False).logits, plain):
        return plain, 0.0, "without adapters the patched layer differs from the bare one"
    want, its = torch.empty_like(plain, dtype=torch.float32), torch.empty_like(plain)
    for name in batch.distinct:
        rows = [r for r, other in enumerate(batch.names) if other == name]
        for model, to in ((models.exact, want), (models.peft, its)):
            model.set_adapter(name)
            to[rows] = model(input_ids=ids[rows], use_cache=False).logits
    got = models.served(input_ids=ids, use_cache=False, adapter_names=batch.names).logits
    error, allowed, moved = rms(got - want), 2 * rms(its - want), rms(plain - want)
    if not error <= allowed:
        return want, allowed, f"RMS error of the logits {error:.3g} against PEFT in fp32, allowed {allowed:.3g}"
    if not moved > 2 * allowed:
        return want, allowed, f"the adapters move the logits by {moved:.3g}, no more than twice the error allowed"
    return want, allowed, ""


def ratio(case: str, way: str, base: tuple[float, ...], its: tuple[float, ...]) -> dict[str, Any]:
    return {"case": case, "way": way, "ratio": its[0] / base[0], "seconds": its, "bare_seconds": base}


def told(what: dict[str, Any], record: dict[str, Any]) -> str:
    name = f"{what['phase']}, {what['tokens']} tokens, {what['adapters']} x rank {what['rank']}"
    if "case" in record:
        name += f", {record['way']}, {record['case']}"
    for why in ("refused", "skipped"):
        if why in record:
            return f"{name}: {why}: {record[why]}"
    its, base = (1e6 * record[which][0] for which in ("seconds", "bare_seconds"))
    return f"{name}: {record['ratio']:.3f} ({its:.0f} us, bare {base:.0f} us)"


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line a phase, rank and number of adapters; of each way and case its time over the bare layer's."""
    columns = [(way, case) for way in ("graph", "eager") for case in ("mlora, base rows", "mlora", "PEFT")]
    columns.remove(("graph", "PEFT"))
    rows: dict[tuple[Any, ...], dict[tuple[str, str], str]] = {}
    for r in records:
        cells = rows.setdefault((r["phase"], r["tokens"], r["rank"], r["adapters"]), {})
        if "ratio" in r:
            cells[r["way"], r["case"]] = f"{r['ratio']:.2f}"
        elif "case" in r:
            cells[r["way"], r["case"]] = "refused" if "refused" in r else "not run"
        else:
            cells |= dict.fromkeys(columns, "refused")
    lines = [["", *(f"{case}, {way}" for way, case in columns)], ["---"] * (len(columns) + 1)]
    for (phase, tokens, rank, adapters), cells in rows.items():
        first = f"{phase}, {tokens} tokens, {adapters} of rank {rank}"
        lines.append([first, *(cells.get(column, "") for column in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
