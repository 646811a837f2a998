"""vLLM's CPU engine beside ours, in turns: it runs in an environment of its own, and is halted while ours runs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from engines import Bench, ratios, turns

from mlora.cli.demo_model import resolve_model

REQUESTS, PROMPT, NEW = 16, 64, 32


class Vllm:
    """A process of `bench/vllm_process.py`, ready for requests. It takes one line of JSON a call, and answers with one.

    Args:
        python: the interpreter of its environment.
        model, adapters: folders. Without adapters LoRA is off, and its model is compiled.
    """

    def __init__(self, python: str, model: str, adapters: Sequence[str], rank: int, length: int) -> None:
        threads = torch.get_num_threads()
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        self.process = subprocess.Popen(
            [python, str(Path(__file__).parent / "vllm_process.py")], env={**os.environ, **variables},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        given = {"model": model, "adapters": list(adapters), "rank": rank, "running": REQUESTS, "length": length}
        try:
            self.version: str = self._ask(given)["version"]
        except BaseException:
            self.__exit__()
            raise
        self._signal(signal.SIGSTOP)

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self.process.wait()

    def run(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str] = ()) -> list[list[int]]:
        """Greedy answers of `NEW` tokens, all requests at once."""
        self._signal(signal.SIGCONT)
        tokens: list[list[int]] = self._ask({"prompts": prompts, "adapters": list(adapters), "new": NEW})["tokens"]
        self._signal(signal.SIGSTOP)
        return tokens

    def _ask(self, line: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise SystemExit("vLLM ended; what it said is above")
        answered: dict[str, Any] = json.loads(answer)
        return answered

    def _signal(self, number: int) -> None:
        """To all of its processes."""
        os.killpg(self.process.pid, number)


def beside_vllm(bench: Bench) -> Iterator[dict[str, Any]]:
    """16 requests of 64 + 32 tokens, 16 distinct adapters; vLLM serves them with its LoRA, and without any adapter."""
    args, seed = bench.args, iter(range(10_000))
    names = [bench.names[i % len(bench.names)] for i in range(REQUESTS)]
    folders = {folder.name: str(folder) for folder in bench.folders}
    paths = [folders[name] for name in names]

    def fresh() -> list[list[int]]:  # or prefixes would be shared from turn to turn
        return bench.prompts(REQUESTS, PROMPT, seed=20_000 + next(seed))

    with ExitStack() as stack:
        model = str(resolve_model(args.model)) if not args.smoke else stack.enter_context(tempfile.TemporaryDirectory())
        if args.smoke:
            bench.bare.save_pretrained(model)
        length = PROMPT + NEW + 16
        lora = stack.enter_context(Vllm(args.vllm, model, list(folders.values()), args.rank, length))
        bare = stack.enter_context(Vllm(args.vllm, model, [], args.rank, length))
        # Prompts that come together are read in one step, as vLLM does.
        engine = stack.enter_context(bench.engine(max_running=REQUESTS, batch_tokens=REQUESTS * PROMPT))
        prompts = fresh()
        agreement = {
            "mlora": bench.compare(prompts, names, bench.run(engine, list(zip(prompts, names, strict=True)), NEW)),
            "vllm": bench.compare(prompts, names, lora.run(prompts, paths)),
            "vllm_bare": bench.compare(prompts, [None] * REQUESTS, bare.run(prompts)),
        }
        ours, theirs, plain = turns(
            args.repeats,
            lambda: bench.run(engine, list(zip(fresh(), names, strict=True)), NEW),
            lambda: lora.run(fresh(), paths),
            lambda: bare.run(fresh()),
        )
        medians = {"mlora": ours, "vllm": theirs, "vllm_bare": plain}
        common = {
            "requests": REQUESTS, "prompt": PROMPT, "new": NEW, "vllm": lora.version, "agreement": agreement,
            "s": {name: statistics.median(times) for name, times in medians.items()},
        }  # fmt: skip
        faster, slower = ratios(theirs, ours), ratios(ours, plain)
        yield {"figure": "16 adapters: throughput, over vLLM's LoRA", "ratio": faster, "want": -3.5, **common}
        yield {"figure": "16 adapters, over vLLM without any", "ratio": slower, "want": 1.15, **common}
