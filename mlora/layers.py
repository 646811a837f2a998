"""The layers: a patched module is an instance of a generated subclass of its own class.

Swapping the class, as `torch.nn.utils.parametrize` does, leaves parameters, hooks, quantized storage
and `state_dict` keys exactly as they are, and swapping it back leaves no trace.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import errors
from .lowering import BaseLinear
from .ops import dispatch, reference
from .ops.rows import check_rows
from .routing import Local, Plan, Siblings
from .store import GAIN, IN_GAIN

MODULE_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)

_DENSE = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
_IDENTITY_ROWS = 1024  # of the identity that is sent through a quantized linear at a time

# A list of this name holds experts, whose inputs are tokens gathered from any rows in any order.
GATHERED = "experts"


class Shared:
    """What all layers of one patched model share. Tensors here keep their addresses for good.

    Args:
        arena, plan: the arena and the plan buffer that compiled code reads.
        local: per thread, the plan that eager code reads.
        default: the plan of `Runtime.set_adapter`, for threads without one of their own.
        blank: a plan that routes nothing.
        fused: whether the base product may be computed by mlora's own kernel.
        groups: first layer's number -> the layers that read the same input after it (q, k, v; gate, up), learned as
            calls come; None where one launch for several modules gains nothing.
    """

    def __init__(self, arena: Tensor, plan: Tensor, fused: bool) -> None:
        self.arena = arena
        self.plan = plan
        self.local = Local()
        self.default: Plan | None = None
        self.blank = torch.zeros(8, dtype=torch.int32, device=plan.device)
        self.fused = fused
        self.in_gains = False
        grouped = dispatch.backend(arena.device, arena.dtype) in ("cuda", "emulation")
        self.groups: dict[int, tuple[LoraLayer, ...]] | None = {} if grouped else None


class LayerState:
    """What one layer knows beside its module's own parameters.

    Args:
        name: its dotted path. `index`: its number in the store.
        table: this module's rows of the store's tables, int64 (slots, TABLE_WIDTH).
        dtype: of its activations.
        fused: whether the base product may be computed by `dispatch.linear`.
        kblocks: tokens and threads -> the accumulation block with which that op gives the library's
            bits, 0 if none does; filled as they occur.
        outer: the `forward` that somebody put on the instance, called for the base, or None. Not one that
            keeps the module's own in another attribute, as accelerate's hooks do: there `swap_forward`
            exchanges what it wraps.
    """

    __slots__ = ("device", "dtype", "fused", "gathered", "index", "kblocks", "name", "outer", "shared", "table")

    def __init__(
        self, name: str, index: int, shared: Shared, table: Tensor, module: nn.Module, dtype: torch.dtype
    ) -> None:
        self.name = name
        self.index = index
        self.shared = shared
        self.table = table
        self.dtype, self.device = dtype, shared.arena.device
        wraps = bound_forwards(module, type(module).forward)
        self.outer: Callable[..., Tensor] | None = None if wraps else module.__dict__.get("forward")
        self.gathered = GATHERED in name.split(".")[:-1]
        self.kblocks: dict[tuple[int, int], int] = {}
        self.fused = (
            shared.fused
            and self.outer is None
            and type(module).forward is nn.Linear.forward
            and self.dtype == shared.arena.dtype == torch.bfloat16
            and self.device.type == "cpu"
            and is_dense(module.weight)  # not a quantized tensor that acts as one of bf16
            and cast(Tensor, module.weight).is_contiguous()
        )

    def kblock(self, module: nn.Module, tokens: int) -> int:
        """The block for an input of `tokens` tokens; see `dispatch.probe_kblock`."""
        key = tokens, torch.get_num_threads()
        if key not in self.kblocks:
            out_features, in_features = cast(Tensor, module.weight).shape
            self.kblocks[key] = dispatch.probe_kblock(in_features, out_features, module.bias is not None, tokens)
        return self.kblocks[key]


class LoraLayer(nn.Module):
    """Mixed in before a linear's class; see the module's docstring."""

    _mlora: LayerState
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        if x is None:  # nn.Linear calls it `input`
            assert input is not None
            x = input
        state = self._mlora
        shared = state.shared
        if torch.compiler.is_compiling():
            return self._compiled(x)
        plan = shared.local.plan or shared.default
        touches = plan.touches[state.index] if plan is not None else 0
        if touches:
            assert plan is not None
            self._check(x, plan)
            words = plan.tensor
        else:
            words = shared.blank
        if state.fused and not touches & IN_GAIN and (kblock := self._fusable(x)):
            return dispatch.linear(x, self.weight, self.bias, shared.arena, state.table, words, kblock)
        if not touches:
            return self._base(x)
        if plan is not None and shared.groups is not None and not torch.is_grad_enabled() and not x.is_inference():
            return self._grouped(x, plan, touches)
        return self._routed(x, words, touches)

    def _grouped(self, x: Tensor, plan: Plan, touches: int) -> Tensor:
        """`_routed`, but the first of several layers that read one input serves them all in one launch; the others
        find their results. An inference tensor, which does not tell whether it was written to in between, is not
        grouped."""
        state = self._mlora
        shared, seen = state.shared, state.shared.local.siblings
        groups = shared.groups
        assert groups is not None
        if seen is not None and seen.input is x and seen.version == x._version and seen.plan is plan:
            ready = seen.results.pop(state.index, None)
            if ready is None:
                known = groups.get(seen.first, ())
                if len(known) < dispatch.GROUP - 1 and self not in known and state.index != seen.first:
                    groups[seen.first] = (*known, self)
                return self._routed(x, plan.tensor, touches)
            return ready
        if seen is not None and seen.results:  # not called after all: not siblings
            left = groups.get(seen.first, ())
            groups[seen.first] = tuple(layer for layer in left if layer._mlora.index not in seen.results)
        seen = shared.local.siblings = Siblings(x, x._version, plan, state.index, {})
        others = [
            layer
            for layer in groups.get(state.index, ())
            if plan.touches[layer._mlora.index]
            and not (plan.touches[layer._mlora.index] | touches) & IN_GAIN
            and layer._mlora.outer is None
            and "forward" not in layer.__dict__
        ]
        if not others:
            return self._routed(x, plan.tensor, touches)
        layers = [self, *others]
        outputs = [layer._base(x) for layer in layers]
        dispatch.apply_group_(outputs, x, shared.arena, [layer._mlora.table for layer in layers], plan.tensor)
        for layer, output in zip(others, outputs[1:], strict=True):
            seen.results[layer._mlora.index] = output
        return outputs[0]

    def _base(self, x: Tensor) -> Tensor:
        outer = self._mlora.outer
        return super().forward(x) if outer is None else outer(x)

    def _fusable(self, x: Tensor) -> int:
        """The block with which the fused op may serve `x`, or 0."""
        tokens = x.numel() // x.shape[-1]
        if not 0 < tokens <= dispatch.FUSED_MAX_TOKENS or x.dtype is not torch.bfloat16:
            return 0
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return 0
        if torch.is_autocast_enabled("cpu"):  # the library would compute in autocast's dtype
            return 0
        return self._mlora.kblock(self, tokens)

    def _routed(self, x: Tensor, words: Tensor, touches: int) -> Tensor:
        """The base, then one op. With input gains the base reads u * x, and rows that also take an
        output gain from another adapter need base(x) beside it: deltas add without a cross term."""
        state = self._mlora
        arena, table = state.shared.arena, state.table
        source = None
        if touches & IN_GAIN:
            if touches & GAIN:
                source = self._base(x)
            y = self._base(dispatch.scale_input(x, arena, table, words))
        else:
            y = self._base(x)
        if y.requires_grad or (x.requires_grad and torch.is_grad_enabled()):
            return reference.apply(y, source, x, arena, table, words)
        dispatch.apply_(y, source, x, arena, table, words)
        return y

    def _compiled(self, x: Tensor) -> Tensor:
        """What a compiled graph runs: always the same ops, whose inputs only change their contents."""
        state = self._mlora
        shared = state.shared
        self._check_autocast(x)
        if state.gathered:
            check_rows(shared.plan, 0)  # only one entry for all rows may pass
        touches = GAIN | IN_GAIN if shared.in_gains else GAIN
        return self._routed(x, shared.plan, touches)

    def _check(self, x: Tensor, plan: Plan) -> None:
        state = self._mlora
        self._check_autocast(x)
        if x.dtype != state.dtype or x.device != state.device:
            raise errors.ModelMovedError(
                f"{state.name} got an input in {x.dtype} on {x.device}; the model was patched in {state.dtype} on "
                f"{state.device}. Unpatch, move the model and patch again"
            )
        self._check_rows(x, plan)

    def _check_rows(self, x: Tensor, plan: Plan) -> None:
        state = self._mlora
        if plan.uniform:
            return
        rows = x.shape[0] if x.dim() > 1 else 1
        if not state.gathered:
            if rows in plan.row_counts:
                return
            length = state.shared.local.length
            if x.dim() == 2 and length and any(rows == count * length for count in plan.row_counts):
                return  # (rows, length, in) flattened in order
        what = "an expert, which gets tokens gathered from any rows" if state.gathered else "the module"
        raise errors.AttributionError(
            f"{state.name} got an input of shape {tuple(x.shape)}, which cannot be attributed to the batch's "
            f"{plan.rows} rows ({what}); use one adapter for all rows, or adapters that do not target it"
        )

    def _check_autocast(self, x: Tensor) -> None:
        if torch.is_autocast_enabled(x.device.type):
            state = self._mlora
            raise errors.ModelMovedError(
                f"{state.name} runs under autocast to {torch.get_autocast_dtype(x.device.type)}; the model was patched "
                f"in {state.dtype}. Leave autocast, or unpatch the model, convert it, and patch it again"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_move(self, fn)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


class EmbeddingLayer(LoraLayer):
    """Mixed in before an embedding's class: the delta is looked up by token, in rank rows of (rank, vocab)."""

    num_embeddings: int

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        state = self._mlora
        shared = state.shared
        if torch.compiler.is_compiling():
            check_rows(shared.plan, input.shape[0])
            words = shared.plan
        else:
            plan = shared.local.plan or shared.default
            if plan is None or not plan.touches[state.index]:
                return self._base(input)
            self._check_rows(input, plan)
            words = plan.tensor
        y = self._base(input)
        if y.requires_grad:
            return reference.embed(y, input, shared.arena, state.table, words, self.num_embeddings)
        dispatch.embed_(y, input, shared.arena, state.table, words, self.num_embeddings)
        return y


