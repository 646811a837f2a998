"""Adapter -> one `Delta` a module. One file a PEFT type; each is a pure function of one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from .. import errors
from ..adapters.adapter import Adapter
from .adalora import ADALORA
from .adamss import ADAMSS
from .beft import BEFT
from .boft import BOFT
from .cut import Cut
from .deft import DEFT
from .delora import DELORA
from .delta import BaseLinear, Conv, Delta, Dense, approximate, exactly
from .dense import C3A, FOURIERFT, HIRA, SHIRA, WAVEFT
from .frod import FROD
from .gather import gather
from .gather import module_names as _module_names
from .glora import GLORA
from .gralora import GRALORA
from .hra import HRA
from .ia3 import IA3
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA
from .lycoris import LYCORIS
from .miss import MISS
from .module import Lowering, Module
from .names import Names
from .narrow import narrow
from .native import NATIVE, to_adapter
from .oft import OFT
from .osf import OSF
from .own import added_once, own_parts
from .parts import lower_module
from .peanut import PEANUT
from .psoft import PSOFT
from .pvera import PVERA
from .randlora import RANDLORA
from .rewritten import is_rewriting, untouched
from .road import ROAD
from .saved import LN_TUNING
from .several import check_one, part_of
from .supertuning import SUPERTUNING
from .targets import some
from .tinylora import TINYLORA
from .tokens import TRAINABLE_TOKENS
from .turn import Turn
from .unilora import UNILORA
from .vblora import VBLORA
from .vera import VERA

LOWERINGS: dict[str, Lowering] = {
    "ADALORA": ADALORA, "ADAMSS": ADAMSS, "BEFT": BEFT, "BOFT": BOFT, "C3A": C3A, "DEFT": DEFT, "DELORA": DELORA,
    "DELTA": NATIVE, "FOURIERFT": FOURIERFT, "FROD": FROD, "GLORA": GLORA, "GRALORA": GRALORA, "HIRA": HIRA,
    "HRA": HRA, "IA3": IA3, "LN_TUNING": LN_TUNING, "LOHA": LOHA, "LOKR": LOKR, "LORA": LORA, "LYCORIS": LYCORIS,
    "MISS": MISS, "OFT": OFT, "OSF": OSF, "PEANUT": PEANUT, "PSOFT": PSOFT, "PVERA": PVERA, "RANDLORA": RANDLORA,
    "ROAD": ROAD, "SHIRA": SHIRA, "SUPERTUNING": SUPERTUNING, "TINYLORA": TINYLORA,
    "TRAINABLE_TOKENS": TRAINABLE_TOKENS, "UNILORA": UNILORA, "VBLORA": VBLORA, "VERA": VERA, "WAVEFT": WAVEFT,
}  # fmt: skip

# PEFT's other types, with the reason that makes each no function of one row and one module.
REFUSED = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        "it adds virtual tokens to the prompt, not deltas to linears",
    ),
    "ADAPTION_PROMPT": "it adds virtual tokens inside attention, not deltas to linears",
    "LILY": "what it adds to a token depends on all other tokens of the call, those of other rows among them",
    "SHADOW": "it runs a small model of its own beside the base, whose states all layers exchange",
    "XLORA": "an X-LoRA runs the model twice and mixes adapters by what it sees; its classifier is not in the file",
    "POLY": "it mixes its factors by task_ids, an input of the call that no model of transformers has",
}


@dataclass(frozen=True)
class Lowered:
    """An adapter on one model.

    Args:
        deltas: dotted path -> what it does there.
        missing: paths of what its config targets and its files have nothing for: the base there, as in PEFT.
        unused: what its files call modules that the model does not have and does without.
    """

    deltas: Mapping[str, Delta]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def remark(self) -> str:
        """What the user should be told of it, "" if nothing."""
        remarks = []
        if self.missing:
            remarks.append(
                f"its config targets {some(self.missing)}, for which it has no weights: the base serves there, as in "
                f"PEFT"
            )
        if self.unused:
            remarks.append(
                f"it has weights for {some(self.unused)}, which this model does not have and does without: they change "
                f"nothing"
            )
        return "; ".join(remarks)


def lower(
    adapter: Adapter,
    bases: Mapping[str, BaseLinear],
    approximately: int | None = None,
    *,
    dense: bool = False,
    model: nn.Module | None = None,
    strict: bool = False,
    trainable: bool = False,
) -> Lowered:
    """Lower `adapter` for a model whose linears are `bases` (dotted path -> linear).

    Args:
        approximately: the rank at which deltas of full rank may be approximated. `dense`: whether they may be stored as
            the matrices that they are. With neither they are refused.
        model: the model itself, by whose rules names of older versions are understood; None takes its names only.
        strict: whether to refuse what there is a `remark` on.
        trainable: have a delta of what `modules_to_save` names even where it is the base's yet.

    Raises:
        UnsupportedAdapterError: the type or one of its options is not served.
        AdapterError: it does not fit the model.
    """
    check_full_rank(approximately, dense)
    names = Names(model, bases)
    adapter = part_of(adapter, names)
    lowering = _lowering_of(adapter)
    deltas: dict[str, Delta] = {}
    gathered = gather(adapter, lowering, names)
    lowered = Lowered(deltas, tuple(gathered.missing), tuple(gathered.unused))
    if strict and lowered.remark:
        raise errors.AdapterError(f"adapter from {adapter.source}: {lowered.remark}; strict=True refuses that")
    refused: list[tuple[BaseLinear, str]] = []
    for module in gathered.modules:
        base, delta = module.base, lower_module(module, lowering, trainable)
        if base.owner:
            _check_idle(module, delta)
            delta = Delta()
        if not isinstance(delta, Dense):
            deltas[base.name] = delta
        elif dense:
            deltas[base.name] = exactly(delta, base)
        elif approximately is not None:
            deltas[base.name] = approximate(delta, base, approximately)
        else:
            refused.append((base, delta.why))
    if refused:
        _refuse_full_rank(adapter, refused)
    _check_vocabularies(deltas, bases, adapter.source)
    return lowered


def lower_own(
    adapter: Adapter,
    bases: Mapping[str, BaseLinear],
    approximately: int | None = None,
    *,
    dense: bool = False,
    model: nn.Module | None = None,
    strict: bool = False,
    trainable: bool = False,
) -> Lowered:
    """As `lower`, this process's part of a model that tensor parallelism has split (`BaseLinear.cut`). All processes
    call it with the same adapter, since what it reads of the base may take all of them.

    Raises:
        UnsupportedAdapterError, AdapterError: as `lower`; and where a part cannot do what the whole does.
    """
    if not any(base.cut for base in bases.values()):
        return lower(adapter, bases, approximately, dense=dense, model=model, strict=strict, trainable=trainable)
    narrowed = narrow(adapter, Names(model, bases))
    if narrowed is None:
        lowered = lower(adapter, bases, approximately, dense=dense, model=model, strict=strict, trainable=trainable)
        return replace(lowered, deltas=own_parts(lowered.deltas, bases))
    part, narrower = narrowed
    lowered = lower(part, narrower, approximately, dense=dense, model=model, strict=strict)
    return replace(lowered, deltas={path: added_once(delta, bases[path]) for path, delta in lowered.deltas.items()})


def check_full_rank(approximately: object, dense: bool) -> None:
    """Raise `AdapterError` unless these say how deltas of full rank are served."""
    if approximately is not None and (type(approximately) is not int or approximately < 1):
        raise errors.AdapterError(f"approximate is {approximately!r}; it must be a rank: a positive integer")
    if dense and approximately is not None:
        raise errors.AdapterError(
            f"approximate is {approximately} and dense is true: a delta of full rank is served at a rank, or all of "
            f"it; give one of them"
        )


def _refuse_full_rank(adapter: Adapter, modules: Sequence[tuple[BaseLinear, str]]) -> None:
    """`modules`: what has a delta of full rank, and why."""
    base, why = modules[0]
    sizes = [base.out_features * base.in_features * max(2, base.dtype.itemsize) for base, _ in modules]
    raise errors.UnsupportedAdapterError(
        f"adapter from {adapter.source}: the {adapter.peft_type} delta of {base.name} has full rank ({why}), so it is "
        f"served in one of two ways that you choose. dense=True serves it exactly, as the matrix itself: a copy of the "
        f"weight for this adapter, {sizes[0]:,} bytes here and {sum(sizes):,} for its {len(sizes)} modules of full "
        f"rank. approximate=RANK serves the nearest delta of that rank and reports its error"
    )


def _check_idle(module: Module, delta: Delta | Dense) -> None:
    """Of a module that is read and never called: PEFT trains nothing there but saved modules, biases and tokens, and
    what it did not train changes nothing."""
    if isinstance(delta, Dense) or not delta.is_zero:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: this model's {module.base.owner} computes with its weights and never calls it, so that "
            f"no row could have its own; leave it out of the adapter (exclude_modules), or merge that into the model's "
            f"weights before it is patched"
        )


def _check_vocabularies(deltas: Mapping[str, Delta], bases: Mapping[str, BaseLinear], source: str) -> None:
    """Refuse an embedding of another number of tokens without the head of as many that its model had."""
    for name, delta in deltas.items():
        if not delta.replaces or bases[name].embed_scale is None:
            continue
        heads = [base for base in bases.values() if base.head and base.out_features == bases[name].in_features]
        if lacking := [base.name for base in heads if base.name not in deltas or deltas[base.name].rank != delta.rank]:
            raise errors.UnsupportedAdapterError(
                f"adapter from {source}, module {name}: it was saved with {delta.rank} tokens and this model has "
                f"{bases[name].in_features}, which is served beside a saved {lacking[0]} of {delta.rank}, that the "
                f"file does not have: what its model answers for the others is not known. Resize the model first "
                f"(resize_token_embeddings)"
            )


def _lowering_of(adapter: Adapter) -> Lowering:
    """The lowering of the adapter's type; raises `UnsupportedAdapterError` if there is none."""
    if (lowering := LOWERINGS.get(adapter.peft_type)) is not None:
        return lowering
    why = REFUSED.get(adapter.peft_type)
    raise errors.UnsupportedAdapterError(
        f"adapter from {adapter.source}: peft_type {adapter.peft_type!r} is not served"
        + (f": {why}" if why else f"; served types: {', '.join(sorted(LOWERINGS))}")
    )


def module_names(adapter: Adapter) -> list[str]:
    """The modules that `adapter` changes, by the names in its files.

    Raises:
        UnsupportedAdapterError: its type, an option or a tensor is not served.
    """
    check_one(adapter)
    return _module_names(adapter, _lowering_of(adapter))


__all__ = [
    "LOWERINGS",
    "REFUSED",
    "BaseLinear",
    "Conv",
    "Cut",
    "Delta",
    "Lowered",
    "Names",
    "Turn",
    "check_full_rank",
    "is_rewriting",
    "lower",
    "lower_own",
    "module_names",
    "own_parts",
    "part_of",
    "to_adapter",
    "untouched",
]
