"""`mlora inspect`: what an adapter is, and whether it is served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from mlora.serve.tokenizers import files_of

from .adapters import Given, expanded, find
from .errors import InputError, as_input_errors, one_line_errors
from .models import check_device, check_model
from .options import (
    ApproximateOption,
    DenseOption,
    DeviceOption,
    DtypeOption,
    IgnoreOption,
    PickleOption,
    StrictOption,
    check_full_rank,
)
from .shapes import linears_of

# Options whose tensors do not tell the widths of what they change.
_FROM_BASE = ("use_bdlora", "target_parameters")


def inspect(
    folder: Annotated[str, typer.Argument(help="A PEFT adapter folder, a .safetensors file, a URL or a hub id.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Also load it into this base model (hub id or folder).")
    ] = None,
    approximate: ApproximateOption = None,
    dense: DenseOption = False,
    strict: StrictOption = False,
    ignore: IgnoreOption = None,
    allow_pickle: PickleOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Show what an adapter is, and whether mlora serves it exactly or refuses it, and why."""
    with one_line_errors():
        source = expanded(folder)
        path, model = find(Given(folder, folder, source, None), "adapter"), check_model(model)
        if model is None and (strict or dense or approximate is not None):
            option = "--strict" if strict else "--dense" if dense else "--approximate"
            raise InputError(f"{option} needs what the base model tells; wanted --model beside it")
        check_full_rank(approximate, dense)
        check_device(device, dtype)
        from rich.console import Console

        from mlora import Adapter
        from mlora.errors import MloraError
        from mlora.lowering import is_rewriting, module_names

        out = Console(soft_wrap=True, highlight=False, markup=False)
        adapter = Adapter.from_pretrained(source, allow_pickle=allow_pickle, ignore=ignore or ())
        with as_input_errors():
            files = files_of(folder, source, path)
        linears = linears_of(adapter.tensors)
        copied = any(key.endswith("base_layer.weight") for key in adapter.tensors)  # to be compared with the base
        rewriting = is_rewriting(adapter.config)  # it is another LoRA beside the base
        ranks = sorted({rank for rank, _, _ in linears.values()})
        options = {k: v for k, v in sorted(adapter.config.items()) if v is not None and v not in ({}, [], "")}
        out.print(f"source   {adapter.source}")
        out.print(f"type     {adapter.peft_type}")
        out.print("options  " + ", ".join(f"{key}={_short(value)}" for key, value in options.items()))
        if adapter.ignored:
            out.print(f"ignored  {', '.join(adapter.ignored)}")
        if files:
            out.print(f"brings   a tokenizer or chat template ({', '.join(file.name for file in files)})")
        out.print(f"ranks    {', '.join(map(str, ranks)) or '-'}")
        size = sum(tensor.nbytes for tensor in adapter.tensors.values())
        out.print(f"bytes    {size:,} in {len(adapter.tensors)} tensors")
        try:
            names = module_names(adapter)
            kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
            out.print(f"modules  {len(names)} ({', '.join(kinds)})")
            if model is not None:
                import mlora
                from mlora.cli.models import load_model

                runtime = mlora.patch(load_model(model, device, dtype))
                info = runtime.add_adapter("inspected", adapter, approximate=approximate, dense=dense, strict=strict)
                exact = f"with an error of up to {info.error:.1e}" if info.errors else "exactly"
                where = f"on {len(info.modules)} modules of {model}; {info.bytes:,} bytes there"
                out.print(f"served   {exact}, {where}")
                if info.dense:
                    size = sum(info.dense.values())
                    out.print(f"dense    {size:,} of these bytes are whole matrices, of {len(info.dense)} modules")
                for name, error in sorted(info.errors.items(), key=lambda item: -item[1]):
                    out.print(f"error    {error:.1e} {name}")
                zero = info.zero
            elif set(linears) == set(names) and not (copied or any(map(adapter.config.get, _FROM_BASE)) or rewriting):
                zero = _is_zero(adapter, linears)
                out.print("served   yes (pass --model to check that it fits a base model)")
            else:
                zero = False
                out.print("served   its options and tensors are known; pass --model to check it against a base model")
            if zero:
                out.print(
                    "note     its delta is zero, so that it changes nothing: it was never trained, or is scaled by 0"
                )
        except MloraError as error:
            out.print("served   no")
            raise RuntimeError(f"refused: {error}") from None


def _is_zero(adapter: Any, modules: Mapping[str, tuple[int, int, int]]) -> bool:
    """Whether the delta of `adapter` is zero, as far as its own tensors tell: it is lowered for stand-in linears and
    convolutions of its own widths. Raises MloraError as loading would."""
    import torch

    from mlora.lowering import BaseLinear, lower
    from mlora.merge.offline import conv_of

    asked = []

    def stand_in(name: str, inputs: int, outputs: int) -> BaseLinear:
        def weight() -> torch.Tensor:
            asked.append(name)
            return torch.ones(outputs, inputs)

        return BaseLinear(name, inputs, outputs, weight, lambda: None, conv=conv_of(adapter.tensors, name))

    lowered = lower(adapter, {name: stand_in(name, *widths) for name, (_, *widths) in modules.items()})
    zero = all(delta.is_zero for delta in lowered.deltas.values())
    return zero and not asked


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
