"""What a folder holds that has no adapter: adapters further down, a model, or an X-LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

CONFIG = "adapter_config.json"
DIFFUSERS = "pytorch_lora_weights.safetensors"

FULL_MODEL = "a full model's own weights"

X_LORA = (
    "an X-LoRA, which is not served: it runs the model twice and mixes adapters by what it sees, and its classifier is "
    "not in PEFT's files"
)

_MODELS = ("model*.safetensors", "pytorch_model*.bin", "*.index.json", "diffusion_pytorch_model*", "consolidated*")

_MANY = 1000  # entries of a folder, beyond which it is not searched


def names_under(folder: Path) -> list[str]:
    """The files in a folder and two levels below it, as paths from there."""
    names: list[str] = []
    inner = [folder]
    for _ in range(3):
        found = [path for one in inner for path in _entries(one)]
        names += [path.relative_to(folder).as_posix() for path in found if path.is_file()]
        inner = [path for path in found if path.is_dir()]
    return names


def _entries(folder: Path) -> list[Path]:
    try:
        return list(islice(folder.iterdir(), _MANY))
    except OSError:
        return []


def instead(names: Iterable[str]) -> str:
    """The end of an error about a folder without an adapter, whose files are `names`; "" where they tell nothing."""
    names = sorted(names)
    top = [name for name in names if "/" not in name]
    if any(name.startswith("xlora_") for name in top):
        return f"; it is {X_LORA}"
    inner = {name.rpartition("/") for name in names}
    if found := sorted({folder for folder, _, name in inner if folder and name in (CONFIG, DIFFUSERS)}):
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        return f"; its subfolders hold adapters: {', '.join(found[:8])}{more}; pass subfolder={found[0]!r}, or another"
    if model := next((name for name in top for kind in _MODELS if fnmatchcase(name, kind)), None):
        return f"; {model} says that it holds {FULL_MODEL}, not an adapter"
    return ""
