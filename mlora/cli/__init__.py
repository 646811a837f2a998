"""The `mlora` command. Torch and transformers are imported inside the commands, so `--help` stays quick."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="mlora",
    help="One batch, many LoRA adapters: a multi-adapter runtime for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Hub id or folder; default: SmolLM2-135M-Instruct.", show_default=False),
]


class InputError(ValueError):
    """What the user handed over is wrong: exit code 2. Other failures exit with 1."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an expected failure into one line on stderr and an exit code."""
    try:
        yield
    except (OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError) as error:
        # str() of a KeyError puts quotes around its message.
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        line = " ".join(message.split()) or type(error).__name__
        typer.echo(f"mlora: error: {line}", err=True)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None
    except KeyboardInterrupt:
        typer.echo("mlora: interrupted", err=True)
        raise typer.Exit(130) from None


@app.command()
def demo(
    model: ModelOption = None,
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of PEFT adapter folders; default: examples/adapters.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    table: Annotated[
        bool, typer.Option("--table/--no-table", help="Also time it against the bare model and PEFT.")
    ] = True,
) -> None:
    """Answer one batch whose rows use different adapters, none, and a weighted mix; then time it."""
    with one_line_errors():
        from mlora.cli import demo as demo_module

        demo_module.run(model, adapters, max_new_tokens, table)


@app.command()
def generate(
    input: Annotated[
        Path, typer.Option(help='JSON lines: {"prompt": TEXT, "adapter": NAME | null | {NAME: WEIGHT} | MERGE}.')
    ],
    output: Annotated[Path, typer.Option(help='Where to write the same lines with a "completion" each.')],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A PEFT folder or hub id; repeatable.")
    ] = None,
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
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Feed prompts as they are, without the chat template.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="For adapters on the device: bytes, or 512MiB, 2GiB, 2GB; those of one batch have to fit. Default: "
            "half the size of the model, at least 64MiB.",
            show_default=False,
        ),
    ] = None,
    max_adapters: Annotated[int, typer.Option(min=1, help="How many adapters are on the device at once.")] = 256,
) -> None:
    """Complete the prompts of a file, each under its own adapter, greedily and in mixed batches.

    A MERGE is {"ids": [NAME, ...], "weights": [...], "merge_strategy": "ties", "density": 0.5}.
    """
    with one_line_errors():
        from rich.console import Console
        from rich.progress import Progress

        folders = _parse_adapters(adapter or [])
        known, active = set(folders), None
        if config is not None:
            known, active, model = _parse_config(config, model, folders)
        lines = _read_lines(input, known)
        _check_output(output, input)
        room = None if memory is None else _parse_size(memory)
        console = Console(stderr=True)
        with console.status("Loading the model"):
            import mlora
            from mlora.cli.demo import complete, load_model, load_tokenizer

            tokenizer = load_tokenizer(model)
            if raw:
                _check_tokens(input, lines, tokenizer)
            loaded = load_model(model)
            if config is not None:
                mlora.from_config(config, model=loaded, memory=room, max_adapters=max_adapters)
            else:
                runtime = mlora.patch(loaded, memory=room, max_adapters=max_adapters)
                for name, path in folders.items():
                    runtime.load_adapter(path, name)
        with Progress(console=console) as progress, output.open("w", encoding="utf-8") as sink:
            task = progress.add_task("Generating", total=len(lines))
            for start in range(0, len(lines), batch_size):
                batch = lines[start : start + batch_size]
                entries = [line.get("adapter", active) for line in batch]
                prompts = [line["prompt"] for line in batch]
                answers = complete(loaded, tokenizer, prompts, entries, max_new_tokens, raw)
                for line, answer in zip(batch, answers, strict=True):
                    sink.write(json.dumps({**line, "completion": answer}, ensure_ascii=False) + "\n")
                sink.flush()
                progress.advance(task, len(batch))
        console.print(f"{len(lines)} completions in {output}", markup=False, highlight=False)


