"""The conformance suite's verdicts as Markdown: a table of all, and a summary for the README."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from pathlib import Path

Table = dict[str, dict[str, set[str]]]
"""Adapter -> column -> verdicts."""

README = Path(__file__).parent.parent / "README.md"
MARKS = ("<!-- conformance: written by the suite -->\n", "<!-- /conformance -->\n")

_TITLE = (
    "# Conformance",
    "",
    "Written by `pytest tests/conformance --conformance-table docs/conformance.md`. *exact*: a row gets what a fresh",
    "PEFT model with that adapter alone gives it, in fp32 within 1e-5 of the largest value; in the column bf16, no",
    "further from fp32 than twice PEFT's own bf16. *refused*: loading fails with an error that says why;",
    "*exact; dense=True*: so it does unless asked for that, or for `approximate=RANK`, which serves it at a rank.",
    "The first six columns are a tiny Llama (*packed* is sequences one behind another in one row), the others",
    "the models they name;",
    "these are *exact or refused* where an adapter brings weights of another size, of which there is no weighted sum.",
    "",
)
_MODELS = ("gpt2", "t5", "bert", "qwen2", "conv", "vit", "qwen2moe")
_SCENARIOS = ("single", "mixed", "packed", "weighted", "generate", "bf16")
_KINDS = ("fp32", "16 bits")
_KINDS_TITLE = (
    "",
    "## Files, calls and models",
    "",
    "Plain LoRAs in files, calls and models as they occur (`tests/conformance/kinds.py`), by the same measures.",
    "*refused*: loading or the call fails with an error that says why; once, where the dtype is no matter.",
    "",
)
_TRAINING = "training, "
_TRAINED = ("alone", "mixed", "weighted", "packed", "fp32", "bf16")
_TRAINED_TITLE = (
    "",
    "## Training",
    "",
    "Gradients of all parameters that PEFT trains, by `tests/conformance/test_trained.py`. *exact*: they are those of",
    "PEFT with that adapter alone on its rows, in fp64 within 1e-10 of their norm; in the column fp32 no further from",
    "fp64 than twice PEFT's own; in bf16 no further than PEFT's with bf16 adapters, and than 1.5 times PEFT's default,",
    "in the mean over batches and within twice its standard error (a whole embedding 1.5 times both: the difference to",
    "the base's is kept, so that two numbers are rounded).",
    "*mixed*: beside base rows and another trained adapter; *weighted*: with a frozen adapter in one row. *refused*:",
    "loading with `is_trainable=True` fails with an error that says why.",
    "",
)
_WIDTH = 84  # of a summary's cell


def write(file: Path, table: Table) -> None:
    """The table into `file`, and its summary between the README's marks."""
    training = {name: _columns(cells, trains=True) for name, cells in table.items()}
    table = {name: _columns(cells, trains=False) for name, cells in table.items()}
    kinds = {name: cells for name, cells in table.items() if cells.keys() <= set(_KINDS)}
    table = {name: cells for name, cells in table.items() if name not in kinds}
    for cells in table.values():
        for column in _SCENARIOS if "refusal" in cells else ():
            cells.setdefault(column, cells["refusal"])
    lines = [*_TITLE, *_rows("adapter", (*_SCENARIOS, *_MODELS), table)]
    lines += [*_KINDS_TITLE, *_rows("case", _KINDS, {name: cells for name, cells in kinds.items() if cells})]
    lines += [*_TRAINED_TITLE, *_trained(training)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    before, start, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    verdicts = {name: _cell(set.union(*cells.values())) for name, cells in table.items()}
    README.write_text(before + start + summary(verdicts) + end + after, encoding="utf-8")


def _columns(cells: dict[str, set[str]], trains: bool) -> dict[str, set[str]]:
    """Those of training without its mark, or the others."""
    return {key.removeprefix(_TRAINING): own for key, own in cells.items() if key.startswith(_TRAINING) is trains}


def _trained(table: Table) -> list[str]:
    """What is trained somewhere as a table; the rest by name."""
    trained = {name: cells for name, cells in table.items() if set().union(*cells.values()) - {"refused"}}
    refused = [name for name, cells in table.items() if cells and name not in trained]
    rows = _rows("adapter", (*_TRAINED, *_MODELS), trained)
    return [*rows, "", *textwrap.wrap(f"*refused*: {'; '.join(refused)}.", 124, break_on_hyphens=False)]


def _rows(what: str, columns: tuple[str, ...], table: Table) -> list[str]:
    lines = [f"| {what} | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, cells in table.items():
        lines.append(f"| {name} | " + " | ".join(_cell(cells.get(column, set())) for column in columns) + " |")
    return lines


def summary(verdicts: dict[str, str]) -> str:
    """Verdict -> the adapters that got it in every scenario: exact ones as families with a number of forms, the others
    by name. Rows are short enough for the README."""
    names: dict[str, list[str]] = {}
    for name, verdict in verdicts.items():
        names.setdefault(verdict, []).append(name)
    lines = ["| verdict | adapters |", "|---|---|"]
    for verdict, found in sorted(names.items()):
        if verdict == "exact":
            families = Counter(_family(name, verdicts) for name in found)
            found = [name if forms == 1 else f"{name} ({forms})" for name, forms in families.items()]
        cell = "; ".join(name.replace(" ", "\0") for name in found)  # a name is not torn apart where a row ends
        for number, part in enumerate(textwrap.wrap(cell, _WIDTH, break_long_words=False, break_on_hyphens=False)):
            lines.append(f"| {'' if number else verdict} | {part} |".replace("\0", " ").replace("|  |", "| |"))
    return "\n".join([*lines, ""])


def _family(name: str, verdicts: dict[str, str]) -> str:
    """`RandLora, sparse` and `RandLora` are forms of RandLora; `GLoRA, vectors` is none of GLoRA: that has
    another verdict."""
    family = re.split(r",| with(?:out)? | of | mini$| bat$| \d$", name)[0]
    return family if verdicts.get(family, "exact") == "exact" else name


def _cell(verdicts: set[str]) -> str:
    return "WRONG" if "WRONG" in verdicts else " or ".join(sorted(verdicts))
