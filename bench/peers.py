"""The LoRA kernels of other systems, counted: run in Triton's interpreter, by their own launchers.

    python bench/peers.py [--smoke] [--out bench/results/peers.jsonl]

The packages are downloaded from PyPI into build/peers, 375 MB, and not installed: only the kernels' own modules are
unpacked and imported; the platform, logging and environment modules that they import are replaced by constants.

- vLLM: `lora_shrink` and `lora_expand` with `LoRAKernelMeta`, default configuration, 64 slots at the largest rank.
- SGLang: the `csgmv` backend's chunked kernels, eager, segments of at most 16 tokens as by default, no tuned file.
- PolyLoRA: `sgmv_lora_a_fwd` and `sgmv_lora_b_fwd`.

Interpreting 4096 x 14336 for 64 slots and 2048 tokens would take hours. Every count of a launch is a polynomial, linear
in each of the input's width (shrink) or the output's (expand), the number of slots, in prefill the tokens of an adapter
and for vLLM, whose kernels know the largest rank alone, that rank, as long as these are multiples of the tiles. So
small problems are interpreted, two values of each, and extended to the real ones. `--check` compares with whole
problems, where every count must be equal.

A ratio is that of sectors, metadata included, to x + y read and written + each adapter once at its true rank, in 16
bits. bench/gpu_table.py prints mlora's counts beside these.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # bench/gpu_peers.py runs the same on a GPU
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from interpreted import Counts, Launch, counting  # noqa: E402
from torch import Tensor  # noqa: E402

VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23", "polylora": "0.1.1"}
SLOTS = 64
RANKS = (8, 16, 32, 64, 96, 128)  # of a mixed batch, in turn
DECODE = ((16, 1), (16, 8), (16, 16), (64, 1), (64, 8), (64, 16), (64, 64))  # tokens, adapters
PREFILL = ((2048, 1), (2048, 8))
WIDTH, OUTS = 4096, (4096, 14336)
SMALL = (256, 512)  # widths
WORKLOADS = list(itertools.product((16, 64, "mixed"), (*DECODE, *PREFILL)))
CHECKED = ((4096, 16, 64, 64), (14336, 64, 16, 1), (4096, "mixed", 16, 8), (4096, 16, 2048, 8))
COLUMNS = ("in", "out", "rank", "tokens", "adapters", "launches", "torch_ops", "syncs", "programs", "idle", "narrowest")
COLUMNS = (*COLUMNS, "float_atomics", "ratio")


class Batch:
    """Tokens of a workload, sorted by adapter: token t has adapter t * adapters // tokens."""

    def __init__(
        self, width: int, out: int, rank: Any, tokens: int, adapters: int, slots: int = SLOTS, device: str = "cpu"
    ) -> None:
        self.width, self.out, self.tokens, self.adapters, self.slots = width, out, tokens, adapters, slots
        self.device = device
        self.ranks = [RANKS[i % len(RANKS)] if rank == "mixed" else rank for i in range(slots)]
        self.max_rank = max(RANKS) if rank == "mixed" else rank
        self.mapping = [t * adapters // tokens for t in range(tokens)]
        self.x, self.y = self.empty(tokens, width).fill_(1), self.empty(tokens, out).fill_(1)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float16, device=self.device)

    @property
    def prefill(self) -> bool:
        return self.tokens > 64

    @property
    def bound(self) -> int:
        ranks = sum(self.ranks[: self.adapters])
        return 2 * (self.tokens * (self.width + 2 * self.out) + ranks * (self.width + self.out))


@dataclass
class Ready:
    """A system's LoRA of one linear, y += B A x with the A and B of each token's slot, ready to be called.

    Args:
        a: [slots, rank, in], b: [slots, out, rank], zeros; as the system lays them, perhaps a view. x and y are the
            batch's. host: tensors that are in host memory where the call is meant to run.
    """

    call: Callable[[], object]
    a: Tensor
    b: Tensor
    host: tuple[Tensor, ...] = ()


