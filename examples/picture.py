"""The README's picture: one prompt under several adapters in one batch, and what a decode step of such a batch takes.

The answers are what the demo's model gives when this runs; the times are the records of bench/generate.py.

    python examples/picture.py [--prompt TEXT] [--out docs/picture.png]
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

import mlora
from mlora.cli.demo_model import resolve_model

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ("sql", "json", "emoji", "pirate")
MINE, PEER, GRAY = "#2a6f97", "#b5838d", "#666666"
# Case of bench/generate.py -> what the picture calls it.
CASES = {
    "mlora, base rows": "mlora, no adapter",
    "mlora, 1 distinct": "mlora, one adapter",
    "mlora, 16 distinct": "mlora, 16 adapters",
    "PEFT, 1 adapter": "PEFT, one adapter",
    "PolyLoRA, 16 distinct": "PolyLoRA, 16 adapters",
    "PEFT mixed batch, 16 distinct": "PEFT, 16 adapters",
}
FONTS = ["DejaVu Sans Mono", "DejaVu Sans"]  # the second has the faces
WIDTH = 68  # letters of a line of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="Adam Bell, 57, works as a barber in Turin.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "picture.png")
    args = parser.parse_args()
    records = [json.loads(line) for line in (ROOT / "bench/results/generate.jsonl").read_text().splitlines()]
    print(draw(args.prompt, answers(args.prompt), records, args.out))


def answers(prompt: str) -> dict[str, str]:
    """Adapter -> the greedy answer of its row; all rows in one batch."""
    path = resolve_model(None)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(path)
    runtime = mlora.patch(model)
    for name in ADAPTERS:
        runtime.load_adapter(ROOT / "examples" / "adapters" / name, name)
    entries = [None, *ADAPTERS]
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([text] * len(entries), return_tensors="pt")  # of one length: nothing is padded
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False, adapter_names=entries)
    found = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return {entry or "no adapter": answer.strip() for entry, answer in zip(entries, found, strict=True)}


def draw(prompt: str, found: dict[str, str], records: list[dict[str, Any]], file: Path) -> Path:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.7), width_ratios=(1.7, 1))
    left.axis("off")
    left.set(xlim=(0, 1), ylim=(0, 1))
    left.set_title("One prompt, five rows, one generate() call", fontsize=11, weight="bold", loc="left")
    left.text(0, 0.97, f"“{prompt}”", fontsize=10, style="italic", va="top")
    lines = {name: textwrap.wrap(answer, WIDTH) for name, answer in found.items()}
    lines = {name: [rows[0], f"{rows[1]} …"] if len(rows) > 2 else rows for name, rows in lines.items()}
    step = 0.85 / sum(len(rows) + 1 for rows in lines.values())
    y = 0.82
    for name, rows in lines.items():
        color = GRAY if name == "no adapter" else MINE
        left.text(0, y, name, fontsize=10, weight="bold", color=color, va="top")
        left.text(
            0.19,
            y,
            "\n".join(rows),
            fontsize=8.5,
            family=["DejaVu Sans Mono", "DejaVu Sans"],
            va="top",
            linespacing=1.3,
        )
        y -= step * (len(rows) + 1)
    steps = {r["case"]: r for r in records if r["phase"] == "decode step" and r["case"] in CASES}
    bars = {"bare model": (1.0, GRAY)}
    for case, label in CASES.items():
        if case in steps:
            bars[label] = steps[case]["ratio"], MINE if case.startswith("mlora") else PEER
    ratios = [ratio for ratio, _ in bars.values()]
    right.axvline(1, color=GRAY, lw=0.8, ls=":", zorder=0)
    right.barh(list(bars), ratios, color=[color for _, color in bars.values()], height=0.65)
    for y, ratio in enumerate(ratios):
        label = right.text(ratio + 0.12, y, f"{ratio:.2f}", va="center", fontsize=9)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    right.set_xlim(0, 1.13 * max(ratios))
    right.invert_yaxis()
    right.tick_params(axis="y", length=0, labelsize=9)
    right.xaxis.set_visible(False)
    right.spines[["top", "right", "bottom"]].set_visible(False)
    right.set_title("Decode step, bare model = 1", fontsize=11, weight="bold", loc="left")
    first = next(iter(steps.values()))
    size = f"{first['batch']} rows, rank {first['rank']}, {first['threads']} CPU threads"
    under = f"{first['model']}, {first['dtype']},\n{size}"
    right.text(0.98, 0.9, under, fontsize=8, color=GRAY, ha="right", va="center", transform=right.transAxes)
    figure.tight_layout(w_pad=1)
    figure.savefig(file, dpi=120)
    return file


if __name__ == "__main__":
    main()
