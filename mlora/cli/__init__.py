"""The `mlora` command, a file a command. Torch and transformers are imported inside the commands, so `--help` stays
quick."""

from __future__ import annotations

import typer

from . import bench, demo, generate, inspect, merge

app = typer.Typer(
    name="mlora",
    help="One batch, many LoRA adapters: a multi-adapter runtime for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo.demo, generate.generate, inspect.inspect, merge.merge, bench.bench):
    app.command()(command)