Prepare = Callable[[Batch], Ready]
Run = Callable[[Batch], Counts]


def counted(prepare: Prepare) -> Run:
    def run(b: Batch) -> Counts:
        ready = prepare(b)
        with counting([b.x, b.y, ready.a, ready.b], host=list(ready.host)) as counts:
            ready.call()
        return counts

    return run


def module(name: str, **contents: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(contents)
    sys.modules[name] = made
    return made


def packages(folder: Path, *names: str) -> None:
    """Packages whose own __init__ is not run."""
    for name in names:
        module(name, __path__=[str(folder.joinpath(*name.split(".")))])


def vllm(folder: Path) -> Prepare:
    packages(folder, "vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops", "vllm.utils")
    sys.modules["vllm"].envs = module(  # type: ignore[attr-defined]
        "vllm.envs", VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None, VLLM_LORA_ENABLE_DUAL_STREAM=False,
        VLLM_LORA_DISABLE_PDL=True,
    )  # fmt: skip
    quiet = types.SimpleNamespace(warning_once=print, info_once=print)
    module("vllm.logger", init_logger=lambda name: types.SimpleNamespace(**dict.fromkeys(vars(quiet), lambda *a: None)))
    module("vllm.platforms", current_platform=types.SimpleNamespace(is_cuda=lambda: False))
    module("vllm.triton_utils", tl=tl, triton=triton)
    module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)

    def unregistered(**_: Any) -> None:
        raise AttributeError

    def on_device(values: Any, dtype: Any, device: Any) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    module("vllm.utils.torch_utils", direct_register_custom_op=unregistered, async_tensor_h2d=on_device)
    ops = "vllm.lora.ops.triton_ops."
    shrink = importlib.import_module(ops + "lora_shrink_op").lora_shrink
    expand = importlib.import_module(ops + "lora_expand_op").lora_expand
    meta_class = importlib.import_module(ops + "lora_kernel_metadata").LoRAKernelMeta

    def prepare(b: Batch) -> Ready:
        a, bs = b.empty(b.slots, 1, b.max_rank, b.width).zero_(), b.empty(b.slots, 1, b.out, b.max_rank).zero_()
        meta = meta_class.make(b.slots, b.tokens, b.device)
        meta.prepare_tensors(torch.tensor(b.mapping, dtype=torch.int32, device=b.device))
        args = meta.meta_args(b.tokens, False)

        def call() -> None:
            buffer = torch.empty(1, b.tokens, b.max_rank, dtype=torch.float32, device=b.device)
            shrink(b.x, [a], buffer, *args, 1.0)
            expand(buffer, [bs], b.y, *args, add_inputs=True)

        return Ready(call, a[:, 0], bs[:, 0], (meta.no_lora_flag_cpu, meta.default_num_active_loras_cpu))

    return prepare


def sglang(folder: Path) -> Prepare:
    names = "sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.srt", "sglang.srt.lora"
    packages(folder, *names, "sglang.kernels.ops.lora", "sglang.kernels.ops.lora.dense")
    off = types.SimpleNamespace(get=lambda: False)
    switches = types.SimpleNamespace(SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off)
    module("sglang.srt.environ", envs=switches)
    module("sglang.srt.lora.utils", LoRABatchInfo=object)
    module("sglang.srt.utils", cached_triton_kernel=lambda key: lambda kernel: kernel, get_device_name=lambda: "none")
    ops = "sglang.kernels.ops.lora.dense."
    shrink = importlib.import_module(ops + "chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
    expand = importlib.import_module(ops + "chunked_sgmv_expand").chunked_sgmv_lora_expand_forward

    def prepare(b: Batch) -> Ready:
        def ints(values: list[int] | range) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=b.device)

        chunk = 16
        segments = [
            (slot, min(chunk, b.mapping.count(slot) - at))
            for slot in range(b.adapters)
            for at in range(0, b.mapping.count(slot), chunk)
        ]
        starts = [0]
        for _, length in segments:
            starts.append(starts[-1] + length)
        info = types.SimpleNamespace(
            max_len=chunk, num_segments=len(segments), use_cuda_graph=False,
            seg_indptr=ints(starts), weight_indices=ints([slot for slot, _ in segments]), lora_ranks=ints(b.ranks),
            scalings=torch.ones(b.slots, device=b.device), permutation=ints(range(b.tokens)),
        )  # fmt: skip
        a, bs = b.empty(b.slots, b.max_rank, b.width).zero_(), b.empty(b.slots, b.out, b.max_rank).zero_()
        offsets, host_offsets = ints([0, b.out]), torch.tensor([0, b.out], dtype=torch.int32)

        def call() -> None:
            v = shrink(b.x, a, info, 1)
            expand(v, bs, info, offsets, b.out, b.y, slice_offsets_cpu=host_offsets)

        return Ready(call, a, bs, (host_offsets,))

    return prepare