def _parse_adapters(options: list[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise InputError(f"--adapter {option!r}: wanted NAME=PATH")
        if name in folders:
            raise InputError(f"--adapter {option!r}: the name {name!r} is taken by {folders[name]!r}")
        folders[name] = path
    return folders


def _parse_size(text: str) -> int:
    """Bytes, of `--memory`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"--memory {text!r}: wanted bytes, or a size such as 512MiB, 2GiB or 2GB")
    number, prefix, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0))
    if size < 1:
        raise InputError(f"--memory {text!r}: wanted at least one byte")
    return size


def _parse_config(file: Path, model: str | None, folders: Mapping[str, str]) -> tuple[set[str], str | None, str]:
    """A config's names, the active one of them, and its model; nothing is loaded."""
    from mlora.config import parse
    from mlora.errors import MloraError

    if model is not None or folders:
        raise InputError(f"--config excludes {'--model' if model is not None else '--adapter'}: the file says it")
    try:
        parsed = parse(file)
        return set(parsed.names), parsed.active, parsed.model_source()
    except MloraError as error:
        raise InputError(f"--config: {error}") from None


def _read_lines(file: Path, known: set[str]) -> list[dict[str, Any]]:
    """The lines of a prompts file, checked before any model is loaded; an InputError names the line."""
    try:
        # splitlines() would also cut where JSON has plain letters; some editors put a mark first, others do not.
        texts = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --input: {error}") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        if text.strip():
            try:
                lines.append(_check_line(json.loads(text), known))
            except ValueError as error:
                raise InputError(f"{file} line {number}: {error}") from None
    if not lines:
        raise InputError(f"{file} has no prompts")
    return lines


def _check_tokens(file: Path, lines: list[dict[str, Any]], tokenizer: Any) -> None:
    """Refuse prompts that are no tokens by themselves: there is nothing to go on from."""
    prompts = [line["prompt"] for line in lines]
    for prompt, ids in zip(prompts, tokenizer(prompts, add_special_tokens=True)["input_ids"], strict=True):
        if not ids:
            raise InputError(f"{file}: the prompt {prompt!r} gives no token, so that --raw has nothing to complete")


def _check_output(output: Path, input: Path) -> None:
    """Refuse what cannot be written, and what would take the prompts with it if the run broke off."""
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output {output}: wanted a file in a folder that exists")
    if output.exists() and output.samefile(input):
        raise InputError(f"--output {output} is --input; wanted another file")


def _check_line(line: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
        raise InputError('wanted an object with a string "prompt"')
    json.dumps(line, ensure_ascii=False).encode()  # as it will be written: half a surrogate pair is no text
    from mlora.merge import as_merge, is_weight

    entry = line.get("adapter")
    if (merge := as_merge(entry)) is not None:
        names: set[str | None] = set(merge.adapters)
    elif isinstance(entry, dict):
        for name, weight in entry.items():
            if not is_weight(weight):
                raise InputError(f"the weight of {name!r} is {weight!r}, wanted a finite number")
        names = set(entry)
    elif entry is None or isinstance(entry, str):
        names = {entry} - {None, "__base__"}
    else:
        raise InputError(f'"adapter" is {entry!r}, wanted a name, null, an object of weights or a merge')
    if unknown := names - known:
        wanted = ", ".join(sorted(known)) or "none given"
        raise InputError(f"unknown adapter {min(map(str, unknown))!r} (there are: {wanted})")
    return line


# Options whose tensors do not tell the widths of what they change.
_FROM_BASE = ("use_bdlora", "target_parameters")


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="A PEFT adapter folder, a .safetensors file, a URL or a hub id.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Also load it into this base model (hub id or folder).")
    ] = None,
    approximate: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="With --model: serve full-rank deltas at this rank.")
    ] = None,
) -> None:
    """Show what an adapter is, and whether mlora serves it exactly or refuses it, and why."""
    with one_line_errors():
        from rich.console import Console

        from mlora import Adapter
        from mlora.errors import MloraError
        from mlora.lowering import module_names

        out = Console(soft_wrap=True, highlight=False, markup=False)
        adapter = Adapter.from_pretrained(folder)
        linears = _linears(adapter.tensors)
        copied = any(key.endswith("base_layer.weight") for key in adapter.tensors)  # to be compared with the base
        ranks = sorted({rank for rank, _, _ in linears.values()})
        options = {
            key: value for key, value in sorted(adapter.config.items()) if value not in (None, False, {}, [], "", 0.0)
        }
        out.print(f"source   {adapter.source}")
        out.print(f"type     {adapter.peft_type}")
        out.print("options  " + ", ".join(f"{key}={_short(value)}" for key, value in options.items()))
        out.print(f"ranks    {', '.join(map(str, ranks)) or '-'}")
        size = sum(tensor.nbytes for tensor in adapter.tensors.values())
        out.print(f"bytes    {size:,} in {len(adapter.tensors)} tensors")
        try:
            names = module_names(adapter)
            kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
            out.print(f"modules  {len(names)} ({', '.join(kinds)})")
            if model is not None:
                import mlora
                from mlora.cli.demo import load_model

                runtime = mlora.patch(load_model(model))
                info = runtime.add_adapter("inspected", adapter, approximate=approximate)
                how = f"with an error of up to {info.error:.1e}" if info.errors else "exactly"
                where = f"on {len(info.modules)} modules of {model}; {info.bytes:,} bytes there"
                out.print(f"served   {how}, {where}")
                for name, error in sorted(info.errors.items(), key=lambda item: -item[1]):
                    out.print(f"error    {error:.1e} {name}")
            elif set(linears) == set(names) and not (copied or any(map(adapter.config.get, _FROM_BASE))):
                _check_served(adapter, linears)
                out.print("served   yes (pass --model to check that it fits a base model)")
            else:
                out.print("served   its options and tensors are known; pass --model to check it against a base model")
        except MloraError as error:
            out.print("served   no")
            raise RuntimeError(f"refused: {error}") from None


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    adapter: Annotated[
        list[str],
        typer.Option(metavar="FOLDER[=WEIGHT]", help="A PEFT folder or hub id, of weight 1 by default; repeatable."),
    ],
    type: Annotated[
        str,
        typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune."),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="The share of values that ties, dare and magnitude_prune keep.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Of the result; default: exact for linear and cat, else the adapters' largest."),
    ] = None,
    space: Annotated[
        str, typer.Option(help='"delta" merges what adapters do to weights; "factor" merges A and B, as PEFT does.')
    ] = "delta",
    sign: Annotated[str, typer.Option(help="How ties elects signs: total or frequency.")] = "total",
    seed: Annotated[
        int, typer.Option(help="Of dare's masks, which also depend on an adapter's name: its folder's last part.")
    ] = 0,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights by their sum.")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Base model (hub id or folder), for what the adapters alone do not tell."),
    ] = None,
) -> None:
    """Merge adapters into a new one, without the base model where the method allows."""
    with one_line_errors():
        from rich.console import Console
        from rich.progress import track
        from rich.table import Table

        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not an empty folder")
        folders, weights = _parse_weighted(adapter)

        from mlora import Adapter, Merge
        from mlora.errors import MloraError
        from mlora.merge.offline import distance, merge_files, widths_of

        try:
            how = Merge(
                tuple(folders), tuple(weights), type, density, sign, rank, None, seed, normalize, space
            )  # fmt: skip
        except MloraError as error:
            raise InputError(str(error)) from None
        console = Console(stderr=True)
        show = Console(soft_wrap=True, highlight=False, markup=False)
        adapters = {name: Adapter.from_pretrained(folder) for name, folder in folders.items()}
        bases = None
        if model is not None:
            with console.status("Loading the model"):
                import mlora
                from mlora.cli.demo import load_model

                bases = mlora.patch(load_model(model)).bases
        try:
            merged, deltas = merge_files(
                adapters, how, bases, lambda modules, total: track(modules, "Merging", total, console=console)
            )
        except MloraError as error:
            hint = "; pass --model BASE" if str(error).endswith("the base model is needed") else ""
            raise RuntimeError(f"{error}{hint}") from None
        _write(merged, out)

        table = Table("adapter", "weight", "type", "ranks", "modules", "bytes", box=None, pad_edge=False)
        total = sum(weights) if normalize else 1.0
        for (name, one), weight in zip(adapters.items(), weights, strict=True):
            ranks = sorted({rank for rank, _, _ in _linears(one.tensors).values()})
            size = sum(tensor.nbytes for tensor in one.tensors.values())
            row = (name, f"{weight / total:g}", one.peft_type, _listed(ranks), str(len(widths_of(one))), f"{size:,}")
            table.add_row(*row)
        show.print(table)
        names = sorted({str(one.config.get("base_model_name_or_path")) for one in adapters.values()})
        if len(names) > 1:
            show.print(f"note     their configs name different bases: {', '.join(names)}")
        size = sum(tensor.nbytes for tensor in merged.tensors.values())
        ranks = sorted({delta.rank for delta in deltas.values()})
        show.print(f"merged   {merged.source}")
        show.print(f"out      {out}: {merged.peft_type}, ranks {_listed(ranks)}, {len(deltas)} modules, {size:,} bytes")
        if merged.peft_type == "DELTA":
            show.print(
                "note     with gains, or a module without rank rows, it is a DELTA: mlora reads it, PEFT does not"
            )
        if how.in_factors:
            show.print("error    none is defined: factor space merges A and B, not what they do")
        else:
            worst, where, mean = distance(deltas)
            show.print(f"error    worst {worst:.1e} ({where}), mean {mean:.1e}" if worst else "error    0: exact")


