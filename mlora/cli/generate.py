"""`mlora generate`: a file of prompts, each under its own adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import InputError, one_line_errors
from .lines import WRITTEN, copied_fields, read_lines
from .models import check_device
from .options import (
    AdapterOption,
    ApproximateOption,
    DenseOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    IgnoreOption,
    ModelOption,
    PickleOption,
    StrictOption,
    parse_size,
)
from .output import Output, open_output
from .progress import Progress, counted
from .prompts import Prompts, encode_lines
from .served import choose


def generate(
    input: Annotated[
        Path,
        typer.Option(
            help='JSON lines: {"prompt": TEXT, "adapter": NAME | null | {NAME: WEIGHT} | MERGE}, or "messages": '
            '[{"role": ..., "content": ...}] in place of "prompt". - is stdin.'
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help='Where to write the same lines with a "completion" each, when all are there. - is stdout.'),
    ],
    adapter: AdapterOption = None,
    model: ModelOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of a model, its adapters and merges, in place of --model and --adapter. Lines without "
            '"adapter" get its active one.',
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per generate() call, whatever their adapters.")] = 16,
    continuous: Annotated[
        bool,
        typer.Option(
            "--continuous",
            help="Batch continuously: --batch-size rows of any length run at once, and one that is done makes room for "
            "the next.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most, of each completion.")] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Feed prompts as they are, without the chat template.")] = False,
    base_tokenizer: Annotated[
        bool, typer.Option("--base-tokenizer", help="Ignore the tokenizers and chat templates that adapters bring.")
    ] = False,
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--do-sample/--greedy", help="Default: greedy, unless an option of sampling is given.", show_default=False
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; above 0.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(help="Of sampling; above 0, at most 1.", show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Of sampling.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampling.", show_default=False)] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    approximate: ApproximateOption = None,
    dense: DenseOption = False,
    strict: StrictOption = False,
    ignore: IgnoreOption = None,
    allow_pickle: PickleOption = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="For adapters on the device: bytes, or 512MiB, 2GiB, 2GB. Batches that need more are split. Default: "
            "a quarter of what is free, or half the size of the model where that is more.",
            show_default=False,
        ),
    ] = None,
    max_adapters: Annotated[
        int, typer.Option(min=1, help="How many adapters are on the device at once. Batches that need more are split.")
    ] = 256,
    force: ForceOption = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on, with the same options, after the answers in OUTPUT.part of a run that broke off."
        ),
    ] = False,
) -> None:
    """Complete the prompts of a file, each under its own adapter, in mixed batches.

    A MERGE is {"ids": [NAME, ...], "weights": [...], "merge_strategy": "ties", "density": 0.5}.
    """
    with one_line_errors():
        options = _options(max_new_tokens, do_sample, temperature, top_p, top_k)
        if seed is not None and not options["do_sample"]:
            raise InputError("--seed: greedy decoding draws nothing; wanted --do-sample beside it")
        room = None if memory is None else parse_size(memory)
        input, output = input.expanduser(), output.expanduser()
        served = choose(config, model, "--model", adapter, approximate, dense, strict, ignore, allow_pickle)
        lines = read_lines(input, served.names)
        matters = {
            "--model": model,
            "--adapter": adapter,
            "--config": None if config is None else str(config),
            "--approximate": approximate,
            "--dense": dense,
            "--strict": strict,
            "--ignore": ignore,
            "--raw": raw,
            "--base-tokenizer": base_tokenizer,
            "--dtype": dtype,
            "--seed": seed,
            "--batch-size": batch_size if options["do_sample"] and not continuous else None,
            "--continuous": continuous if options["do_sample"] else None,
            **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
        }
        with open_output(output, input, lines, force, resume, matters) as out:
            progress = Progress()
            if copied := copied_fields(lines):
                progress.note(f"copied to the output, and not read: {', '.join(copied)}")
            served.check_entries([line.get("adapter") for line in lines], max_adapters, progress)
            check_device(device, dtype)
            entries = [line.get("adapter", served.active) for line in lines]
            with progress.step("reading adapters and tokenizers"):
                served.read()
                prompts = encode_lines(lines, entries, served, raw, base_tokenizer)
            with progress.step(f"loading the model{f' {served.model}' if served.model else ''}"):
                loaded = served.load(device, dtype)
            with progress.step(f"loading {counted(len(served.names), 'adapter')}"):
                served.patch(loaded, memory=room, max_adapters=max_adapters)
            with progress.counting("completions", out.done, len(lines)) as count:
                if continuous:
                    from .continuous import answer_all

                    answer_all(loaded, prompts, lines, options, seed, batch_size, out, count)
                for start in range(out.done, len(lines), batch_size):
                    _answer(loaded, prompts, lines, slice(start, start + batch_size), options, seed, out)
                    count(out.done)
        progress.note(f"{counted(len(lines), 'completion')} in {'stdout' if output == Path('-') else output}")


def _options(
    max_new_tokens: int, do_sample: bool | None, temperature: float | None, top_p: float | None, top_k: int | None
) -> dict[str, Any]:
    """For `model.generate`."""
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    if given and do_sample is False:
        raise InputError(f"--greedy excludes --{next(iter(given)).replace('_', '-')}, which is of sampling")
    if temperature is not None and not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(f"--temperature {temperature:g}: wanted a number above 0; --greedy is what 0 stands for")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p:g}: wanted a number above 0, at most 1")
    return {"max_new_tokens": max_new_tokens, "do_sample": bool(do_sample or given), **given}


def _answer(
    model: Any, prompts: Prompts, lines: list[dict[str, Any]], rows: slice, options: Any, seed: int | None, out: Output
) -> None:
    """Complete some of the lines, and write them."""
    from .chat import complete

    if seed is not None:
        import torch

        torch.manual_seed(seed + rows.start)  # so that what is resumed is drawn as it would have been
    answers = complete(model, prompts.ids[rows], prompts.entries[rows], prompts.pad, **options)
    texts = [
        tokenizer.decode(answer, skip_special_tokens=True)
        for tokenizer, answer in zip(prompts.tokenizers[rows], answers, strict=True)
    ]
    out.write([{**line, WRITTEN: text} for line, text in zip(lines[rows], texts, strict=True)])