def mixin_of(module: nn.Module) -> type[LoraLayer]:
    """The layer class that serves a module of `find_layers`."""
    return EmbeddingLayer if isinstance(module, nn.Embedding) else LoraLayer


def bound_forwards(module: nn.Module, forward: Callable[..., Any]) -> list[str]:
    """The attributes in which `module` itself holds `forward`, bound to it."""
    return [
        name
        for name, value in module.__dict__.items()
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is forward
    ]


def swap_forward(module: nn.Module, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put `new` wherever `module` itself holds `old`, bound to it."""
    for name in bound_forwards(module, old):
        module.__dict__[name] = MethodType(new, module)


def guard_moves(module: nn.Module) -> None:
    """Make a module that has layers below it refuse a move before it moves any of its other children."""

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_move(module, fn)
        return type(module)._apply(module, fn, recurse)

    module.__dict__["_apply"] = apply


def refuse_copy() -> NoReturn:
    raise errors.PatchError(
        "a patched model can be neither copied nor pickled; unpatch it first, or save it with save_pretrained or its "
        "state_dict"
    )


def refuse_move(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise if `fn`, which `nn.Module.to` and its like pass to `_apply`, would move a parameter."""
    for tensor in (*module.parameters(), *module.buffers()):
        probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)  # quantized tensors lack new_empty
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise errors.ModelMovedError(
                f"the model is patched in {probe.dtype} on {probe.device} and cannot be moved to {moved.dtype} on "
                f"{moved.device}; unpatch it, move it, patch it again"
            )


