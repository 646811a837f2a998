"""Adapters that are trained in one batch, and the gradients that PEFT alone gives each of them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_adapter, peft_alone, row_of
from torch import Tensor

import mlora

ROOM = 1 << 24
LINEARS = {
    "mlp": ["up", "0", "2", "head"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def folder_of(tmp_path: Path, base: Any, kind: str, name: str, seed: int, **options: Any) -> Path:
    # The scaling is kept in fp32; with these it is exact, with and without rsLoRA.
    options = {"r": (4, 1, 16)[seed % 3], "lora_alpha": 8, "target_modules": LINEARS[kind], **options}
    if kind == "gpt2":
        options["fan_in_fan_out"] = True
    return make_adapter(tmp_path / name, base, seed, **options)


def trained(base: Any, folders: dict[str, Path], frozen: tuple[str, ...] = (), **options: Any) -> Any:
    model = copy.deepcopy(base)
    runtime = mlora.patch(model, memory=ROOM, **options)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name, is_trainable=name not in frozen)
    return model


def out_of(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    out = model(**batch, **options)
    return out if isinstance(out, Tensor) else out.logits


def loss_of(out: Tensor, first: int = 0) -> Tensor:
    """Some number that all outputs take part in, of rows that are summed one by one; of rows from `first` on."""
    draw = torch.Generator().manual_seed(7)
    factors = torch.randn((9, *out.shape[1:]), generator=draw).to(out.dtype)[first : first + len(out)]
    return sum((row * f).sum() + (row * row).sum() / 3 for row, f in zip(out, factors, strict=True))


def theirs(base: Any, batch: dict[str, Tensor], row: int, folders: list[Path], weights: list[float]) -> Any:
    """PEFT's model after the backward pass of one row alone."""
    model = peft_alone(base, *folders, weights=weights)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("oracle-0" in key)
    loss_of(out_of(model, row_of(batch, row)), row).backward()
    return model


def gradients_of(runtime: Any, name: str) -> dict[str, Tensor]:
    return {key.replace(f".{name}.", ".N."): p.grad for key, p in runtime.named_parameters(name)}


def of_peft(model: Any) -> dict[str, Tensor]:
    return {key.replace(".oracle-0.", ".N."): p.grad for key, p in model.named_parameters() if p.requires_grad}


def error(mine: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative, over all parameters."""
    assert mine.keys() == exact.keys()
    difference = sum(float((mine[key].double() - exact[key].double()).norm() ** 2) for key in exact)
    return (difference / sum(float(exact[key].double().norm() ** 2) for key in exact)) ** 0.5


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """A thread that runs `work`, started, with the caller's number of threads: MKL keeps it by thread, and on AVX2 cuts
    its sums by it."""
    count = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(count)
        work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def in_a_thread(loss: Tensor) -> None:
    in_thread(loss.backward).join()
