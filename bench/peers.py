"""The LoRA kernels of other systems, counted as ours are: run in Triton's interpreter, by their own launchers.

    python bench/peers.py FOLDER... [--smoke] [--out bench/results/peers.jsonl]

FOLDER: an unpacked wheel or source distribution of vllm, sglang or polylora. Of these only the kernels' own modules
are imported; the platform, logging and environment modules that they import are replaced by constants. What is run:

- vLLM: `lora_shrink` and `lora_expand` with `LoRAKernelMeta`, default configuration, 64 slots at the largest rank.
- SGLang: the `csgmv` backend's chunked kernels, eager, segments of at most 16 tokens as by default, no tuned file.
- PolyLoRA: `sgmv_lora_a_fwd` and `sgmv_lora_b_fwd`.
- mlora: `mlora.kernels.launch.apply_`, on the shape of a device of 132 multiprocessors.

A ratio is that of sectors, metadata included, to x + y read and written + each adapter once at its true rank, in 16
bits. bench/gpu_static.py prints the CUDA library's counts beside these.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from interpreted import Counts, counting  # noqa: E402
from torch import Tensor  # noqa: E402

SLOTS = 64
RANKS = (8, 16, 32, 64, 96, 128)  # of a mixed batch, in turn
SMOKE = ((4096, 16, 16, 8), (4096, 16, 64, 64))
# out, rank, tokens, adapters; `in` is 4096. The interpreter takes seconds to minutes for each.
WORKLOADS = [
    (4096, rank, tokens, adapters)
    for tokens, adapters in ((64, 1), (64, 64), (16, 8), (2048, 1), (2048, 8), (64, 8), (16, 1), (16, 16))
    for rank in (16, 64, "mixed")
]


class Batch:
    """Tokens of a workload, sorted by adapter: token t has adapter t * adapters // tokens."""

    def __init__(self, out: int, rank: Any, tokens: int, adapters: int) -> None:
        self.width, self.out, self.tokens, self.adapters = 4096, out, tokens, adapters
        self.ranks = [RANKS[i % len(RANKS)] if rank == "mixed" else rank for i in range(SLOTS)]
        self.max_rank = max(RANKS) if rank == "mixed" else rank
        self.mapping = [t * adapters // tokens for t in range(tokens)]
        self.x, self.y = torch.ones(tokens, self.width).half(), torch.ones(tokens, out).half()

    @property
    def bound(self) -> int:
        ranks = sum(self.ranks[: self.adapters])
        return 2 * (self.tokens * (self.width + 2 * self.out) + ranks * (self.width + self.out))


Run = Callable[[Batch], Counts]


def module(name: str, **contents: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(contents)
    sys.modules[name] = made
    return made


def packages(folder: Path, *names: str) -> None:
    """Packages whose own __init__ is not run."""
    for name in names:
        module(name, __path__=[str(folder.joinpath(*name.split(".")))])


def vllm(folder: Path) -> Run:
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
        return torch.tensor(values, dtype=dtype)

    module("vllm.utils.torch_utils", direct_register_custom_op=unregistered, async_tensor_h2d=on_device)
    ops = "vllm.lora.ops.triton_ops."
    shrink = importlib.import_module(ops + "lora_shrink_op").lora_shrink
    expand = importlib.import_module(ops + "lora_expand_op").lora_expand
    meta_class = importlib.import_module(ops + "lora_kernel_metadata").LoRAKernelMeta

    def run(b: Batch) -> Counts:
        a = torch.zeros(SLOTS, 1, b.max_rank, b.width).half()
        bs = torch.zeros(SLOTS, 1, b.out, b.max_rank).half()
        meta = meta_class.make(SLOTS, b.tokens, "cpu")
        meta.prepare_tensors(torch.tensor(b.mapping, dtype=torch.int32))
        args = meta.meta_args(b.tokens, False)
        with counting([b.x, b.y, a, bs], host=[meta.no_lora_flag_cpu, meta.default_num_active_loras_cpu]) as counts:
            buffer = torch.empty(1, b.tokens, b.max_rank, dtype=torch.float32)
            shrink(b.x, [a], buffer, *args, 1.0)
            expand(buffer, [bs], b.y, *args, add_inputs=True)
        return counts

    return run


def sglang(folder: Path) -> Run:
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

    def run(b: Batch) -> Counts:
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
            seg_indptr=torch.tensor(starts, dtype=torch.int32),
            weight_indices=torch.tensor([slot for slot, _ in segments], dtype=torch.int32),
            lora_ranks=torch.tensor(b.ranks, dtype=torch.int32), scalings=torch.ones(SLOTS),
            permutation=torch.arange(b.tokens, dtype=torch.int32),
        )  # fmt: skip
        a = torch.zeros(SLOTS, b.max_rank, b.width).half()
        bs = torch.zeros(SLOTS, b.out, b.max_rank).half()
        offsets = torch.tensor([0, b.out], dtype=torch.int32)
        with counting([b.x, b.y, a, bs]) as counts:
            v = shrink(b.x, a, info, 1)
            expand(v, bs, info, offsets, b.out, b.y, slice_offsets_cpu=offsets)
        return counts

    return run


def polylora(folder: Path) -> Run:
    packages(folder, "polylora")
    sgmv = importlib.import_module("polylora.sgmv")

    def run(b: Batch) -> Counts:
        rows = b.adapters if b.tokens == 2048 else b.tokens  # of the batch; a prefill is a row an adapter
        a = torch.zeros(SLOTS, b.width, b.max_rank).half()
        bs = torch.zeros(SLOTS, b.max_rank, b.out).half()
        ranks, scales = torch.tensor(b.ranks, dtype=torch.int32), torch.ones(SLOTS)
        lengths = torch.full((rows,), b.tokens // rows, dtype=torch.int32)
        slots = torch.tensor(b.mapping[:: b.tokens // rows])
        x, y = b.x.view(rows, -1, b.width), b.y.view(rows, -1, b.out)
        with counting([b.x, b.y, a, bs]) as counts:
            v = sgmv.sgmv_lora_a_fwd(x, a, lengths, slots, ranks)
            sgmv.sgmv_lora_b_fwd(v, bs, lengths, slots, ranks, scales, y)
        return counts

    return run


def mlora(b: Batch) -> Counts:
    from mlora.kernels import launch
    from mlora.kernels.config import Device
    from mlora.ops import layout
    from mlora.routing import plan_words

    table = torch.full((SLOTS, layout.TABLE_WIDTH), -1, dtype=torch.int64)
    table[:, layout.RANK] = 0
    at = 0
    for slot, rank in enumerate(b.ranks[: b.adapters]):
        table[slot, [layout.A, layout.B, layout.RANK]] = torch.tensor([at, at + rank * b.width, rank])
        at += rank * (b.width + b.out)
    arena = torch.zeros(at).half()
    plan = torch.from_numpy(plan_words([((slot, 1.0),) for slot in b.mapping]))
    launch.INTERPRETED = Device(132, 90)
    with counting([b.x, b.y, arena]) as counts:
        launch.apply_(b.y, None, b.x, arena, table, plan)
    return counts


SYSTEMS: dict[str, Callable[[Path], Run]] = {"vllm": vllm, "sglang": sglang, "polylora": polylora}


def version(folder: Path, name: str) -> str:
    """Of an unpacked wheel or source distribution, from its metadata."""
    for path in sorted([*folder.glob(f"{name}-*.dist-info/METADATA"), folder / "PKG-INFO"]):
        if path.exists():
            return next(line[9:].strip() for line in path.read_text().splitlines() if line.startswith("Version: "))
    return "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="two workloads")
    args = parser.parse_args()
    systems: dict[str, Run] = {"mlora (Triton)": mlora}
    for folder in args.folders:
        for name, prepare in SYSTEMS.items():
            if (folder / name).is_dir():
                systems[f"{name} {version(folder, name)}"] = prepare(folder.resolve())
    records = []
    print(
        "system            out    rank  tokens adapters  launches torch-ops syncs programs  idle narrowest  atomics",
        end="",
    )
    print("  ratio")
    for out, rank, tokens, adapters in SMOKE if args.smoke else WORKLOADS:
        for name, run in systems.items():
            batch = Batch(out, rank, tokens, adapters)
            c = run(batch)
            records.append(
                {
                    "system": name, "in": batch.width, "out": out, "rank": rank, "tokens": tokens,
                    "adapters": adapters, "launches": len(c.launches), "torch_ops": c.torch_ops, "syncs": c.syncs,
                    "programs": c.programs, "idle": c.idle, "narrowest": min(c.useful),
                    "float_atomics": c.float_atomics, "ratio": round(32 * c.sectors / batch.bound, 4),
                }
            )  # fmt: skip
            r = records[-1]
            print(
                f"{name:16} {out:6} {rank!s:>6} {tokens:6} {adapters:8} {r['launches']:9} {r['torch_ops']:9}"
                f" {r['syncs']:5} {r['programs']:8} {100 * r['idle'] / r['programs']:4.0f}% {r['narrowest']:9}"
                f" {r['float_atomics']:8} {r['ratio']:6.3f}",
                flush=True,
            )
        if args.out:
            args.out.write_text("".join(json.dumps(r) + "\n" for r in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
