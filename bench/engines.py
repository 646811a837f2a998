"""What the serving benchmarks drive: the engine, transformers' continuous batching and `generate`, of one model.

Bare and patched model share their weights, and what is compared takes turns.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import quantiles, seconds
from generate import load, make_adapter, patched, tiny_llama
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from mlora.serve import Engine, Sampling, attention

ROUNDINGS = 6  # within so many times the rounding error of a score two scores may change places


class Stock(ContinuousBatchingManager):
    """transformers' own, with the attention that the engine has."""

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        self._original_attn_impl = model.config._attn_implementation
        model.set_attn_implementation(attention.register())

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        attention.read_in_place(processor.cache)
        return processor


class Bench:
    """The models, the requests, and what a figure is measured with."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.bare = tiny_llama() if args.smoke else load(args.model)
        self.vocabulary = self.bare.config.vocab_size
        self.folders = [make_adapter(self.bare, folder / f"a{i}", args.rank, seed=i) for i in range(args.adapters)]
        self.bytes = sum(file.stat().st_size for file in self.folders[0].glob("*.safetensors"))
        fused: Any = "always" if args.fused == "always" else True
        self.served = patched(self.bare, self.folders, self.bytes, fused)
        self._exact: Any = None
        self.names = [folder.name for folder in self.folders]
        self.new = Sampling(max_new_tokens=args.new, ignore_eos=True)

    def prompts(self, count: int, length: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.vocabulary, (count, length), generator=generator).tolist()

    def engine(self, model: Any = None, **options: Any) -> Engine:
        tokens = options.pop("cache_tokens", 64 * (self.args.prompt + self.args.new + 16))
        return Engine((model or self.served).mlora, cache_tokens=tokens, **options)

    def stock(self, running: int) -> Stock:
        tokens = running * (self.args.prompt + self.args.new + 16)
        config = ContinuousBatchingConfig(
            num_blocks=-(-tokens // 16), page_size=16, max_batch_tokens=512, auto_switch_to_flash=False,
            use_cuda_graph=False, use_async_batching=False,
        )  # fmt: skip
        stock = Stock(self.bare, GenerationConfig(do_sample=False, eos_token_id=-1), config)
        stock.start()
        return stock

    def generate(self, prompts: Sequence[Sequence[int]], names: Any, new: int | None = None) -> torch.Tensor:
        """All rows in one batch."""
        ids, new = torch.tensor(prompts), new or self.args.new
        fixed = {"max_new_tokens": new, "eos_token_id": self.vocabulary, "do_sample": False}  # no token ends it
        with torch.inference_mode():
            out = self.served.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, pad_token_id=0, **fixed
            )
        return out[:, ids.shape[1] :]

    def run(self, engine: Engine, requests: Sequence[tuple[Any, ...]], new: int | None = None) -> list[list[int]]:
        sampling = self.new if new is None else Sampling(max_new_tokens=new, ignore_eos=True)
        answers = {one.request: [token.id for token in one.tokens] for one in engine.generate_many(requests, sampling)}
        return [answers[number] for number in range(len(requests))]

    def run_stock(self, stock: Stock, prompts: Sequence[Sequence[int]]) -> None:
        for number, prompt in enumerate(prompts):
            stock.add_request(list(prompt), request_id=f"{time.perf_counter()}-{number}", max_new_tokens=self.args.new)
        done = 0
        while done < len(prompts):
            output = stock.get_result(timeout=1)
            done += output is not None and output.is_finished()

    def check(self) -> str:
        """The engine against `generate` of each request alone."""
        prompts = self.prompts(16, self.args.prompt, seed=9)
        names = [self.names[i % len(self.names)] for i in range(16)]
        with self.engine(max_running=16) as engine:
            got = self.run(engine, list(zip(prompts, names, strict=True)))
        return "the engine: " + self.compare(prompts[::4], names[::4], got[::4])

    @property
    def exact(self) -> Any:
        """The same adapters on the model in fp32."""
        if self._exact is None:
            self._exact = patched(copy.deepcopy(self.bare).float(), self.folders, 2 * self.bytes, True)
        return self._exact

    def compare(self, prompts: Sequence[Sequence[int]], names: Sequence[Any], answers: Sequence[Sequence[int]]) -> str:
        """Greedy answers against `generate` of each request alone. Where they part, the scores of both tokens must be
        within ROUNDINGS of each other in fp32, counted in the distance (RMS) of that request's scores from those in
        fp32. Exits otherwise."""
        equal, widest = 0, 0.0
        for number, (prompt, name, one) in enumerate(zip(prompts, names, answers, strict=True)):
            alone = self.generate([prompt], [name], new=len(one))[0].tolist()
            at = next((at for at in range(len(one)) if one[at] != alone[at]), None)
            if at is None:
                equal += 1
                continue
            with torch.inference_mode():
                ids = torch.tensor([[*prompt, *one[:at]]])
                rounded, scores = (
                    model(ids, adapter_names=[name]).logits[0, -1].float() for model in (self.served, self.exact)
                )
            rounding = float((rounded - scores).square().mean().sqrt())
            gap = abs(float(scores[alone[at]] - scores[one[at]])) / rounding
            widest = max(widest, gap)
            if gap > ROUNDINGS:
                raise SystemExit(
                    f"request {number} under {name}: token {at} is {one[at]}, alone {alone[at]}; in fp32 their scores "
                    f"differ by {gap:.3g} times the rounding of scores ({rounding:.3g}), and {ROUNDINGS} is allowed"
                )
        return (
            f"{equal} of {len(answers)} answers are those of generate alone to the last token; where others part, the "
            f"two scores differ in fp32 by {widest:.1f} times the rounding of scores at most"
        )


def turns(repeats: int, *calls: Callable[[], object]) -> list[list[float]]:
    """Seconds of each call, in turns; the first turn warms up."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for own, call in zip(times, calls, strict=True):
            taken = seconds(call)
            if turn:
                own.append(taken)
    return times


def ratios(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    return quantiles([a / b for a, b in zip(one, other, strict=True)])
