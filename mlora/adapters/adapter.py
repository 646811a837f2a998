"""`Adapter`: the weights and the config of one adapter, as PEFT saves them, in memory."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import errors
from .header import DTYPES
from .keys import PEFT_PREFIX, SHARED_PREFIX, plain_keys, without
from .loader import read_adapter
from .on_disk import OnDisk

_SERVED = frozenset(DTYPES.values())


@dataclass(frozen=True)
class Adapter:
    """An adapter that belongs to no model yet.

    Args:
        config: the contents of PEFT's `adapter_config.json`; `peft_type` is required.
        tensors: parameter name -> CPU tensor in PEFT's file format, for example
            `model.layers.0.self_attn.q_proj.lora_A.weight` of shape (rank, in). PEFT's prefix
            `base_model.model.`, the adapter's name (`lora_A.default.weight`), and what torch.compile, FSDP or
            activation checkpointing put around modules (`_orig_mod`) are removed. They are taken without gradients.
        source: where it came from, for messages and listings.
        ignored: names of config fields and tensors, or patterns of them, that were there and are left out.

    Raises:
        AdapterError: no `peft_type`, no tensors, or a tensor that is not finite.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    source: str = field(default="memory")
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value in (("config", self.config), ("tensors", self.tensors)):
            if not isinstance(value, Mapping):
                raise errors.AdapterError(f"adapter from {self.source}: its {what} must be a mapping, not {value!r}")
        if isinstance(self.tensors, OnDisk):  # its dtypes were looked at, and numbers are when they are read
            self._check_told()
            keys = plain_keys({key: key for key in self.tensors}, self.source)
            object.__setattr__(self, "tensors", self.tensors.named(keys))
            return
        if wrong := next((key for key, value in self.tensors.items() if not isinstance(value, Tensor)), None):
            kind = type(self.tensors[wrong]).__name__
            raise errors.AdapterError(f"adapter from {self.source}: {wrong} is a {kind}; it must be a torch.Tensor")
        self._check_told()
        if wrong := next((key for key, tensor in self.tensors.items() if tensor.dtype not in _SERVED), None):
            raise errors.AdapterError(
                f"adapter from {self.source}: {wrong} is {self.tensors[wrong].dtype}, which is not served; those that "
                f"are: {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES.values())}"
            )
        if any(tensor.requires_grad for tensor in self.tensors.values()):
            object.__setattr__(self, "tensors", {key: tensor.detach() for key, tensor in self.tensors.items()})
        floats = {key: tensor for key, tensor in self.tensors.items() if tensor.is_floating_point()}
        if not all(map(all_finite, _vectors(floats.values()))):
            key, bad = next((k, int((~_finite(t)).sum())) for k, t in floats.items() if not all_finite(t))
            raise errors.AdapterError(
                f"adapter from {self.source}: {key} has {bad} values that are NaN or infinite, "
                f"of {floats[key].numel()}; all must be finite"
            )
        object.__setattr__(self, "tensors", plain_keys(self.tensors, self.source))

    def _check_told(self) -> None:
        if not self.config.get("peft_type"):
            raise errors.AdapterError(f"adapter from {self.source}: its config has no 'peft_type'")
        if not self.tensors:
            raise errors.AdapterError(f"adapter from {self.source}: it has no tensors")

    @property
    def peft_type(self) -> str:
        """PEFT's type in capitals, e.g. `"LORA"`."""
        value = self.config["peft_type"]
        return str(getattr(value, "value", value)).upper()  # PEFT's own config objects hold an enum

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        ignore: Sequence[str] = (),
        in_memory: bool = True,
    ) -> Adapter:
        """Read a PEFT folder, or a Hugging Face hub id, into memory. What is written there meanwhile or later does not
        matter: the files are read whole and as they were at one moment.

        Args:
            path_or_id: a folder with `adapter_config.json` and `adapter_model.safetensors`, or `org/name`.
            revision: branch, tag or commit on the hub.
            token: hub token; the default is the one that is logged in.
            subfolder: of the folder or the hub id.
            allow_pickle: also read `adapter_model.bin`, with torch's `weights_only` unpickler.
            ignore: names of config fields and of tensors, or patterns of the latter, that are left out; `ignored` tells
                those that were there.
            in_memory: False leaves the tensors of safetensors in their file, which has to stay as it is: they are read
                each time that they are asked for.

        Raises:
            AdapterError: something is missing, damaged or not finite, or the files do not come to rest.
        """
        read = read_adapter(
            path_or_id,
            revision=revision,
            token=token,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            ignore=ignore,
            in_memory=in_memory,
        )
        return cls(read.config, read.tensors, read.source, read.ignored)

    @classmethod
    def from_peft(cls, model: Any, name: str = "default") -> Adapter:
        """A copy of adapter `name` of a live `PeftModel`, or of a transformers model with adapters in it.

        Its tensors are what PEFT's `save_pretrained` would write, so an adapter that rewrote the base when
        it started (PiSSA, OLoRA) belongs to that base as it was before, as its file would.

        Raises:
            UnknownAdapterError: the model has no adapter of that name. AdapterError: it is offloaded.
        """
        configs = getattr(model, "peft_config", None) or {}
        if name not in configs:
            known = ", ".join(map(repr, configs)) or "none"
            raise errors.UnknownAdapterError(f"this {type(model).__name__} has no adapter {name!r}; it has: {known}")
        from peft import get_peft_model_state_dict

        # The state is read first: it brings AdaLoRA's config up to date.
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        if away := next((key for key, tensor in state.items() if tensor.is_meta), None):
            raise errors.AdapterError(
                f"adapter {name!r} of this {type(model).__name__} is offloaded: {away} is on 'meta'. Save it before "
                f"the model is offloaded, patch the model without PEFT, and load it"
            )
        tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()}
        return cls(copy.deepcopy(configs[name].to_dict()), tensors, source=f"{type(model).__name__} adapter {name!r}")

    def ignoring(self, ignore: Sequence[str]) -> Adapter:
        """The adapter without what `ignore` names, see `from_pretrained`; itself where there is none of it."""
        config, tensors, ignored = without(self.config, self.tensors, ignore)
        return Adapter(config, tensors, self.source, (*self.ignored, *ignored)) if ignored else self

    def holding(self, tensors: Mapping[str, Tensor], **told: Any) -> Adapter:
        """The adapter with the same tensors in other memory, or with such as need no check; `told`: other fields."""
        moved = copy.copy(self)
        for name, value in {"tensors": tensors, **told}.items():
            object.__setattr__(moved, name, value)
        return moved

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter as a PEFT folder, which both PEFT and `from_pretrained` read back."""
        config = json.dumps(dict(self.config), indent=2, sort_keys=False, default=_to_json)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            key if key.startswith(SHARED_PREFIX) else PEFT_PREFIX + key: tensor.detach().contiguous()
            for key, tensor in self.tensors.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. The sum, which takes a tenth of the time, shows it unless it overflows; of
    8-bit floats there is none."""
    return (tensor.itemsize > 1 and math.isfinite(tensor.sum())) or bool(_finite(tensor).all())


def _finite(tensor: Tensor) -> Tensor:
    return torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)


def _vectors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same values: tensors that follow one another in memory, as a file's do, joined into one vector."""
    runs: list[list[Tensor]] = []
    follows: tuple[torch.dtype, int] | None = None
    for tensor in tensors:
        dense, start = tensor.is_contiguous(), tensor.data_ptr()
        if dense and follows == (tensor.dtype, start):
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
        follows = (tensor.dtype, start + tensor.nbytes) if dense else None
    for run in runs:
        first, last = run[0], run[-1]
        if len(run) > 1 and first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr():
            yield first.as_strided((sum(tensor.numel() for tensor in run),), (1,))
        else:
            yield from run


def _to_json(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):  # PEFT's config objects keep target_modules as a set
        return sorted(value)
    raise TypeError(f"an adapter's config cannot hold {value!r}")
