"""`mlora bench`: the benchmarks of a source checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import InputError, one_line_errors

EVERY = (
    "operators", "attention", "generate", "train", "runs", "merge", "kinds", "load", "tiers", "serve", "loopback",
    "parallel", "plot",
)  # fmt: skip


def bench(
    what: Annotated[
        str,
        typer.Argument(help=f"{', '.join(EVERY)} or all."),
    ] = "all",
    smoke: Annotated[bool, typer.Option("--smoke", help="A few seconds, to see that it runs.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSONL files and plots.")] = Path("bench/results"),
) -> None:
    """Run the benchmarks of a source checkout."""
    with one_line_errors():
        folder = Path(__file__).resolve().parents[2] / "bench"
        steps = EVERY if what == "all" else (what,)
        if not set(steps) <= set(EVERY):
            raise InputError(f"bench {what!r}: wanted {', '.join(EVERY)} or all")
        if not (folder / "operators.py").is_file():
            raise InputError(f"{folder} is not there: benchmarks need a source checkout (git clone, pip install -e .)")
        out.mkdir(parents=True, exist_ok=True)
        for number, step in enumerate(steps, start=1):
            typer.echo(f"[{number}/{len(steps)}] bench/{step}.py", err=True)
            target = out if step == "plot" else out / f"{step}.jsonl"
            command = [sys.executable, str(folder / f"{step}.py"), "--out", str(target)]
            if step == "plot":
                command += [str(file) for file in sorted(out.glob("*.jsonl"))]
            elif smoke:
                command.append("--smoke")
            code = subprocess.call(command)
            if code:
                raise RuntimeError(f"bench/{step}.py exited with {code}")