def _parse_weighted(options: list[str]) -> tuple[dict[str, str], list[float]]:
    """FOLDER[=WEIGHT] options -> name -> folder, and the weights. Names are the folders' last parts where those
    differ."""
    found: list[tuple[str, float]] = []
    for option in options:
        folder, equals, text = option.rpartition("=")
        if not equals or Path(option).exists():
            folder, text = option, "1"
        try:
            weight = float(text)
        except ValueError:
            raise InputError(f"--adapter {option!r}: the weight is {text!r}, wanted a number") from None
        if not math.isfinite(weight):
            raise InputError(f"--adapter {option!r}: the weight is {text!r}, wanted a finite number")
        if not folder:
            raise InputError(f"--adapter {option!r}: wanted FOLDER[=WEIGHT]")
        if folder in [known for known, _ in found]:
            raise InputError(f"--adapter {option!r}: {folder!r} is given twice")
        found.append((folder, weight))
    short = [Path(folder).name or folder for folder, _ in found]
    names = [name if short.count(name) == 1 else folder for name, (folder, _) in zip(short, found, strict=True)]
    return {name: folder for name, (folder, _) in zip(names, found, strict=True)}, [weight for _, weight in found]


def _write(adapter: Any, out: Path) -> None:
    """Write a PEFT folder, whole or not at all."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlora-", dir=out.parent) as temp:
        adapter.save_pretrained(Path(temp) / out.name)
        (Path(temp) / out.name).replace(out)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) or "-"


def _linears(tensors: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Module -> (rank, in, out), from the shapes of its lora_A and lora_B."""
    found = {}
    for key, a in tensors.items():
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if key.endswith(".lora_A.weight") and b is not None and a.dim() == b.dim() >= 2:
            found[key.removesuffix(".lora_A.weight")] = (a.shape[0], math.prod(a.shape[1:]), b.shape[0])
    return found


