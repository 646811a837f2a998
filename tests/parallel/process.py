"""One of the processes of a tensor parallel test, started as torchrun starts them: `process.py FOLDER`.

FOLDER has `cases.pt`, a list of `Case`; what this process made of them goes to `rank{RANK}.pt`: id -> what `run` gives,
or ("error", class, message).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Adapters on a model that is split, and what is asked of it.

    Args:
        id: its name. `model`: the folder of a checkpoint. `loads`: name -> (folder, options of `load_adapter`).
        does: the function of this file that is called with the model, the case and the rank.
        ids: of the batch. `entries`: one a row. `sharded`: whether the model is patched with `fully_sharded`.
    """

    id: str
    model: str
    loads: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    does: str = "forward"
    ids: Tensor | None = None
    entries: Sequence[Any] = ()
    distributed: Mapping[str, Any] = field(default_factory=lambda: {"tp_plan": "auto"})
    sharded: bool = False


def forward(model: Any, case: Case, rank: int) -> Any:
    with torch.inference_mode():
        return model(input_ids=case.ids, adapter_names=list(case.entries)).logits


def generated(model: Any, case: Case, rank: int) -> Any:
    return model.generate(
        input_ids=case.ids, adapter_names=list(case.entries), max_new_tokens=5, min_new_tokens=5, do_sample=False
    )


def together(model: Any, case: Case, rank: int) -> Any:
    """Without inference mode, in which tensors tell whether they were written to; and how many exchanges the second
    call took."""
    import torch.distributed as dist

    calls = []
    gather = dist.all_gather_into_tensor
    with torch.no_grad():
        model(input_ids=case.ids, adapter_names=list(case.entries))
        dist.all_gather_into_tensor = lambda *args: calls.append(args) or gather(*args)
        out = model(input_ids=case.ids, adapter_names=list(case.entries)).logits
    dist.all_gather_into_tensor = gather
    return len(calls), out


def default(model: Any, case: Case, rank: int) -> Any:
    (entry,) = case.entries
    model.mlora.set_adapter(entry)
    with torch.inference_mode():
        out = model(input_ids=case.ids).logits
    model.mlora.set_adapter(None)
    return out


def told(call: Any) -> tuple[str, str, str]:
    try:
        call()
    except Exception as error:
        return "error", type(error).__name__, str(error)
    return "error", "", "nothing was raised"


def others(model: Any, case: Case, rank: int) -> Any:
    """Processes that route different things."""
    return told(lambda: forward(model, Case("", "", ids=case.ids, entries=[["a", "b"][rank % 2], None]), rank))


def alone(model: Any, case: Case, rank: int) -> Any:
    """One process names no adapter, and the others do."""
    name = "missing" if rank == 1 else "a"
    return told(lambda: forward(model, Case("", "", ids=case.ids, entries=[name, None]), rank))


def silent(model: Any, case: Case, rank: int) -> Any:
    """One process routes nothing at all."""
    with torch.inference_mode():
        names = None if rank == 1 else ["a", None]
        return told(lambda: model(input_ids=case.ids, adapter_names=names))


def loads_alone(model: Any, case: Case, rank: int) -> Any:
    """One process lacks the files."""
    folder = "/nowhere" if rank == 1 else case.loads["a"][0]
    return told(lambda: model.mlora.load_adapter(folder, "c"))


def loads_others(model: Any, case: Case, rank: int) -> Any:
    """Processes that load different adapters under one name."""
    return told(lambda: model.mlora.load_adapter(case.loads["ab"[rank % 2]][0], "c"))


def in_grad_mode(model: Any, case: Case, rank: int) -> Any:
    return told(lambda: model(input_ids=case.ids, adapter_names=list(case.entries)))


def folds(model: Any, case: Case, rank: int) -> Any:
    return told(lambda: model.mlora.merge_adapter("a"))


def trains(model: Any, case: Case, rank: int) -> Any:
    return told(lambda: model.mlora.load_adapter(case.loads["a"][0], "c", is_trainable=True))


def sizes(model: Any, case: Case, rank: int) -> Any:
    return model.mlora.adapters["a"].bytes


def saves(model: Any, case: Case, rank: int) -> Any:
    folder = Path(case.loads["a"][0]).parent / f"saved-{os.environ['WORLD_SIZE']}-{rank}"
    model.mlora.save_adapter("a", folder)
    return str(folder)


def merges(model: Any, case: Case, rank: int) -> Any:
    """A merge that takes whole deltas, kept and asked for in a request."""
    model.mlora.add_weighted_adapter(["a", "b"], [0.7, 0.5], "made", "ties", density=0.6)
    how = {"adapters": ["a", "b"], "weights": [0.7, 0.5], "combination_type": "ties", "density": 0.6}
    out = forward(model, Case("", "", ids=case.ids, entries=["made", how, None]), rank)
    model.mlora.delete_adapter("made")
    return out


def unpatched(model: Any, case: Case, rank: int) -> Any:
    """What the bare model gives before and after."""
    import mlora

    with torch.inference_mode():
        patched = model(input_ids=case.ids).logits
    mlora.unpatch(model)
    with torch.inference_mode():
        out = model(input_ids=case.ids).logits
    mlora.patch(model, memory=8 << 20, fully_sharded=case.sharded)
    return torch.equal(patched, out), out


def run(case: Case, model: Any, rank: int) -> Any:
    loaded = []
    try:
        for name, (folder, options) in case.loads.items():
            model.mlora.load_adapter(folder, name, **options)
            loaded.append(name)
        return globals()[case.does](model, case, rank)
    except Exception as error:
        return "error", type(error).__name__, f"{error}\n{traceback.format_exc()}"
    finally:
        for name in loaded:
            if name in model.mlora.adapters:
                model.mlora.delete_adapter(name)


def main(folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import mlora

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    models: dict[Any, Any] = {}
    for case in torch.load(folder / "cases.pt", weights_only=False):
        key = case.model, str(case.distributed), case.sharded
        if key not in models:
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    case.model, distributed_config=DistributedConfig(**case.distributed), dtype="auto"
                )
                mlora.patch(model.eval(), memory=8 << 20, fully_sharded=case.sharded)
            except (ValueError, mlora.errors.MloraError) as error:
                results[case.id] = "error", type(error).__name__, str(error)
                continue
            models = {key: model}
        results[case.id] = run(case, models[key], rank)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.modules["process"] = sys.modules["__main__"]  # as the cases were pickled
    main(Path(sys.argv[1]))
