"""A decode step of a batch of eight adapter types, as a ratio to the same batch of plain LoRAs of the same total rank.

Eight adapters made by PEFT, each of another type and with every tensor random, one a row; beside them, eight LoRAs that
have the same rank together. Both batches run on one patched model, in turns.
Before any timing, each row of both batches is checked against PEFT serving its adapter alone.

Then four adapters whose deltas are whole matrices (`dense=True`), one a row: what a decode step takes beyond that of
base rows, as a ratio to reading as many bytes as the adapters have, in turns with both.

    python bench/kinds.py --out bench/results/kinds.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from common import Log, add_arguments, machine, quantiles, seconds, set_up
from generate import LINEARS, Case, alternate, check, decoder, load, tiny_llama, twin
from rich.console import Console
from rich.progress import track

import mlora

# Of the random values, where a delta multiplies several of them: each adapter changes a weight by a tenth or so.
STRENGTHS = {
    "lora_E": 1.0, "hada": 0.25, "vera_lambda": 0.6, "ia3_l": 0.05, "fourierft": 2.0, "c3a": 5.0, "hira": 0.3,
}  # fmt: skip


def configs(rank: int) -> dict[str, peft.PeftConfig]:
    """The eight, of `rank` rank rows a module or about as many (IA3 has none, but gains)."""
    size = {"r": rank, "target_modules": LINEARS}
    return {
        "LoRA": peft.LoraConfig(**size, lora_alpha=rank),
        "rsLoRA": peft.LoraConfig(**size, lora_alpha=rank, use_rslora=True),
        "DoRA": peft.LoraConfig(**size, lora_alpha=rank, use_dora=True),
        "AdaLoRA": peft.AdaLoraConfig(init_r=rank, lora_alpha=rank, total_step=9, target_modules=LINEARS),
        "LoHa": peft.LoHaConfig(r=max(int(rank**0.5), 1), alpha=1, target_modules=LINEARS),
        "VeRA": peft.VeraConfig(**size),
        "DeLoRA": peft.DeloraConfig(**size),
        "IA3": peft.IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"]),
    }


def dense_configs(rank: int, block: int) -> dict[str, peft.PeftConfig]:
    """Four whose deltas are whole matrices; `block` divides all widths."""
    return {
        "FourierFT": peft.FourierFTConfig(n_frequency=1000, target_modules=LINEARS),
        "C3A": peft.C3AConfig(block_size=block, target_modules=LINEARS),
        "SHiRA": peft.ShiraConfig(r=rank, target_modules=LINEARS),
        "HiRA": peft.HiraConfig(r=rank, target_modules=LINEARS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=40)
    add_arguments(parser)
    args = parser.parse_args()
    if args.smoke:
        args.rank, args.prompt, args.repeats = 4, 8, 3

    console = set_up(args)
    torch.manual_seed(0)
    bare = tiny_llama() if args.smoke else load(args.model)
    with tempfile.TemporaryDirectory() as temp:
        kinds = configs(args.rank)
        made = [
            save(bare, Path(temp) / name, config, seed)
            for seed, (name, config) in track(list(enumerate(kinds.items())), "Making adapters", transient=True)
        ]
        model = twin(bare)
        runtime = mlora.patch(model, memory=1 << 30)
        for folder in made:
            runtime.load_adapter(folder)
        plain = plain_loras(bare, runtime, Path(temp), len(made))
        for folder in plain:
            runtime.load_adapter(folder)
        ids = torch.randint(3, bare.config.vocab_size, (len(made) + 1, args.prompt))
        for folders in (made, plain):
            with console.status("Checking against PEFT, each adapter alone"):
                for line in check(bare, model, folders, ids):
                    console.print(line)
        totals = [sum(info.bytes for info in runtime.adapters.values() if info.name in {f.name for f in folders})
                  for folders in (made, plain)]  # fmt: skip
        cases = [Case("", model, {"adapter_names": [folder.name for folder in folders]}) for folders in (made, plain)]
        with torch.inference_mode(), console.status("Decode steps"):
            mixed, alike = alternate(*(decoder(case, ids[:-1]) for case in cases), args.repeats)
    ratio, low, high = quantiles([mine / its for mine, its in zip(mixed, alike, strict=True)])
    console.print(
        f"{', '.join(kinds)}: {quantiles(mixed)[0] * 1e3:.1f} ms a decode step of {len(made)} rows; plain LoRAs of the "
        f"same total rank: {quantiles(alike)[0] * 1e3:.1f} ms; ratio {ratio:.3f} ({low:.3f}-{high:.3f})"
    )
    log = Log(args.out, benchmark="kinds", rank=args.rank, **machine())
    log.write(
        kinds=list(kinds),
        ratio=ratio,
        ratio_q20=low,
        ratio_q80=high,
        seconds=quantiles(mixed),
        plain_seconds=quantiles(alike),
        bytes=totals[0],
        plain_bytes=totals[1],
        repeats=args.repeats,
    )
    del model, runtime, cases
    dense(args, console, bare, log)


def dense(args: argparse.Namespace, console: Console, bare: Any, log: Log) -> None:
    """Time adapters of whole matrices against a reading of their bytes."""
    kinds = dense_configs(args.rank, 8 if args.smoke else 64)
    with tempfile.TemporaryDirectory() as temp:
        made = [save(bare, Path(temp) / name, config, seed) for seed, (name, config) in enumerate(kinds.items())]
        model = twin(bare)
        whole = sum(module.weight.nbytes for name, module in bare.named_modules() if name.rpartition(".")[2] in LINEARS)
        runtime = mlora.patch(model, memory=2 * len(made) * whole + (1 << 20))
        size = sum(runtime.load_adapter(folder, dense=True).bytes for folder in made)
        ids = torch.randint(3, bare.config.vocab_size, (len(made) + 1, args.prompt))
        with console.status("Checking against PEFT, each adapter alone"):
            for line in check(bare, model, made, ids):
                console.print(line)
        names = ([folder.name for folder in made], [None] * len(made))
        steps = [decoder(Case("", model, {"adapter_names": entries}), ids[:-1]) for entries in names]
        read = torch.ones(size // 4).sum
        with torch.inference_mode(), console.status("Decode steps"):
            for call in (*steps, read):
                call()
            times = [[seconds(call) for call in (*steps, read)] for _ in range(args.repeats)]
    ratio, low, high = quantiles([(mine - base) / reading for mine, base, reading in times])
    mine, base, reading = (statistics.median(column) for column in zip(*times, strict=True))
    console.print(
        f"{', '.join(kinds)}, whole matrices of {size / 1e6:,.0f} MB, {size / whole / len(made):.3f} of a copy of the "
        f"weights each: {mine * 1e3:.1f} ms a step of {len(made)} rows, base rows {base * 1e3:.1f} ms, reading as "
        f"many bytes {reading * 1e3:.1f} ms; ratio of the difference to that {ratio:.3f} ({low:.3f}-{high:.3f})"
    )
    log.write(
        kinds=list(kinds),
        dense=True,
        ratio=ratio,
        ratio_q20=low,
        ratio_q80=high,
        seconds=quantiles([one[0] for one in times]),
        base_seconds=quantiles([one[1] for one in times]),
        read_seconds=quantiles([one[2] for one in times]),
        bytes=size,
        repeats=args.repeats,
    )


def save(bare: Any, folder: Path, config: peft.PeftConfig, seed: int) -> Path:
    """A PEFT folder; every trainable tensor is moved at random, by little, from PEFT's initial value, and rounded to
    bf16: PEFT would keep more of it than the model's dtype holds."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(twin(bare), config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    strength = next((s for part, s in STRENGTHS.items() if part in name), 0.05)
                    noise = strength * torch.randn_like(parameter)
                    gain = any(part in name for part in ("magnitude", "ia3_l", "delora_lambda"))
                    parameter.add_(noise * parameter if gain else noise)
                    parameter.copy_(parameter.bfloat16())
        wrapped.save_pretrained(folder)
    return folder


def plain_loras(bare: Any, runtime: mlora.Runtime, root: Path, count: int) -> list[Path]:
    """`count` LoRAs on all linears, of the rank that the adapters of `runtime` have together, in equal parts."""
    total = sum(info.rank for info in runtime.adapters.values())
    ranks = [total // count + (index < total % count) for index in range(count)]
    return [
        save(
            bare, root / f"plain{index}", peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS), 100 + index
        )
        for index, rank in enumerate(ranks)
    ]


if __name__ == "__main__":
    main()
