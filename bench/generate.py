"""Whole-model cost of serving LoRA adapters, as a ratio to the bare model: decode step, prefill, generate().

Bare and patched models share their weights and are timed in turns in one process, so what slows the
machine slows both. Before any timing, the patched model's rows are checked against PEFT serving each
adapter alone, and its base rows must equal the bare model's bit for bit; on a mismatch nothing is reported.

    python bench/generate.py --out bench/results/generate.jsonl

Adapters in fp32 on a 16-bit base, over the same in the base's dtype, on a model of width 2048 made on the spot:

    python bench/generate.py --width 2048 --wide --adapters 1 16 --phases "decode step"

Over the rows of a batch, with base rows, one adapter, all distinct, and PEFT's one adapter (bench/plot.py draws it):

    python bench/generate.py --batches 1 2 4 8 16 32 64 --phases "decode step" --out bench/results/batches.jsonl

With `--fused always` base rows are not the bare model's bits: they may be half as far again from fp32 as that model is.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up, streaming_read
from linears import Linears
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import mlora
from mlora.cli.demo_model import resolve_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHASES = ["decode step", "prefill", "generate"]
JUDGED = 4  # adapters that are compared with PEFT's at each batch size of a sweep


@dataclass
class Case:
    """One way to serve the batch. `routing` goes to every forward; it is timed in turns with `beside`, or with the bare
    model."""

    name: str
    model: Any
    routing: dict[str, Any] = field(default_factory=dict)
    adapters: int = 0
    generates: bool = True
    beside: Case | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--width", type=int, help="of a random Llama of 8 layers in place of a model")
    parser.add_argument("--wide", action="store_true", help="time adapters in fp32 over those in the model's dtype")
    parser.add_argument("--fused", choices=("bit-equal", "always"), default="bit-equal", help="as in mlora.patch")
    parser.add_argument("--batches", type=int, nargs="+", default=[16], help="rows of a batch; several are a sweep")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--adapters", type=int, nargs="*", help="distinct ones in the batch; default 1 2 4 8 16")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of prefills; 4x decode steps, half generates")
    parser.add_argument("--phases", nargs="*", default=PHASES, choices=PHASES)
    parser.add_argument("--no-peers", action="store_true", help="skip PEFT and PolyLoRA in the timings")
    add_arguments(parser)
    args = parser.parse_args()
    sweep = len(args.batches) > 1
    if sweep and (args.adapters or args.wide):
        parser.error("several --batches have cases of their own, without --adapters and --wide")
    if args.smoke:
        args.prompt, args.new, args.rank, args.repeats = 8, 4, 4, 2
        args.batches = [1, 2, 5] if sweep else [4]
        args.adapters = [1, 4]
    most = max(args.batches)
    counts = [most] if sweep else args.adapters or [1, 2, 4, 8, 16]
    if max(counts) > most:
        parser.error(f"--adapters {max(counts)} is more than the batch's {most} rows")

    console = set_up(args)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    bare = tiny_llama() if args.smoke else made(args.width, dtype) if args.width else load(args.model, dtype)
    log = Log(
        args.out,
        bench="batches" if sweep else "generate",
        model=name_of(args),
        beside="adapters in the model's dtype" if args.wide else "the bare model",
        dtype=str(bare.dtype).removeprefix("torch."),
        fused=args.fused,
        prompt=args.prompt,
        new=args.new,
        rank=args.rank,
        **machine(),
    )
    with tempfile.TemporaryDirectory() as temp:
        stored = torch.float32 if args.wide else torch.bfloat16
        folders = [
            make_adapter(bare, Path(temp) / f"a{i}", args.rank, seed=i, dtype=stored) for i in range(max(counts))
        ]
        adapter_bytes = sum(f.stat().st_size for f in folders[0].glob("*.safetensors"))
        fused: Any = args.fused if args.fused == "always" else True
        served = patched(bare, folders, adapter_bytes, fused)
        models = [served]
        if args.wide:
            models.append(patched(bare, folders, adapter_bytes, fused, dtype=torch.float32))
        peft = unfused = None
        if not args.wide:
            if not args.no_peers:
                peft = peft_model(bare, folders[:1] if sweep else folders)
            if not sweep:
                unfused = patched(bare, folders, adapter_bytes, fused=False)
        for batch in args.batches:
            ids = torch.randint(3, bare.config.vocab_size, (batch, args.prompt))
            with console.status(f"{batch} rows: checking against PEFT, each adapter alone"):
                for model in models:
                    judged = folders[:JUDGED] if sweep else folders
                    for line in check(bare, model, judged, ids, args.fused != "always"):
                        console.print(line)
            if args.wide:
                cases = wide_cases(*models, batch, counts)
            elif sweep:
                cases = sweep_cases(served, peft, batch)
            else:
                cases = mlora_cases(served, unfused, batch, counts)
                cases += peer_cases(bare, peft, folders, batch, args.rank) if peft is not None else []
            more = adapter_bytes // 2 if args.wide else adapter_bytes  # than what the case is beside reads
            measure(console, args, log, bare, cases, ids, more)


def load(model: str | None, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(str(resolve_model(model)), dtype=dtype).eval()


def twin(model: Any) -> Any:
    """A second model over the same weights: taking turns does not push them out of the cache."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def patched(bare: Any, folders: list[Path], adapter_bytes: int, fused: Any, dtype: torch.dtype | None = None) -> Any:
    model = twin(bare)
    runtime = mlora.patch(model, memory=2 * len(folders) * adapter_bytes, fused=fused, dtype=dtype)
    for folder in folders:
        runtime.load_adapter(str(folder), folder.name)
    return model


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def made(width: int, dtype: torch.dtype, **sizes: int) -> Any:
    """A random Llama of 8 layers, or with these sizes of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    usual = {
        "intermediate_size": 4 * width,
        "num_hidden_layers": 8,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(width // 256, 1),
        "vocab_size": 4096,
        "pad_token_id": 0,
    }
    config = LlamaConfig(hidden_size=width, **{**usual, **sizes})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_adapter(model: Any, folder: Path, rank: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A PEFT folder, random A and B on all seven linears; the delta is a tenth of the base's output or so."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in LINEARS:
            a = torch.randn(rank, module.in_features, generator=random) / module.in_features**0.5
            b = torch.randn(module.out_features, rank, generator=random) / rank**0.5
            b *= 0.1 * module.weight.float().norm() / module.out_features**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": LINEARS,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def check(bare: Any, served: Any, folders: list[Path], ids: Tensor, bits: bool = True) -> Iterator[str]:
    """Yield what held, or exit. `bits`: whether base rows must be the bare model's; else their error is judged.

    A token's error is the RMS distance of its logits from PEFT's in fp32 (fp64 for fp32 models), one fresh model per
    adapter, one row at a time. A row's median may be at most twice that of the same PEFT model in the base's dtype, and
    so may the RMS of all rows together, if there are several: of a single row that is the error of a few tokens, which
    enlarge any rounding tenfold or not, by chance. The last row of several is a base row.
    """
    from peft import PeftModel

    rows = len(ids)
    names: list[Any] = [folders[i % len(folders)].name for i in range(rows)]
    if rows > 1:
        names[-1] = None
    with torch.inference_mode():
        exact = copy.deepcopy(bare).to(torch.float64 if bare.dtype == torch.float32 else torch.float32)
        plain = bare(ids).logits
        mixed = served(ids, adapter_names=names).logits
        if bits:
            check_bits(bare, served, ids, names, plain, mixed)
            yield f"base rows equal the bare model's bit for bit (prefill {tuple(ids.shape)} and decode)"
        else:
            passes = [[m(ids).logits, decoder(Case("", m), ids)()] for m in (exact, bare, served)]
            for what, want, its, own in zip(("prefill", "decode"), *passes, strict=True):
                error, usual = rms(own - want), rms(its - want)
                if not error <= 1.5 * usual:
                    raise SystemExit(
                        f"refused to report: base rows' {what} is {error:.3g} away from {exact.dtype}, bare {usual:.3g}"
                    )
                yield f"base rows, {what}: RMS error of the logits {error:.3g}, the bare model's {usual:.3g}"
        errors: list[Tensor] = []
        peft_errors: list[Tensor] = []
        for row, folder in enumerate(folders[: max(rows - 1, 1)]):
            want = PeftModel.from_pretrained(twin(exact), str(folder)).eval()(ids[row : row + 1]).logits[0]
            got = PeftModel.from_pretrained(twin(bare), str(folder)).eval()(ids[row : row + 1]).logits[0]
            errors.append(each_rms(mixed[row] - want))
            peft_errors.append(each_rms(got - want))
            ours, peft, moved = (float(e.median()) for e in (errors[-1], peft_errors[-1], each_rms(want - plain[row])))
            if not ours <= 2 * peft or not moved > 4 * peft:
                raise SystemExit(
                    f"refused to report: {folder.name} alone in {exact.dtype} is {ours:.3g} away (RMS of a token's "
                    f"logits, median), PEFT in {bare.dtype} is {peft:.3g} away; the adapter itself moves logits by "
                    f"{moved:.3g}"
                )
            gc.collect()
    total, peft_total = (rms(torch.stack(found)) for found in (errors, peft_errors))
    if len(errors) > 1 and not total <= 2 * peft_total:
        raise SystemExit(
            f"refused to report: all adapters together are {total:.3g} away (RMS of logits) from PEFT, each alone in "
            f"{exact.dtype}; PEFT in {bare.dtype} is {peft_total:.3g} away"
        )
    yield (
        f"{len(errors)} adapters in one batch: RMS error of the logits {total:.3g}; PEFT, each alone in {bare.dtype}: "
        f"{peft_total:.3g} (both against PEFT in {exact.dtype})"
    )


def check_bits(bare: Any, served: Any, ids: Tensor, names: list[Any], plain: Tensor, mixed: Tensor) -> None:
    """Exit where base rows are not the bare model's, bit for bit: a batch of them, and one in a mixed batch."""
    rows = len(ids)
    if not torch.equal(served(ids).logits, plain):
        raise SystemExit("refused to report: without adapters the patched model's prefill differs from the bare one's")
    if rows > 1 and not torch.equal(mixed[-1], plain[-1]):
        raise SystemExit("refused to report: a base row in a mixed prefill differs from the bare model's")
    steps = [decoder(Case("", m, r), ids)() for m, r in ((bare, {}), (served, {}), (served, {"adapter_names": names}))]
    if not torch.equal(steps[0], steps[1]) or (rows > 1 and not torch.equal(steps[0][-1], steps[2][-1])):
        raise SystemExit("refused to report: a base row's decode step differs from the bare model's")


