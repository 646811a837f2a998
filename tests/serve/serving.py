"""A tiny served model, a tokenizer whose letters are several tokens, and the oracle: `generate` of a request alone."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import VOCAB, build, make_adapter
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import mlora
from mlora.serve import Engine, Sampling, Token
from mlora.serve.batching import Worker

ROOM = 1 << 22
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
NAMES = ("a", "b", "c", "d")


def adapters(folder: Path, model: Any, names: Sequence[str] = NAMES) -> dict[str, Path]:
    """Folders of random adapters, strong enough that tokens differ."""
    return {
        name: make_adapter(
            folder / name, model, seed, strength=4.0, r=2 + seed % 3, lora_alpha=8, target_modules=TARGETS
        )
        for seed, name in enumerate(names)
    }


def patched(base: Any, folders: dict[str, Path], **options: Any) -> mlora.Runtime:
    runtime = mlora.patch(copy.deepcopy(base), **{"memory": ROOM, **options})
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    return runtime


def base_model(kind: str = "llama", **options: Any) -> Any:
    return build(kind, **options)


def engine(runtime: mlora.Runtime, tokenizer: Any = None, **options: Any) -> Engine:
    return Engine(runtime, tokenizer, **{"cache_tokens": 1024, "page": 4, "batch_tokens": 48, **options})


def prompt(seed: int, length: int = 9) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Any, ids: Sequence[int], entry: Any, sampling: Sampling, **options: Any) -> list[int]:
    """What `generate` gives. `options`: of it, where `Sampling` calls them otherwise."""
    x = torch.tensor([list(ids)])
    given: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": not sampling.greedy}
    if not sampling.greedy:
        torch.manual_seed(sampling.seed)
        given |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        given |= {"min_p": sampling.min_p or None}
    given |= {"repetition_penalty": sampling.repetition_penalty, "pad_token_id": 0, **options}
    with torch.inference_mode():
        out = model.generate(input_ids=x, attention_mask=torch.ones_like(x), adapter_names=[entry], **given)
    return out[0, len(ids) :].tolist()


async def tokens(engine: Engine, *request: Any) -> list[Token]:
    return [token async for token in engine.generate(*request)]


async def ids(engine: Engine, *request: Any) -> list[int]:
    return [token.id async for token in engine.generate(*request)]


async def rest(stream: Any) -> list[int]:
    return [token.id async for token in stream]


def slow(monkeypatch: Any, seconds: float = 0.01) -> None:
    """Make each step take so long, so that what is done meanwhile happens meanwhile."""
    step = Worker._generation_step

    def slower(worker: Worker) -> None:
        time.sleep(seconds)
        step(worker)

    monkeypatch.setattr(Worker, "_generation_step", slower)


async def until(condition: Any, seconds: float = 20) -> None:
    """Wait for it."""
    for _ in range(int(seconds * 200)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come true")


def letters() -> Any:
    """One token a letter or two, bytes of letters that are not ASCII, and two special ones; `VOCAB` in all."""
    words = ["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz .,", "th", "he", "in", "er", "an", "re", "on", " a", " b"]
    words += [f"<0x{byte:02X}>" for byte in "é€🦀".encode()]
    words += [f"{letter}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(
        models.BPE(vocab={word: at for at, word in enumerate(words[:VOCAB])}, merges=[], byte_fallback=True)
    )
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
