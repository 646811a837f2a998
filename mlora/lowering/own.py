"""One process's part of a delta to a module that tensor parallelism has split over several.

With s, A, B, D, G, U and c as in `Delta`, b the base's bias, and r for what process r has:

    outputs split   y_r = G_r base_r(U x) + s B_r^T (A x) + c_r
    inputs split    y   = sum_r [G W_r (U_r x_r) + s B^T (A_r x_r)] + b + c + (G - I) b

Of split outputs a process has its rows of D and its columns of B, of gains, turns and shifts; A and what is done to
inputs it has whole. Of split inputs it has its columns of A and D, and what is done to inputs there; the partial sums,
deltas included, are what the base adds up over the processes, before it adds its bias. So the first process alone adds
c, and what G would have done to that bias. Of experts that are spread over the processes it has the rank rows of its
own.

Where A and B are both split (`Cut.across`), of either kind of module A x is the sum of all A_r x_r, and process r adds
s B_r^T (A x) to its part of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from .. import errors
from .cut import Cut
from .delta import BaseLinear, Delta, Matrix
from .turn import Turn


def own_parts(deltas: Mapping[str, Delta], bases: Mapping[str, BaseLinear]) -> dict[str, Delta]:
    """This process's part of each of an adapter's deltas, dotted path -> delta; themselves where no module is split.
    Whole matrices are read here, one after another: that may take the base's weight, and with it all processes, which
    must ask for it in one order. Raises as `own_part` does."""
    if not any(base.cut for base in bases.values()):
        return dict(deltas)
    return {path: own_part(delta, bases[path]) for path, delta in deltas.items()}


def own_part(delta: Delta, base: BaseLinear) -> Delta:
    """This process's part of a delta of the whole module, which is all of it where the module is not split.

    Raises:
        UnsupportedAdapterError: the part does not do there what the delta does in the whole.
    """
    cut, matrix = base.cut, delta.matrix
    if cut is None or delta.is_empty:
        return delta if matrix is None else replace(delta, matrix=_there(matrix, matrix.read()))
    check_served(base)
    if delta.replaces:
        raise errors.UnsupportedAdapterError(
            f"module {base.name}: it is split over {cut.world} processes, where weights of another size "
            f"({delta.rank} in place of {base.out_features}) are not served; resize the model before it is split"
        )
    if cut.axis == "experts":
        return _of_experts(delta, base, cut)
    if matrix is not None:
        matrix = _there(matrix, cut.of(matrix.read(), 0 if cut.axis == "outputs" else 1).clone())
    by = {cut.axis: cut}
    sharded = bool(cut.across) and delta.a is not None and delta.b is not None
    if sharded:
        by[cut.other.axis] = cut.other
    a = by["inputs"].of(delta.a, 1) if delta.a is not None and "inputs" in by else delta.a
    b = by["outputs"].of(delta.b, 1) if delta.b is not None and "outputs" in by else delta.b
    delta = replace(delta, a=a, b=b, sharded=sharded)
    if cut.axis == "outputs":
        return replace(
            delta,
            matrix=matrix,
            gain=None if delta.gain is None else cut.of(delta.gain, 0),
            turn=None if delta.turn is None else _turn(delta.turn, base, cut),
            shift=None if delta.shift is None else cut.of(delta.shift, 0),
        )
    return replace(
        delta,
        matrix=matrix,
        in_gain=None if delta.in_gain is None else cut.of(delta.in_gain, 0),
        in_turn=None if delta.in_turn is None else _turn(delta.in_turn, base, cut),
        shift=_shift(delta, base) if cut.rank == 0 else None,
    )


def _there(matrix: Matrix, own: Tensor) -> Matrix:
    """What `own` is of it, or all, kept until it is packed."""
    outputs, inputs = own.shape
    return replace(matrix, outputs=outputs, inputs=inputs, read=lambda: own, tensor=None)


def _of_experts(delta: Delta, base: BaseLinear, cut: Cut) -> Delta:
    """The rank rows of this process's experts, which lie expert by expert."""
    if delta.a is None or delta.b is None or delta.rank % base.experts:
        raise errors.UnsupportedAdapterError(
            f"parameter {base.name}: its experts are spread over {cut.world} processes, where LoRA of them is served, "
            f"of as many rank rows for each"
        )
    each = delta.rank // base.experts
    rows = replace(cut, spans=tuple((start * each, end * each) for start, end in cut.spans))
    return replace(delta, a=rows.of(delta.a, 0), b=rows.of(delta.b, 0))


def added_once(delta: Delta, base: BaseLinear) -> Delta:
    """A delta that was lowered as narrow as this process's part, without what another process adds."""
    cut = base.cut
    if cut is not None and cut.across and delta.rank:
        delta = replace(delta, sharded=True)
    once = cut is None or cut.axis == "outputs" or cut.rank == 0
    return delta if once else replace(delta, shift=None)


def check_served(base: BaseLinear) -> None:
    """Raise `UnsupportedAdapterError` where nothing is served on a module as it is split."""
    if base.cut is not None and base.cut.why:
        raise errors.UnsupportedAdapterError(
            f"module {base.name}: {base.cut.why}; leave it out of the adapter (exclude_modules), or load the model "
            f"without splitting it"
        )


def _shift(delta: Delta, base: BaseLinear) -> Tensor | None:
    """c + (G - I) b."""
    bias = base.bias() if delta.changes_outputs else None
    shift = delta.shift
    if bias is None:
        return shift
    for part in (
        None if delta.gain is None else delta.gain * bias,
        None if delta.turn is None else delta.turn.times(bias.to(delta.turn.values.dtype)),
    ):
        if part is not None:
            shift = part if shift is None else shift + part
    return shift


def _turn(turn: Turn, base: BaseLinear, cut: Cut) -> Turn:
    block = turn.size * turn.stride
    if crossed := [edge for span in cut.spans for edge in span if edge % block]:
        raise errors.UnsupportedAdapterError(
            f"module {base.name}: it is split over {cut.world} processes at {crossed[0]} of its {cut.axis}, across one "
            f"of the adapter's blocks of {block}, which would have to be turned whole; use a number of processes whose "
            f"parts are multiples of {block}"
        )
    return Turn(cut.of(turn.values, 1), turn.stride)
