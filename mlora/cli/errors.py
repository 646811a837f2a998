"""What becomes of errors on the command line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


def _show_warning(message: Warning | str, *_: Any) -> None:
    typer.echo(f"mlora: warning: {' '.join(str(message).split())}", err=True)


class InputError(ValueError):
    """What the user handed over is wrong: exit code 2. Other failures exit with 1."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an expected failure into one line on stderr and an exit code, and warnings into a line each."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield
    except BrokenPipeError:  # who read the output has enough: click ends the program without a word
        raise
    except (OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError) as error:
        # str() of a KeyError puts quotes around its message.
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        line = " ".join(message.split()) or type(error).__name__
        typer.echo(f"mlora: error: {line}", err=True)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None
    except KeyboardInterrupt:
        typer.echo("mlora: interrupted", err=True)
        raise typer.Exit(130) from None


@contextmanager
def as_input_errors(what: str = "") -> Iterator[None]:
    """Turn what mlora refuses into InputErrors, with `what` in front."""
    from mlora.errors import MloraError

    try:
        yield
    except MloraError as error:
        raise InputError(f"{what}{error}") from None