_swapped: dict[tuple[type, type], type] = {}


def swap_class(module: nn.Module, mixin: type) -> None:
    """Give `module` a subclass of (mixin, its own class) that keeps the class's name."""
    cls = type(module)
    if (mixin, cls) not in _swapped:
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _swapped[mixin, cls] = type(cls.__name__, (mixin, cls), body)
    module.__class__ = _swapped[mixin, cls]


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`."""
    module.__class__ = type(module).__bases__[1]


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted path -> every module that can be patched; a shared module comes once for each path.

    These are linears, and embeddings of tokens. Linears whose owner reads their weight without calling them are left
    out, since a layer there would silently do nothing: `nn.MultiheadAttention`'s projections and
    `nn.TransformerEncoderLayer`'s.
    """
    bypassed = {
        id(child)
        for module in model.modules()
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        for child in module.children()
    }
    tokens = {id(module) for module in token_embeddings(model)}
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and id(module) not in bypassed
        and (isinstance(module, MODULE_CLASSES) or id(module) in tokens or is_packed_linear(module))
    }


def token_embeddings(model: nn.Module) -> Iterator[nn.Embedding]:
    """What parts of `model` name as their `get_input_embeddings`. Other embeddings are left out, since what they look
    up (positions, distances of two tokens) need not lie in rows of the batch; and so are those that do more than look
    up and scale by an `embed_scale`."""
    for part in model.modules():
        try:
            found: Any = part.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        found = getattr(found, "base_layer", found)  # of a layer of PEFT's that is about to be taken out
        if not isinstance(found, nn.Embedding) or found.max_norm is not None or not is_dense(found.weight):
            continue
        if type(found).forward is nn.Embedding.forward or hasattr(found, "embed_scale"):
            yield found


def is_packed_linear(module: nn.Module) -> bool:
    """Whether `module`, no `nn.Linear`, is a linear whose weight is packed in a form of its own, as GPTQ's, AWQ's and
    HQQ's are: `in_features` and `out_features`, no children, a matrix among its tensors, none that is a dense `weight`,
    and a forward that takes one tensor."""
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if any(type(width) is not int for width in widths) or any(True for _ in module.children()):
        return False
    if is_dense(getattr(module, "weight", None)) or not any(tensor.dim() >= 2 for tensor in _tensors(module)):
        return False
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(required) == 1 and required[0].kind is not inspect.Parameter.KEYWORD_ONLY


def is_dense(weight: Any) -> bool:
    """Whether `weight` is a plain floating-point tensor: no subclass, which may be quantized, and no 8-bit float,
    whose scale is kept elsewhere."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in _DENSE


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def model_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point dtype that most of the model's parameters are in; torch's default if there is none."""
    found = Counter(p.dtype for p in model.parameters() if p.dtype in _DENSE)
    return found.most_common(1)[0][0] if found else torch.get_default_dtype()


def compute_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of the activations that `module` works on: its weight's or its bias's, and `default`, the model's,
    where the weight is packed and there is no bias."""
    for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
        if isinstance(tensor, Tensor) and tensor.dtype in _DENSE:
            return tensor.dtype
    return default


def base_linear(name: str, module: nn.Module, originals: Callable[[], Mapping[str, Tensor]] = dict) -> BaseLinear:
    """What a lowering may ask of `module`. `originals` gives the weight and bias where the module's own are not the
    base's, because something is folded in."""
    transposed, embed_scale = isinstance(module, (Conv1D, nn.Embedding)), None
    if isinstance(module, nn.Embedding):  # in the dtype in which it multiplies
        embed_scale = float(torch.as_tensor(getattr(module, "embed_scale", 1.0)).to(module.weight.dtype))
    if transposed:
        in_features, out_features = cast(Tensor, module.weight).shape
    else:
        in_features, out_features = cast(nn.Linear, module).in_features, cast(nn.Linear, module).out_features

    def weight() -> Tensor:
        tensor = originals().get("weight", getattr(module, "weight", None))
        if any(t.is_meta for t in _tensors(module)):
            raise errors.UnsupportedAdapterError(
                f"module {name}: this adapter's delta depends on the base weight, which is offloaded "
                f"({type(module).__name__})"
            )
        if not is_dense(tensor):
            tensor = dequantize(name, module)
        dense = cast(Tensor, tensor).detach().to("cpu", torch.float32)
        dense = dense.t() if transposed else dense
        dense = dense if embed_scale in (None, 1.0) else dense * embed_scale
        if dense.shape != (out_features, in_features):
            raise errors.UnsupportedAdapterError(
                f"module {name}: its weight dequantizes to shape {tuple(dense.shape)}; it must be "
                f"({out_features}, {in_features})"
            )
        return dense

    def bias() -> Tensor | None:
        tensor = originals().get("bias", getattr(module, "bias", None))
        return tensor.detach().to("cpu", torch.float32) if isinstance(tensor, Tensor) else None

    held: Any = getattr(module, "weight", None)
    dtype = held.dtype if is_dense(held) else torch.float32
    return BaseLinear(name, in_features, out_features, weight, bias, embed_scale, dtype)


def dequantize(name: str, module: nn.Module) -> Tensor:
    """The dense weight of a quantized linear, laid out as its `weight` would be.

    Tensor subclasses that define `dequantize` (torchao, quanto) are asked; so is bitsandbytes for its own. For any
    other module, packed in whatever way, it is what the module makes of the identity, in its activations' dtype.

    Raises:
        UnsupportedAdapterError: the module or its library fails at it.
    """
    weight: Any = getattr(module, "weight", None)
    try:
        with torch.no_grad():
            if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
                dense: Tensor = weight.dequantize()
                return dense
            if (state := getattr(weight, "quant_state", None)) is not None:  # bitsandbytes, 4 bits
                from bitsandbytes import functional

                dense = functional.dequantize_4bit(weight.data, state)
                return dense
            scales = getattr(weight, "SCB", None)  # bitsandbytes, 8 bits: they move into `state` at the first call
            scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
            if scales is not None:
                return weight.data.float() * (scales.float() / 127)[:, None]
            return _through_identity(module)
    except Exception as error:
        raise errors.UnsupportedAdapterError(
            f"module {name}: this adapter's delta depends on the base weight, which could not be dequantized "
            f"({type(module).__name__}: {type(error).__name__}: {error})"
        ) from error


def _through_identity(module: nn.Module) -> Tensor:
    """W, (out, in), of a linear by its own forward, called on a twin without bias: a sum with it would be rounded."""
    cls: Any = type(module).__bases__[1] if isinstance(module, LoraLayer) else type(module)
    twin: Any = object.__new__(cls)
    twin.__dict__.update({key: value for key, value in module.__dict__.items() if key != "forward"})
    for kind in ("_parameters", "_buffers"):
        held = dict(module.__dict__[kind])
        if isinstance(held.get("bias"), Tensor):
            held["bias"] = torch.zeros_like(held["bias"])
        twin.__dict__[kind] = held
    device = next(_tensors(module)).device
    width, dtype = twin.in_features, compute_dtype(module, next(t.dtype for t in _tensors(module) if t.dtype in _DENSE))
    columns = []
    for start in range(0, width, _IDENTITY_ROWS):
        rows = torch.arange(start, min(start + _IDENTITY_ROWS, width), device=device)
        x = torch.zeros(len(rows), width, dtype=dtype, device=device)
        x[torch.arange(len(rows)), rows] = 1
        columns.append(cls.forward(twin, x).float() - cls.forward(twin, torch.zeros_like(x[:1])).float())
    return torch.cat(columns).t()