def rms(difference: Tensor) -> float:
    return float(difference.float().square().mean().sqrt())


def each_rms(difference: Tensor) -> Tensor:
    """Over the last dimension."""
    return difference.float().square().mean(-1).sqrt()


def mlora_cases(served: Any, unfused: Any, batch: int, counts: list[int]) -> list[Case]:
    cases = [Case("mlora, base rows", served)]
    for count in counts:
        names = [f"a{i % count}" for i in range(batch)]
        cases.append(Case(f"mlora, {count} distinct", served, {"adapter_names": names}, count))
    for count in sorted({1, max(counts)}):
        names = [f"a{i % count}" for i in range(batch)]
        cases.append(Case(f"mlora unfused, {count} distinct", unfused, {"adapter_names": names}, count))
    return cases


def wide_cases(narrow: Any, wide: Any, batch: int, counts: list[int]) -> list[Case]:
    """Adapters in fp32, each beside the same in the model's dtype."""
    cases = [Case("fp32 arena, base rows", wide, beside=Case("", narrow))]
    for count in counts:
        routing = {"adapter_names": [f"a{i % count}" for i in range(batch)]}
        cases.append(Case(f"fp32 arena, {count} distinct", wide, routing, count, beside=Case("", narrow, routing)))
    return cases


def sweep_cases(served: Any, peft: Any, batch: int) -> list[Case]:
    """Those whose names are the same for every number of rows."""
    cases = [
        Case("mlora, base rows", served),
        Case("mlora, one adapter", served, {"adapter_names": ["a0"] * batch}, 1),
        Case("mlora, all distinct", served, {"adapter_names": [f"a{i}" for i in range(batch)]}, batch),
    ]
    return [*cases, Case("PEFT, one adapter", peft, adapters=1)] if peft is not None else cases


