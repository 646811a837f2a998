"""`Trains`: the part of `Runtime` that is about adapters with parameters."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors
from ..adapters.adapter import Adapter
from ..arena.store import Store
from ..gradients.dropout import Dropout
from ..gradients.parts import Base, Keys
from ..gradients.recorded import Training
from ..gradients.trained import Trained
from ..lowering import BaseLinear
from ..ops import dispatch
from ..plan.shared import Shared
from ..routing.registry import Registry
from ..routing.router import Router
from .trainable import peft_name


class Trains:
    """Mixed into `Runtime`."""

    bases: Mapping[str, BaseLinear]
    _model: nn.Module
    _registry: Registry
    _router: Router
    _shared: Shared
    _store: Store
    _lock: threading.RLock
    _thawed: list[nn.Parameter]

    def named_parameters(self, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of an adapter that `add_adapter` made of a config or `is_trainable=True` loaded, under the
        names that a `PeftModel` gives them (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.sql.weight`).

        They are fp32 whatever the model's dtype (fp64 of fp64), and in no `state_dict` of the model. What an optimizer
        makes of them is served from the next call on. Code that writes to them past both torch's optimizers and
        autograd (`parameter.data`) calls `refresh_adapter` afterwards.

        Raises:
            UnknownAdapterError: there is none of that name. AdapterError: it has no parameters.
        """
        trained, config = self._trained(adapter_name), self._registry.adapter(adapter_name).config
        for key, parameter in trained.parameters.items():
            yield peft_name(key, adapter_name, config), parameter

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters, or no more: PEFT's name. One that is not trained can be merged and folded.

        Raises:
            UnknownAdapterError: there is none of that name. AdapterError: it has no parameters.
            AdapterInUseError: it is folded into the weights, or a merge of it is in use.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        found = [self._trained(name) for name in names]
        with self._lock:
            if requires_grad:
                for name in names:
                    self._registry.forget_made_of(name)
            for one in found:
                one.require_grad(requires_grad)

    def refresh_adapter(self, adapter_name: str) -> None:
        """Have the next call read the parameters of an adapter again, whatever changed them; raises as
        `named_parameters`."""
        self._trained(adapter_name).refresh()

    def get_rng_state(self, adapter_name: str) -> dict[str, int]:
        """Where an adapter's dropout (`lora_dropout`) is: its `seed`, which `add_adapter` was given, else torch's;
        `step`, how many steps optimizers have made; `rows`, how many rows were computed since. With the parameters and
        the optimizer's state, it lets a run go on as if it was not interrupted. Raises as `named_parameters`."""
        return self._trained(adapter_name).dropout.state

    def set_rng_state(self, adapter_name: str, state: Mapping[str, int]) -> None:
        """Go on from what `get_rng_state` returned; raises as `named_parameters`."""
        self._trained(adapter_name).dropout.restore(state)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, of all adapters, and how many there are with the model's."""
        with self._lock:
            keys = [loaded.key for loaded in self._registry.on_host().values()]
            own = [one for key in keys if (one := self._store[key].source) is not None]
        adapters = [parameter for one in own if isinstance(one, Trained) for parameter in one.parameters.values()]
        trained = sum(parameter.numel() for parameter in adapters if parameter.requires_grad)
        base = list(self._model.parameters())
        trained += sum(parameter.numel() for parameter in base if parameter.requires_grad)
        return trained, sum(parameter.numel() for parameter in (*base, *adapters))

    def print_trainable_parameters(self) -> None:
        """Print both, and the one in per cent of the other, as PEFT does."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total if total else 0.0
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def _trained(self, name: str) -> Trained:
        packed = self._registry.packed(name)
        trained = None if packed is None else packed.source
        if not isinstance(trained, Trained):
            source = self._registry.info(name).source
            raise errors.AdapterError(
                f"adapter {name!r} from {source} has no parameters; is_trainable=True of load_adapter gives it some"
            )
        return trained

    def _train(self, name: str, adapter: Adapter, keys: Mapping[int, Keys], seed: int | None) -> None:
        """Give a registered adapter parameters. The first one freezes the model's own, as PEFT does. `seed`: of its
        dropout; torch's if None."""
        with self._lock:
            packed = self._registry.packed(name)
            assert packed is not None  # it was made in memory
            dtype = torch.promote_types(packed.blob.dtype, torch.float32)
            own = [packed.size(at) for at, device in enumerate(self._store.devices) if device.type == "cpu"]
            self._store.keep(packed, sum(own) * dtype.itemsize, f"adapter {name!r}")  # its parameters, beside its blob
            fixed = adapter.config.get("init_lora_weights") == "mica"  # PEFT trains the B of "MiCA"
            bases = {index: self._measured_by(self._registry.paths[index]) for index in keys}
            paths = {index: self._registry.paths[index] for index, own in keys.items() if own.kind in ("lora", "dora")}
            paths = {index: path for index, path in paths.items() if self.bases[path].linear}
            chance = adapter.config.get("lora_dropout") or 0.0
            dropout = Dropout(chance, torch.initial_seed() if seed is None else seed, paths)
            one = Trained(adapter.tensors, keys, bases, packed, self._store.devices, self._store.homes, fixed, dropout)
            if self._shared.training is None:
                self._thawed = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
                for parameter in self._thawed:
                    parameter.requires_grad_(False)
                self._shared.training = Training(self._store, self._router.made, self._router.again)
            packed.source = one
            tensors = {key: parameter.detach() for key, parameter in one.parameters.items()}
            self._registry.hold(name, adapter.holding({**adapter.tensors, **tensors}))

    def _measured_by(self, path: str) -> Base:
        """A module's weight and bias, in fp32 or, of a model in that, fp64."""
        base, module = self.bases[path], self._model.get_submodule(path)
        scale, offset, turned = base.embed_scale or 1.0, base.offset or 0.0, bool(base.turned)
        padding = getattr(module, "padding_idx", None)
        if base.dtype is not torch.float64 or (base.turned is None and base.offset is None):
            return Base(base.weight, base.bias, base.row_norms, scale, padding, offset, turned)
        held: Any = module._parameters
        weight = held["weight"].detach()

        def wide() -> Tensor:
            return weight.t() * scale if turned else weight.clone()

        def row_norms(b: Tensor, a: Tensor, scale: float) -> Tensor:
            return dispatch.row_norms(wide(), b, a, scale)

        return Base(wide, lambda: held.get("bias"), row_norms, scale, padding, offset, turned)

    def _thaw(self) -> None:
        """Undo what the first `_train` did to the model's own parameters."""
        if self._shared.training is not None:
            for parameter in self._thawed:
                parameter.requires_grad_(True)
