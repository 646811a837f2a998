"""PNG charts from the JSON lines of the other benchmarks.

python bench/plot.py --out bench/results bench/results/*.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MINE, PEER, BOUND = "#2a6f97", "#b5838d", "#333333"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", type=Path, nargs="+", help="JSON lines of operators.py, generate.py and examples/merging.py"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the PNG files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for file in args.files for line in file.read_text().splitlines()]
    drawn = []
    if generate := [r for r in records if r.get("bench") == "generate"]:
        drawn.append(draw_generate(generate, args.out / "generate.png"))
    if batches := [r for r in records if r.get("bench") == "batches"]:
        drawn.append(draw_batches(batches, args.out / "batches.png"))
    if bandwidth := [r for r in records if r.get("bench") == "operators" and r["group"] == "bandwidth"]:
        drawn.append(draw_bandwidth(bandwidth, args.out / "bandwidth.png"))
    if merging := [r for r in records if r.get("bench") == "merging"]:
        drawn.append(draw_merging(merging, args.out / "merging.png"))
    if not drawn:
        raise SystemExit(f"nothing to draw in {', '.join(map(str, args.files))}")
    for file in drawn:
        print(file)


def draw_generate(records: list[dict[str, Any]], file: Path) -> Path:
    """Ratio to the bare model by case, one panel a phase; whiskers are 20-80 % quantiles."""
    phases = list(dict.fromkeys(r["phase"] for r in records))
    cases = list(dict.fromkeys(r["case"] for r in records))
    figure, axes = plt.subplots(
        1, len(phases), figsize=(3.6 + 3.4 * len(phases), 0.38 * len(cases) + 1.9), sharey=True, squeeze=False
    )
    for axis, phase in zip(axes[0], phases, strict=True):
        found = {r["case"]: r for r in records if r["phase"] == phase}
        widest = max(r["ratio_q80"] for r in found.values())
        for y, case in enumerate(cases):
            if case not in found:
                axis.text(1.02, y, "not measured", va="center", fontsize=8, color="gray")
                continue
            record = found[case]
            ratio, low, high = record["ratio"], record["ratio_q20"], record["ratio_q80"]
            axis.barh(
                y,
                ratio,
                color=MINE if case.startswith("mlora") else PEER,
                xerr=[[max(ratio - low, 0)], [max(high - ratio, 0)]],
                error_kw={"lw": 0.8, "capsize": 2},
            )
            axis.text(high + 0.02 * widest, y, f"{ratio:.2f}", va="center", fontsize=8)
            if record["adapters"]:
                axis.plot([record["byte_bound_ratio"]] * 2, [y - 0.4, y + 0.4], color=BOUND, lw=1.2)
        axis.axvline(1, color="gray", lw=0.8, ls="--")
        axis.set_xlim(0, 1.15 * widest)
        axis.set_title(phase, fontsize=10)
        axis.set_xlabel("time / bare model's")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(cases)), cases)
    axes[0][0].invert_yaxis()
    bound = axes[0][0].plot([], [], color=BOUND, lw=1.2, label="unfused byte bound")
    axes[0][-1].legend(loc="upper right", fontsize=8, frameon=False, handles=bound)
    first = records[0]
    figure.suptitle(
        f"{first['model']}, {first['dtype']}, {first['batch']} rows, {first['prompt']} + {first['new']} tokens,\n"
        f"rank {first['rank']} on all linears; {first['threads']} threads, {first['clock']} time",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    return file


LINES = {  # of a sweep over batch sizes: colour, marker, line
    "mlora, base rows": (MINE, "o", ":"),
    "mlora, one adapter": (MINE, "s", "--"),
    "mlora, all distinct": (MINE, "^", "-"),
    "PEFT, one adapter": (PEER, "D", "-"),
}


def draw_batches(records: list[dict[str, Any]], file: Path) -> Path:
    """Ratio to the bare model over the rows of a batch, one panel a model, `fused` and phase; whiskers are 20-80 %
    quantiles."""
    panels = list(dict.fromkeys((r["model"], r["fused"], r["phase"]) for r in records))
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 4.6 * len(panels), 3.8), sharey=True, squeeze=False)
    for axis, (model, fused, phase) in zip(axes[0], panels, strict=True):
        for case, (color, marker, line) in LINES.items():
            wanted = (model, fused, phase, case)
            found = [r for r in records if (r["model"], r["fused"], r["phase"], r["case"]) == wanted]
            found.sort(key=lambda r: r["batch"])
            if not found:
                continue
            ratios = [r["ratio"] for r in found]
            spread = [
                [max(r["ratio"] - r["ratio_q20"], 0) for r in found],
                [max(r["ratio_q80"] - r["ratio"], 0) for r in found],
            ]
            axis.errorbar(
                [r["batch"] for r in found], ratios, yerr=spread, color=color, marker=marker, ms=4.5, lw=1.4, ls=line,
                elinewidth=0.8, capsize=2, label=case,
            )  # fmt: skip
        axis.axhline(1, color="gray", lw=0.8, ls="--")
        axis.set_xscale("log", base=2)
        rows = sorted({r["batch"] for r in records})
        axis.set_xticks(rows, [str(n) for n in rows])
        axis.minorticks_off()
        axis.set_xlabel("rows of the batch")
        how = ', fused="always"' if fused == "always" else ""
        axis.set_title(f"{model}{how}, {phase}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("time / bare model's")
    axes[0][0].set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(LINES), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file, dpi=150)
    return file


def draw_bandwidth(records: list[dict[str, Any]], file: Path) -> Path:
    """Adapter bytes per second of the decode shape beside reading as many in one go, and the same ones call by call."""
    places = list(dict.fromkeys(r["label"] for r in records))
    figure, axes = plt.subplots(1, len(places), figsize=(4 * len(places), 3.2), sharey=True, squeeze=False)
    for axis, place in zip(axes[0], places, strict=True):
        found = [r for r in records if r["label"] == place]
        names = [f"{r['inputs']}x{r['outputs']}" for r in found]
        rates = [r["adapter_bytes"] / r["seconds"][0] / 1e9 for r in found]
        reads = [r["adapter_bytes"] / r["read_seconds"] / 1e9 if r["read_seconds"] else math.nan for r in found]
        low = [rate - r["adapter_bytes"] / r["seconds"][2] / 1e9 for rate, r in zip(rates, found, strict=True)]
        high = [r["adapter_bytes"] / r["seconds"][1] / 1e9 - rate for rate, r in zip(rates, found, strict=True)]
        axis.bar(names, rates, color=MINE, yerr=[low, high], error_kw={"lw": 0.8, "capsize": 2})
        streams = [r["stream_bytes_per_s"] / 1e9 for r in found]
        most = max(*rates, *streams, *(read for read in reads if not math.isnan(read)), axis.get_ylim()[1] / 1.25)
        axis.set_ylim(0, 1.25 * most)
        axis.plot(names, streams, color=BOUND, lw=1.2, ls=":", label="streaming read")
        axis.plot(names, reads, ls="", marker="_", ms=18, color=BOUND, label="read call by call")
        axis.set_title(place, fontsize=10)
        axis.set_xlabel("in x out, 16 rows, 16 adapters")
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="upper right")
    axes[0][0].set_ylabel("adapter GB/s")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    return file


def draw_merging(records: list[dict[str, Any]], file: Path) -> Path:
    """Loss and accuracy of each task over the density, for merges of two adapters; one line a strategy."""
    alone, bare = (next(r["tasks"] for r in records if r["strategy"] == name) for name in ("alone", "bare"))
    merges = [r for r in records if r["strategy"] not in ("alone", "bare") and len(r["adapters"]) == 2]
    sweeps: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in merges:
        if r["density"]:
            sweeps.setdefault((r["strategy"], r["weight"], r["rank"]), []).append(r)
    sweeps = {key: sorted(found, key=lambda r: r["density"]) for key, found in sweeps.items() if len(found) > 2}
    linear = min(
        (r for r in merges if r["strategy"] == "linear"), key=lambda r: sum(f["loss"] for f in r["tasks"].values())
    )
    tasks = linear["adapters"]
    figure, axes = plt.subplots(2, len(tasks), figsize=(4.2 * len(tasks) + 1.6, 6), sharex=True, squeeze=False)
    for row, figures in zip(axes, ("loss", "accuracy"), strict=True):
        for axis, task in zip(row, tasks, strict=True):
            for (strategy, weight, rank), found in sweeps.items():
                values = [r["tasks"][task][figures] for r in found]
                axis.plot([r["density"] for r in found], values, marker="o", ms=3.5, lw=1.4)
                axis.lines[-1].set_label(f"{strategy}, weights {weight:g}, rank {rank}")
            for label, level, style in (
                ("its own adapter", alone[task][figures], "-"),
                (f"linear, weights {linear['weight']:g}", linear["tasks"][task][figures], "--"),
                ("no adapter", bare[task][figures], ":"),
            ):
                axis.axhline(level, color=BOUND, lw=1, ls=style, label=label)
            if figures == "loss":
                axis.set_yscale("log")
                axis.set_title(f"{task} task", fontsize=10)
            else:
                axis.set_ylim(-0.03, 1.03)
                axis.set_xlabel("density (share of values kept)")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("loss of the wanted answer")
    axes[1][0].set_ylabel("answers that are right")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.suptitle(f"{' and '.join(tasks)} merged into one adapter, SmolLM2-135M, {linear['prompts']} prompts a task")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(file, dpi=150)
    return file


if __name__ == "__main__":
    main()
