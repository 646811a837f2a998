"""`mlora generate --continuous`: prompts of any length, each as soon as there is room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlora.serve import Engine, Sampling

from .lines import WRITTEN
from .output import Output
from .prompts import Prompts


def answer_all(
    model: Any,
    prompts: Prompts,
    lines: list[dict[str, Any]],
    options: Mapping[str, Any],
    seed: int | None,
    running: int,
    out: Output,
    count: Callable[[int], None],
) -> None:
    """Complete the lines that have no answer yet, `running` at once, and write them in their order.

    Args:
        options: as `model.generate` takes them. `seed`: of the first line; the next has the next. `count`: called with
            how many are written.
    """
    first, ready = out.done, {}
    sampling = Sampling.like_generate(model, **options)

    def requests() -> Iterator[tuple[Any, ...]]:
        for at in range(first, len(lines)):
            yield prompts.ids[at], prompts.entries[at], sampling if seed is None else sampling.seeded(seed + at)

    with Engine(model.mlora, max_running=running) as engine:
        for answer in engine.generate_many(requests()):
            if answer.error is not None:
                raise answer.error
            ids = [token.id for token in answer.tokens]
            ready[first + answer.request] = ids[:-1] if answer.finish_reason == "stop" else ids
            while out.done in ready:
                at = out.done
                text = prompts.tokenizers[at].decode(ready.pop(at), skip_special_tokens=True)
                out.write([{**lines[at], WRITTEN: text}])
                count(out.done)