def polylora(folder: Path) -> Prepare:
    packages(folder, "polylora")
    sgmv = importlib.import_module("polylora.sgmv")

    def prepare(b: Batch) -> Ready:
        rows = b.adapters if b.prefill else b.tokens  # of the batch; a prefill is a row an adapter
        a, bs = b.empty(b.slots, b.width, b.max_rank).zero_(), b.empty(b.slots, b.max_rank, b.out).zero_()
        ranks = torch.tensor(b.ranks, dtype=torch.int32, device=b.device)
        scales = torch.ones(b.slots, device=b.device)
        lengths = torch.full((rows,), b.tokens // rows, dtype=torch.int32, device=b.device)
        slots = torch.tensor(b.mapping[:: b.tokens // rows], device=b.device)
        x, y = b.x.view(rows, -1, b.width), b.y.view(rows, -1, b.out)

        def call() -> None:
            v = sgmv.sgmv_lora_a_fwd(x, a, lengths, slots, ranks)
            sgmv.sgmv_lora_b_fwd(v, bs, lengths, slots, ranks, scales, y)

        return Ready(call, a.mT, bs.mT)

    return prepare


SYSTEMS: dict[str, Callable[[Path], Prepare]] = {"vllm": vllm, "sglang": sglang, "polylora": polylora}
PADDED = frozenset(("vllm",))  # systems whose kernels know the largest rank alone


def fetch(name: str) -> Path:
    """A folder with the Python files of a system's wheel, which is downloaded where it is not there."""
    folder = ROOT / "build/peers" / f"{name}-{VERSIONS[name]}"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder.parent)]
        subprocess.run([*pip, f"{name}=={VERSIONS[name]}"], check=True)
        with zipfile.ZipFile(next(folder.parent.glob(f"{name}-{VERSIONS[name]}-*.whl"))) as wheel:
            wheel.extractall(folder, [file for file in wheel.namelist() if file.endswith(".py")])
    return folder


def once(run: Run) -> Run:
    """`run`, which counts the same problem once."""
    seen: dict[Any, Counts] = {}

    def counted(b: Batch) -> Counts:
        key = (b.width, b.out, *b.ranks, b.tokens, b.adapters)
        if key not in seen:
            seen[key] = run(b)
        return seen[key]

    return counted


def extended(run: Run, padded: bool, rank: Any, tokens: int, adapters: int) -> Callable[[int], Counts]:
    """What `run` counts of a workload, as a function of the output's width, from small problems; see above."""
    prefill, most = tokens > 64, max(RANKS) if rank == "mixed" else rank
    each = max(64, 128 // adapters)  # of prefill: vLLM has another form below 128 tokens
    sizes = (
        SMALL,
        (adapters, adapters + 1) if adapters < SLOTS else (SLOTS,),
        (each, each + 64) if prefill else (tokens // adapters,),
        (16, 32) if padded and most > 16 else (rank,),
    )
    small = {
        (width, slots, each, r): run(Batch(width, width, r, each * adapters, adapters, slots))
        for width, slots, each, r in itertools.product(*sizes)
    }

    def counts(out: int) -> Counts:
        total = Counts()
        for size, part in small.items():
            for i, launch in enumerate(part.launches):
                goal = (WIDTH if i == 0 else out, SLOTS, tokens // adapters, most if padded else rank)
                weight = Fraction(1)  # Lagrange's, of two points in each direction
                for at, points, wanted in zip(size, sizes, goal, strict=True):
                    for other in points:
                        weight *= Fraction(wanted - other, at - other) if other != at else 1
                if len(total.launches) == i:
                    total.launches.append(Launch())
                for name, value in vars(launch).items():
                    setattr(total.launches[i], name, getattr(total.launches[i], name) + weight * value)
            scale = Fraction(tokens, size[2] * adapters) * (Fraction(most, size[3]) if padded else 1)
            filled = int(part.filled * scale)
            total.filled, total.torch_ops, total.syncs = filled, part.torch_ops, part.syncs
        assert len({(part.torch_ops, part.syncs) for part in small.values()}) == 1, "torch's part depends on the sizes"
        for launch in total.launches:
            for name, value in vars(launch).items():
                assert value.denominator == 1
                setattr(launch, name, int(value))
        return total

    return counts


def check(name: str, run: Run, padded: bool, out: int, rank: Any, tokens: int, adapters: int) -> None:
    """Exit unless the whole problem counts as `extended` says."""
    whole = run(Batch(WIDTH, out, rank, tokens, adapters))
    said = extended(run, padded, rank, tokens, adapters)(out)
    if whole != said:
        sys.exit(f"{name} {out} {rank} {tokens} {adapters}: counted {whole}, extended to {said}")
    print(f"{name}: {WIDTH} -> {out}, rank {rank}, {tokens} tokens, {adapters} adapters: exact", flush=True)


def records(name: str, run: Run, padded: bool, rank: Any, tokens: int, adapters: int) -> list[dict[str, Any]]:
    """Of one workload, one for each output width."""
    counts, made = extended(run, padded, rank, tokens, adapters), []
    for out in OUTS:
        c, bound = counts(out), Batch(WIDTH, out, rank, tokens, adapters).bound
        total = {n: sum(getattr(launch, n) for launch in c.launches) for n in vars(Launch())}
        made.append(
            {
                "system": name, "in": WIDTH, "out": out, "rank": rank, "tokens": tokens, "adapters": adapters,
                "launches": len(c.launches), "torch_ops": c.torch_ops, "syncs": c.syncs,
                "programs": total["programs"], "idle": total["programs"] - total["useful"],
                "narrowest": min(launch.useful for launch in c.launches), "float_atomics": total["float_atomics"],
                "ratio": round(32 * (total["sectors"] + c.filled) / bound, 4),
            }
        )  # fmt: skip
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="two workloads")
    parser.add_argument("--check", action="store_true", help="only compare with whole problems, which takes minutes")
    args = parser.parse_args()
    systems = {name: once(counted(SYSTEMS[name](fetch(name)))) for name in VERSIONS}
    if args.check:
        for name, run in systems.items():
            for case in CHECKED:
                check(name, run, name in PADDED, *case)
        return 0
    done: list[dict[str, Any]] = []
    print(" ".join(("system", *COLUMNS)))
    for rank, (tokens, adapters) in itertools.product((16,), ((16, 8), (16, 16))) if args.smoke else WORKLOADS:
        for name, run in systems.items():
            for r in records(f"{name} {VERSIONS[name]}", run, name in PADDED, rank, tokens, adapters):
                done.append(r)
                print(name.ljust(14), *(f"{r[column]!s:>{len(column)}}" for column in COLUMNS), flush=True)
        if args.out:
            args.out.write_text("".join(json.dumps(r) + "\n" for r in done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
