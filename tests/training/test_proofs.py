"""What a user of training relies on over many steps, on a transformer: PEFT's curves, and runs that do not see each
other."""

from __future__ import annotations

import copy
import functools
import math
import threading
from typing import Any

import pytest
import torch
from conftest import VOCAB, build
from gradients import in_thread
from peft import LoraConfig, get_peft_model
from torch import Tensor

import mlora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ids_of(step: int, seed: int, rows: int = 2, length: int = 8) -> Tensor:
    """A run's rows of a step: it sees five batches over and over."""
    draw = torch.Generator().manual_seed(100 * seed + step % 5)
    return torch.randint(2, VOCAB, (rows, length), generator=draw)


def patched(base: Any, runs: int, **options: Any) -> mlora.Runtime:
    runtime = mlora.patch(copy.deepcopy(base), memory=1 << 23)
    for seed in range(runs):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": LINEARS, **options}
        runtime.add_adapter(f"run{seed}", config, seed=seed)
    return runtime


def parameters(runtime: mlora.Runtime, name: str) -> list[torch.nn.Parameter]:
    return [parameter for _, parameter in runtime.named_parameters(name)]


def with_peft(base: Any, seed: int, steps: int, **options: Any) -> list[float]:
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(steps):
        ids = ids_of(step, seed)
        loss = mlora.losses(model(input_ids=ids).logits, ids, None)[None]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def together(runtime: mlora.Runtime, runs: int, steps: int, poison: int | None = None) -> list[list[float]]:
    """Losses of each run, all in one batch a step; `poison`: the run whose weights become NaN after the fifth."""
    names = [f"run{seed}" for seed in range(runs)]
    optimizers = [torch.optim.AdamW(parameters(runtime, name), lr=5e-3) for name in names]
    losses: list[list[float]] = [[] for _ in names]
    for step in range(steps):
        ids = torch.cat([ids_of(step, seed) for seed in range(runs)])
        entries = [name for name in names for _ in range(2)]
        found = mlora.losses(runtime.model(input_ids=ids, adapter_names=entries).logits, ids, entries)
        sum(found.values()).backward()  # type: ignore[union-attr]
        for seed, (name, optimizer) in enumerate(zip(names, optimizers, strict=True)):
            losses[seed].append(float(found[name].detach()))
            optimizer.step()
            optimizer.zero_grad()
        if step == 4 and poison is not None:
            with torch.no_grad():
                parameters(runtime, names[poison])[0].fill_(math.nan)
    return losses


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_fifty_steps_are_pefts(options: dict[str, Any]) -> None:
    base = build("llama")
    losses = together(patched(base, 3, **options), 3, 50)
    for seed in range(3):
        wanted = with_peft(base, seed, 50, **options)
        assert wanted[-1] < 0.9 * wanted[0]
        torch.testing.assert_close(torch.tensor(losses[seed]), torch.tensor(wanted), rtol=0, atol=1e-4)


def test_fifty_steps_in_bf16_are_pefts_on_average() -> None:
    base = build("llama", dtype=torch.bfloat16)
    losses = together(patched(base, 3), 3, 50)
    for seed in range(3):
        wanted = with_peft(base, seed, 50)
        assert sum(losses[seed]) == pytest.approx(sum(wanted), rel=5e-3)


def test_twenty_steps_do_not_see_the_other_rows() -> None:
    """Losses and weights are the same to the bit whatever another run is, NaN included."""
    base = build("llama")
    calm, wild = patched(base, 3), patched(base, 3)
    losses = together(calm, 3, 20)
    poisoned = together(wild, 3, 20, poison=1)
    assert math.isnan(poisoned[1][-1])
    for seed in (0, 2):
        assert poisoned[seed] == losses[seed]
        pairs = zip(parameters(calm, f"run{seed}"), parameters(wild, f"run{seed}"), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_two_threads_go_back_at_once() -> None:
    """Each through its own call; gradients are those of one after another, to the bit."""
    runtime = patched(build("llama"), 2)
    model = runtime.model

    def loss(seed: int) -> Tensor:
        ids = ids_of(0, seed, rows=6, length=24)
        found: Tensor = mlora.losses(model(input_ids=ids, adapter_names=f"run{seed}").logits, ids, f"run{seed}")[
            f"run{seed}"
        ]
        return found

    with torch.no_grad():  # B of fresh adapters is 0, and so would A's gradients be
        for seed in range(2):
            for parameter in parameters(runtime, f"run{seed}"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1)
    wanted = []
    for seed in range(2):
        loss(seed).backward()
        wanted.append([parameter.grad.clone() for parameter in parameters(runtime, f"run{seed}")])
    for _ in range(5):
        for seed in range(2):
            for parameter in parameters(runtime, f"run{seed}"):
                parameter.grad = None
        losses, start = [loss(seed) for seed in range(2)], threading.Barrier(2)

        def back(seed: int, losses: list[Tensor] = losses, start: threading.Barrier = start) -> None:
            start.wait()
            losses[seed].backward()

        threads = [in_thread(functools.partial(back, seed)) for seed in range(2)]
        for thread in threads:
            thread.join()
        for seed in range(2):
            pairs = zip(parameters(runtime, f"run{seed}"), wanted[seed], strict=True)
            assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in pairs)
