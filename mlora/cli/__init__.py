"""The `mlora` command, a file a command. What takes long to import is imported inside the commands, when they have
checked what they were given."""

from __future__ import annotations

from typing import Annotated

import typer

from . import bench, demo, evaluate, generate, inspect, merge, serve, train
from .errors import InputError as InputError
from .lines import read_lines as _read_lines  # noqa: F401

app = typer.Typer(
    name="mlora",
    help="One batch, many LoRA adapters: a multi-adapter runtime for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from mlora import __version__

        typer.echo(f"mlora {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (
    demo.demo,
    generate.generate,
    serve.serve,
    train.train,
    evaluate.evaluate,
    inspect.inspect,
    merge.merge,
    bench.bench,
):
    app.command()(command)