def _check_served(adapter: Any, modules: Mapping[str, tuple[int, int, int]]) -> None:
    """Lower `adapter` for stand-in linears and convolutions of its own widths; raises MloraError as loading would."""
    import torch

    from mlora.lowering import BaseLinear, lower
    from mlora.merge.offline import conv_of

    def stand_in(name: str, inputs: int, outputs: int) -> BaseLinear:
        conv = conv_of(adapter.tensors, name)
        return BaseLinear(name, inputs, outputs, lambda: torch.ones(outputs, inputs), lambda: None, conv=conv)

    lower(adapter, {name: stand_in(name, *widths) for name, (_, *widths) in modules.items()})


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="kernels, generate, merge, kinds, load, plot or all.")] = "all",
    smoke: Annotated[bool, typer.Option("--smoke", help="A few seconds, to see that it runs.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSONL files and plots.")] = Path("bench/results"),
) -> None:
    """Run the benchmarks of a source checkout."""
    with one_line_errors():
        folder = Path(__file__).resolve().parent.parent / "bench"
        every = ["kernels", "generate", "merge", "kinds", "load", "plot"]
        steps = every if what == "all" else [what]
        if not set(steps) <= set(every):
            raise InputError(f"bench {what!r}: wanted {', '.join(every)} or all")
        if not (folder / "kernels.py").is_file():
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