def peft_model(bare: Any, folders: list[Path]) -> Any:
    """PEFT with these adapters, the first of them active, in the dtype of their files."""
    from peft import PeftModel

    first, *others = folders
    peft: Any = PeftModel.from_pretrained(twin(bare), str(first), adapter_name=first.name, autocast_adapter_dtype=False)
    for folder in others:
        peft.load_adapter(str(folder), folder.name, autocast_adapter_dtype=False)
    return peft.eval()


def peer_cases(bare: Any, peft: Any, folders: list[Path], batch: int, rank: int) -> list[Case]:
    """PEFT with one adapter and its mixed batch, in the model's dtype; PolyLoRA where it is installed."""
    names = [folders[i % len(folders)].name for i in range(batch)]
    cases = [
        Case("PEFT, 1 adapter", peft, adapters=1),
        Case(f"PEFT mixed batch, {len(folders)} distinct", peft, {"adapter_names": names}, len(folders)),
    ]
    if find_spec("polylora") is not None:
        from polylora import PolyLoraConfig, PolyLoraModel  # type: ignore[import-not-found]

        config = PolyLoraConfig(max_gpu_adapters=len(folders), max_rank=rank, target_modules=LINEARS)
        poly = PolyLoraModel(twin(bare), config).eval()
        for folder in folders:
            poly.load_adapter_from_disk(folder.name, str(folder))
        routing = {"adapter_ids": names}
        cases.append(Case(f"PolyLoRA, {len(folders)} distinct", poly, routing, len(folders), generates=False))
    return cases


def prefill(case: Case, ids: Tensor) -> Callable[[], object]:
    return lambda: case.model(input_ids=ids, logits_to_keep=1, **case.routing)


