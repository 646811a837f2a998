"""One of two processes that serve a model that is split over them, started as torchrun starts them:
`together_process.py FOLDER`. What became of it goes to `rank{RANK}.pt` there. The first ends without a word."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mlora
from mlora import errors, patching
from mlora.arena.memory import fixed
from mlora.serve import Engine, Sampling, follow


async def ids(engine: Engine, prompt: Any, entry: Any, options: Any) -> list[int]:
    return [token.id async for token in engine.generate(prompt, entry, Sampling(**options))]


async def told(call: Any) -> tuple[str, str]:
    try:
        await call
    except errors.MloraError as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


async def asked(engine: Engine, given: dict[str, Any]) -> dict[str, Any]:
    """Requests under two adapters, their sums and merges, while a third is loaded, replaced and deleted."""
    prompt, folders, found = given["prompt"], given["folders"], {}
    plain = {"max_new_tokens": 12}
    running = [asyncio.create_task(ids(engine, *one)) for one in given["requests"]]
    stream = engine.generate(prompt, "a", Sampling(max_new_tokens=40))
    found["left"] = [await anext(stream) for _ in range(3)]
    await stream.aclose()
    await engine.load_adapter(folders["c"], "new")
    found["loaded"] = await ids(engine, prompt, "new", plain)
    old = engine.generate(prompt, "new", Sampling(max_new_tokens=12))
    first = await anext(old)
    await engine.replace_adapter("new", folders["b"])
    found["replaced"] = await ids(engine, prompt, "new", plain)
    found["old"] = [first.id, *[token.id async for token in old]]
    await engine.delete_adapter("new")
    found["deleted"] = await told(ids(engine, prompt, "new", plain))
    found["nowhere"] = await told(engine.load_adapter("/nowhere", "new"))
    # Eight adapters for the room of about three, one after another.
    for number in range(8):
        await engine.load_adapter(folders["abc"[number % 3]], f"more{number}")
    more = [ids(engine, prompt, f"more{number}", plain) for number in range(8)]
    found["more"] = await asyncio.gather(*more)
    found["answers"] = await asyncio.gather(*running)
    found["many"] = sorted(
        (answer.request, [token.id for token in answer.tokens])
        for answer in engine.generate_many([(prompt, name) for name in ("a", None)], Sampling(**plain))
    )
    return found


def main(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    given = torch.load(folder / "given.pt", weights_only=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto", dtype="auto").eval()
    patching.default_room = lambda *_: fixed(given["room"] + rank * 4096)
    runtime = mlora.patch(model, memory=None)
    for name in ("a", "b"):
        runtime.load_adapter(given["folders"][name], name)
    if rank == 0:
        with Engine(runtime, cache_tokens=1024, page=4, batch_tokens=48) as engine:
            found = asyncio.run(asked(engine, given))
        found["status"] = runtime.status()
        with Engine(runtime, cache_tokens=1024, page=4, batch_tokens=48) as engine:  # another one, after it
            found["again"] = asyncio.run(ids(engine, given["prompt"], "a", {"max_new_tokens": 12}))
            torch.save(found, folder / "rank0.pt")
            os._exit(9)
    follow(runtime)
    ends = {"status": runtime.status()}
    try:
        follow(runtime)
    except errors.ServeError as error:
        torch.save({**ends, "error": str(error), "when": time.time()}, folder / "rank1.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
