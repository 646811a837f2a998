"""The CPU operators for aarch64, on a machine that is none: csrc/cpu is compiled, and the scalar kernels run in qemu on
the cases that aarch64.cpp reads. Each result is judged against the fp64 loop, and has the bits of the kernels here.

    MLORA_CPU_ISA=scalar python tests/aarch64.py    with Debian's g++-aarch64-linux-gnu and qemu-user-static

What it leaves out: the operators' own lines around the kernels, which need torch for aarch64, and threads.
"""

from __future__ import annotations

import platform
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from op_cases import MIX, ROUTINGS, Case, check, turned
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from mlora.ops import dispatch, reference

ROOT = Path(__file__).resolve().parent.parent
COMPILER, RUNNER = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g0",
    "-ffp-contract=off",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
FLAGS += [f"-I{path}" for path in (ROOT / "csrc" / "cpu", *include_paths(), sysconfig.get_path("include"))]
APPLY, SCALE_INPUT, TURN_OUTPUT, MERGE = range(4)  # of aarch64.cpp
TYPES = [  # of rows and of the arena, as csrc/common.h counts them
    (torch.float32, False),
    (torch.float16, False),
    (torch.bfloat16, False),
    (torch.float16, True),
    (torch.bfloat16, True),
]


class Asked(NamedTuple):
    name: str
    blocks: bytes  # what aarch64.cpp reads
    here: Tensor  # what the same kernels give on this machine
    oracle: Tensor
    ref: Tensor


def blocks(op: int, types: int, case: Case, plan: Tensor, x: Tensor, base: Tensor | None, y: Tensor) -> bytes:
    tokens = 1 if op == MERGE else len(x)
    head = [op, types, tokens, case.width_in, case.width_out, case.arena.element_size()]
    parts = [np.array(head, dtype=np.int64).tobytes()]
    for tensor in (case.arena, case.table, plan, x, base, y):
        raw = b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()
        parts += [np.int64(len(raw)).tobytes(), raw]
    return b"".join(parts)


def cases() -> Iterator[Asked]:
    for types, (dtype, wide) in enumerate(TYPES):
        kind = f"{str(dtype)[6:]}{' by float32' * wide}"
        for ranks, width_in, width_out in [
            ((1, 3, 2), 1, 1),
            ((16, 3, 20), 20, 855),
            ((16, 1, 0), 2049, 20),
            ((16, 8, 4), 576, 576),
        ]:
            case = Case(ranks, width_in, width_out, dtype, gains=True, shifts=True, wide=wide)
            for routing, (recipes, length) in ROUTINGS.items():
                rows = len(recipes) * length
                if not rows:
                    continue
                x, y, plan = case.randn(rows, width_in), case.randn(rows, width_out), case.plan(recipes)
                for base in (None, case.randn(rows, width_out)):
                    given = (base, x, case.arena, case.table, plan)
                    here = y.clone()
                    dispatch.apply_(here, *given)
                    yield Asked(
                        f"apply, {kind}, {width_in}x{width_out}, {routing}, base {base is not None}",
                        blocks(APPLY, types, case, plan, x, base, y),
                        here,
                        case.oracle(y, base, x, recipes),
                        reference.apply(y, *given),
                    )
            yield merged(types, Case(ranks, width_in, width_out, dtype, gains=True, in_gains=True, wide=wide), kind)
        for width, shapes in [
            (24, ((4, 1), None, (2, 3))),
            (855, ((15, 1), (3, 5), (171, 5))),
            (576, ((2, 32), (64, 1), (576, 1))),
        ]:
            case = Case((1, 0, 3), width, width, dtype, in_gains=True, turns=shapes, wide=wide)
            yield from turns(types, case, kind)


def merged(types: int, case: Case, kind: str) -> Asked:
    plan, source = case.plan([MIX], spare=0), case.randn(case.width_out, case.width_in)
    oracle = source.double()
    for slot, weight in MIX:
        adapter, weight = case.adapters[slot], float(np.float32(weight))
        if "a" in adapter:
            oracle = oracle + weight * adapter["scale"] * adapter["b"].T @ adapter["a"]
        if "gain" in adapter:
            oracle = oracle + weight * (adapter["gain"][:, None] + adapter["in_gain"]) * source.double()
    here, ref = source.clone(), source.clone()
    dispatch.merge_(here, None, case.arena, case.table, plan)
    reference.merge_(ref, None, case.arena, case.table, plan)
    empty = torch.zeros_like(source)
    return Asked(
        f"merge, {kind}, {source.shape}", blocks(MERGE, types, case, plan, source, None, empty), here, oracle, ref
    )


def turns(types: int, case: Case, kind: str) -> Iterator[Asked]:
    recipes, length = ROUTINGS["prefill"]
    plan, tokens = case.plan(recipes), len(recipes) * length
    x, y = case.randn(tokens, case.width_in), case.randn(tokens, case.width_in)
    given, empty = (case.arena, case.table, plan), torch.zeros_like(x)

    def oracle(add: Tensor, name: str) -> Tensor:
        out = add.double().clone()
        for row, recipe in enumerate(recipes):
            t = slice(row * length, (row + 1) * length)
            for slot, weight in recipe:
                weight, adapter = float(np.float32(weight)), case.adapters[slot]
                if name == "in_turn" and "in_gain" in adapter:
                    out[t] += weight * adapter["in_gain"] * x[t].double()
                if name in adapter:
                    out[t] += weight * turned(adapter[name], adapter["shape"][1], x[t])
        return out

    asked: dict[str, tuple[bytes, Callable[[Any], Tensor], Tensor]] = {
        "in_turn": (
            blocks(SCALE_INPUT, types, case, plan, x, None, empty),
            lambda op: op.scale_input(x, *given),
            x,
        ),
        "turn": (
            blocks(TURN_OUTPUT, types, case, plan, x, y, empty),
            lambda op: op.turn_output(y, x, *given),
            y,
        ),
    }
    for name, (written, call, added) in asked.items():
        yield Asked(f"{name}, {kind}, {case.width_in}", written, call(dispatch), oracle(added, name), call(reference))


def build(folder: Path) -> Path:
    """Compiles everything; links the driver, of the kernels alone."""
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    for path in [*sources, ROOT / "tests" / "aarch64.cpp"]:
        subprocess.run([COMPILER, *FLAGS, "-c", str(path), "-o", str(folder / f"{path.stem}.o")], check=True)
    driver = folder / "driver"
    linked = [str(folder / "aarch64.o"), str(folder / "isa_scalar.o")]
    subprocess.run([COMPILER, "-static", *linked, "-o", str(driver)], check=True)
    return driver


def main() -> None:
    assert torch.ops.mlora.isa() == 0, "set MLORA_CPU_ISA=scalar"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        driver = build(folder)
        asked = list(cases())
        (folder / "cases").write_bytes(b"".join(one.blocks for one in asked))
        subprocess.run([RUNNER, str(driver), str(folder / "cases"), str(folder / "results")], check=True)
        results, at = (folder / "results").read_bytes(), 0
    for one in asked:
        size = one.here.numel() * one.here.element_size()
        got = torch.frombuffer(bytearray(results[at : at + size]), dtype=one.here.dtype).view(one.here.shape)
        at += size
        try:
            check(got, one.oracle, one.ref)
            assert torch.equal(got.view(torch.uint8), one.here.view(torch.uint8)), "other bits than here"
        except AssertionError as error:
            raise AssertionError(f"{one.name}: {error}") from error
    assert at == len(results)
    print(f"aarch64: {len(asked)} cases within the oracle's bounds, with the bits of {platform.machine()}")


if __name__ == "__main__":
    main()