def decoder(case: Case, ids: Tensor) -> Callable[[], Tensor]:
    """A call that runs one decode step after `ids` and leaves the cache as it was."""
    cache = case.model(input_ids=ids, logits_to_keep=1, use_cache=True, **case.routing).past_key_values
    token = ids[:, -1:]

    def step() -> Tensor:
        logits = case.model(input_ids=token, past_key_values=cache, use_cache=True, **case.routing).logits
        cache.crop(-1)
        return logits

    return step


def generation(case: Case, ids: Tensor, new: int) -> Callable[[], object]:
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return lambda: case.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **case.routing)


def measure(
    console: Console, args: argparse.Namespace, log: Log, bare: Any, cases: list[Case], ids: Tensor, adapter_bytes: int
) -> None:
    """Time each case in turns with the bare model, or what it is beside, print a table and write the lines.

    `bound` is what no serving can beat that leaves the base as it is: 1 + the time to stream the batch's
    adapters once, or what of them is more, over the time of the bare model or the other case. `least` is what none can
    beat that computes nothing but the linears in another way, with fused="always" decode steps' attention too: at the
    bounds of `Linears`, adapters included.
    """
    weights = sum(p.nbytes for p in bare.parameters())
    stream = streaming_read(min(weights + adapter_bytes * max(case.adapters for case in cases), 2**30))
    console.print(
        f"weights {weights / 2**20:.0f} MiB, an adapter {adapter_bytes / 2**20:.1f} MiB; streaming read "
        f"of all of it {stream / 1e9:.1f} GB/s, {torch.get_num_threads()} threads"
    )
    linears = Linears(bare, stream)
    phases: dict[str, tuple[Callable[[Case], Callable[[], object]], int]] = {
        "decode step": (lambda case: decoder(case, ids), 4 * args.repeats),
        "prefill": (lambda case: prefill(case, ids), args.repeats),
        "generate": (lambda case: generation(case, ids, args.new), max(args.repeats // 2, 2)),
    }
    phases = {phase: phases[phase] for phase in args.phases}
    other = "that of adapters in the model's dtype" if args.wide else "the bare model's"
    table = Table(title=f"{len(ids)} rows: time over {other} (median, 20-80 % quantiles)")
    for column in ("case", *phases):
        table.add_column(column)
    rows: dict[str, list[str]] = {case.name: [] for case in cases}
    with torch.inference_mode():
        for phase, (make, repeats) in phases.items():
            calls = linears.calls(phase, ids, args.new)
            library = sum(count * linears.seconds(*tokens) for tokens, count in calls.items())
            attention = linears.attention(phase, ids, args.new) if args.fused == "always" else (0.0, 0.0)
            for case in cases:
                if phase == "generate" and not case.generates:
                    rows[case.name].append("-")
                    continue
                with console.status(f"{phase}: {case.name}"):
                    bare_times, times = alternate(make(case.beside or Case("bare", bare)), make(case), repeats)
                ratio, low, high = quantiles([mine / its for mine, its in zip(times, bare_times, strict=True)])
                reads = args.new if phase == "generate" else 1
                bound = 1 + case.adapters * adapter_bytes * reads / stream / quantiles(bare_times)[0]
                rank = args.rank if case.adapters else 0
                spent = sum(
                    count * linears.least(*tokens, rank, case.adapters * adapter_bytes)
                    for tokens, count in calls.items()
                )
                spent += attention[1]
                its = quantiles(bare_times)[0]
                least = max(its - library - attention[0] + spent, spent) / its if case.beside is None else None
                told = f", least {least:.2f}" if least is not None else ""
                rows[case.name].append(
                    f"{ratio:.2f} ({low:.2f}-{high:.2f}), {quantiles(times)[0] * 1e3:.0f} ms, bound {bound:.2f}{told}"
                )
                log.write(
                    batch=len(ids),
                    case=case.name,
                    phase=phase,
                    adapters=case.adapters,
                    ratio=ratio,
                    ratio_q20=low,
                    ratio_q80=high,
                    seconds=quantiles(times),
                    bare_seconds=quantiles(bare_times),
                    byte_bound_ratio=bound,
                    least_ratio=least,
                    linears_seconds=library,
                    attention_seconds=attention[0],
                    multiply_adds_per_s=linears.peak,
                    adapter_bytes=case.adapters * adapter_bytes,
                    weight_bytes=weights,
                    stream_bytes_per_s=stream,
                    repeats=repeats,
                )
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def name_of(args: argparse.Namespace) -> str:
    if args.smoke:
        return "tiny random Llama"
    return f"random Llama, 8 layers of {args.width}" if args.width else args.model or "SmolLM2-135M-Instruct"


def alternate(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Times of two calls taken in turns, each after one call to warm up."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


if __name__ == "__main__":
    main()
