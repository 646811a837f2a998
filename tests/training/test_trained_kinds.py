"""All kinds of parameters in one mixed batch: their gradients against PEFT alone, and what these do not depend on."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import HIDDEN, VOCAB, assert_close, build, identity, logits, make_adapter, peft_alone, row_of
from gradients import ROOM, error, in_a_thread, loss_of, out_of, trained
from torch import Tensor
from trained_kinds import CASES, WIDE, base_of, batch_of, config_of, folder_of, gradients_of, peft_gradients

import mlora
from mlora import errors

SOME = (
    "head with a bias",
    "Conv1D",
    "tied head",
    "RMS norms",
    "layer norms",
    "whole embedding, scaled",
    "tokens, tied",
    "embedding, Gemma's",
    "IA3",
    "IA3 with a head",
)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_peft_alone(case, tmp_path):
    """Rows of two adapters that are trained, of one by half, of a frozen one, and of the base; fp64, or where a model
    computes parts of itself in fp32 no matter what, that."""
    kind = CASES[case]
    dtype, bound = (torch.float64, 1e-10) if kind.model in WIDE else (torch.float32, 1e-5)
    base = base_of(kind, dtype)
    folders = {name: folder_of(tmp_path, base, kind, name, seed) for seed, name in enumerate("abz")}
    model = trained(base, folders, frozen=("z",))
    batch = batch_of(kind, 6, dtype)
    entries = ["b", None, "a", "z", {"a": 0.5}, "a"]
    loss_of(out_of(model, batch, adapter_names=entries)).backward()
    for name, rows in (("a", {2: 1.0, 4: 0.5, 5: 1.0}), ("b", {0: 1.0})):
        alone = [peft_gradients(base, batch, row, folders[name], weight) for row, weight in rows.items()]
        want = {key: sum(own[key] for own in alone) for key in alone[0]}
        mine = gradients_of(model.mlora, name)
        assert all(p.dtype is torch.promote_types(dtype, torch.float32) for p in mine.values())
        assert error(mine, want) < bound
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("case", [case for case in SOME if CASES[case].model in WIDE])
def test_gradients_of_mixes(case, tmp_path):
    """With frozen and with trained ones, against central differences of the loss; fp64."""
    kind = CASES[case]
    base = base_of(kind, torch.float64)
    folders = {name: folder_of(tmp_path, base, kind, name, seed) for seed, name in enumerate("abz")}
    model = trained(base, folders, frozen=("z",))
    batch = batch_of(kind, 4, torch.float64)
    entries = [{"a": 0.5, "z": -0.75}, {"a": 1.0, "b": 0.5}, None, {"b": -0.5, "z": 1.0}]

    def loss() -> Tensor:
        return loss_of(out_of(model, batch, adapter_names=entries)).double()

    loss().backward()
    draw = torch.Generator().manual_seed(3)
    for name in "ab":
        parameters = [parameter for _, parameter in model.mlora.named_parameters(name)]
        steps = [torch.randn(p.shape, generator=draw, dtype=p.dtype) * 1e-6 for p in parameters]
        want = sum(float((p.grad * step).sum()) for p, step in zip(parameters, steps, strict=True))
        found = []
        for factor in (1, -2, 1):  # and back
            with torch.no_grad():
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter += factor * step
                found.append(float(loss()))
        assert abs((found[0] - found[1]) / 2 - want) < 1e-6 * abs(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", SOME)
def test_errors_are_not_larger_than_those_of_peft(case, dtype, tmp_path):
    """Against fp64, in the geometric mean over adapters and batches; PEFT has its own default dtypes."""
    kind = CASES[case]
    base = base_of(kind, dtype)
    folders = {name: folder_of(tmp_path, base, kind, name, seed) for seed, name in enumerate("ab")}
    model, ratios = trained(base, folders), []
    for seed in range(4):
        batch = batch_of(kind, 3, dtype, seed)
        for name in "ab":
            for _, parameter in model.mlora.named_parameters(name):
                parameter.grad = None
        loss_of(out_of(model, batch, adapter_names=["a", None, "b"])).backward()
        wide = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        for name, row in (("a", 0), ("b", 2)):
            exact = peft_gradients(copy.deepcopy(base).double(), wide, row, folders[name])
            theirs = error(peft_gradients(base, batch, row, folders[name]), exact)
            ratios.append(math.log(error(gradients_of(model.mlora, name), exact) / theirs))
    mean = math.exp(sum(ratios) / len(ratios))
    assert mean <= (2.0 if dtype is torch.float32 else 1.5), mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_new_one_starts_as_peft_does(case, dtype):
    from peft import get_peft_model

    kind = CASES[case]
    base = base_of(kind, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        wrapped = get_peft_model(copy.deepcopy(base), config_of(kind), adapter_name="sql")
    model = copy.deepcopy(base)
    runtime = mlora.patch(model, memory=ROOM)
    info = runtime.add_adapter("sql", config_of(kind), seed=3)
    want = {key: p for key, p in wrapped.named_parameters() if p.requires_grad}
    mine = dict(runtime.named_parameters("sql"))
    assert info.zero and list(mine) == list(want)
    assert all(torch.equal(mine[key], p.float()) and mine[key].requires_grad for key, p in want.items())
    assert runtime.get_nb_trainable_parameters() == wrapped.get_nb_trainable_parameters()
    batch = batch_of(kind, 2, dtype)
    assert torch.equal(logits(model, batch, adapter_names="sql"), logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_served_at_once(case, dtype, tmp_path):
    """The logits are those of the saved adapter, to the bit, and PEFT's of that; training goes on from it."""
    kind = CASES[case]
    base = base_of(kind, dtype)
    folder = folder_of(tmp_path, base, kind, "a", 0)
    model, batch = trained(base, {"a": folder}, max_adapters=2), batch_of(kind, 3, dtype)
    runtime = model.mlora
    before = logits(model, batch, adapter_names=["a", None, "a"])
    parameters = [parameter for _, parameter in runtime.named_parameters("a")]
    loss_of(out_of(model, batch, adapter_names=["a", None, "a"])).backward()
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()
    after = logits(model, batch, adapter_names=["a", None, "a"])
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    runtime.save_adapter("a", tmp_path / "saved")
    runtime.load_adapter(tmp_path / "saved", "again")
    assert torch.equal(logits(model, batch, adapter_names=["again", None, "again"]), after)
    runtime.load_adapter(tmp_path / "saved", "further", is_trainable=True)
    assert torch.equal(logits(model, batch, adapter_names=["further", None, "further"]), after)
    assert sorted(p.shape for p in parameters) == sorted(p.shape for _, p in runtime.named_parameters("further"))
    if dtype is torch.float32:
        assert_close(after[:1], logits(peft_alone(base, tmp_path / "saved"), row_of(batch, 0)), 1e-4)


def backward(model: Any, batch: dict[str, Tensor], entries: list[Any], how: Callable[[Tensor], Any]) -> list[Tensor]:
    for name in "ab":
        for _, parameter in model.mlora.named_parameters(name):
            parameter.grad = None
    how(loss_of(out_of(model, batch, adapter_names=entries)))
    return [p.grad for name in "ab" for _, p in model.mlora.named_parameters(name)]


@pytest.mark.parametrize("case", SOME)
def test_nothing_changes_a_bit(case, tmp_path):
    """Checkpointing of both kinds, a backward pass on another thread or after an eviction, and rows of others, NaN
    included."""
    kind = CASES[case]
    base = base_of(kind)
    folders = {name: folder_of(tmp_path, base, kind, name, seed) for seed, name in enumerate("abz")}
    model = trained(base, folders, frozen=("z",), max_adapters=2)
    batch = batch_of(kind, 4)
    entries = ["a", None, "b", "a"]
    want = backward(model, batch, entries, Tensor.backward)
    assert all(gradient is not None and gradient.any() for gradient in want)
    assert all(map(torch.equal, backward(model, batch, entries, in_a_thread), want))

    def after_eviction(loss: Tensor) -> None:
        logits(model, batch, adapter_names=["z", None, "z", "z"])
        logits(model, batch, adapter_names=["b", None, "z", "z"])
        loss.backward()

    assert all(map(torch.equal, backward(model, batch, entries, after_eviction), want))
    if hasattr(model, "gradient_checkpointing_enable"):
        model.train()
        for module in model.modules():  # no dropout, of whichever name
            for name in ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        plain = backward(model, batch, entries, Tensor.backward)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            assert all(map(torch.equal, backward(model, batch, entries, Tensor.backward), plain)), reentrant
            model.disable_input_require_grads()
            model.gradient_checkpointing_disable()
        model.eval()

    def alone() -> list[Tensor]:
        return [p.grad for _, p in model.mlora.named_parameters("a")]

    backward(model, batch, entries, Tensor.backward)
    mine = alone()
    with torch.no_grad():
        for _, parameter in model.mlora.named_parameters("b"):
            parameter.fill_(torch.nan)
    backward(model, batch, ["a", "b", {"b": 0.5}, "a"], Tensor.backward)
    assert all(map(torch.equal, alone(), mine))
    assert all(p.grad.isnan().any() for _, p in model.mlora.named_parameters("b") if p.grad.any())


@pytest.mark.parametrize("case", SOME)
def test_nothing_is_left_behind(case):
    kind = CASES[case]
    model = base_of(kind)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = identity(model)
    runtime = mlora.patch(model, memory=ROOM)
    runtime.add_adapter("a", config_of(kind), seed=0)
    loss_of(out_of(model, batch_of(kind, 2), adapter_names=["a", None])).backward()
    assert list(model.state_dict()) == list(state)
    mlora.unpatch(model)
    assert identity(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_kinds_beside_each_other(tmp_path):
    """IA3 of outputs and of inputs, LoRA and a whole linear on one module: each has the gradients that it has alone."""
    from trained_kinds import Case

    cases = {
        "a": Case("mlp", {"target_modules": ["up", "0"], "feedforward_modules": ["up"]}, ia3=True),
        "b": Case("mlp", {"target_modules": ["up", "0"]}),
        "c": Case("mlp", {"target_modules": ["0"], "modules_to_save": ["up"]}),
        "d": Case("mlp", {"target_modules": ["up"], "feedforward_modules": []}, ia3=True),
    }
    base = build("mlp", torch.float64)
    folders = {name: folder_of(tmp_path, base, case, name, seed) for seed, (name, case) in enumerate(cases.items())}
    model = trained(base, folders)
    batch = batch_of(cases["a"], 5, torch.float64)
    loss_of(out_of(model, batch, adapter_names=["d", "c", None, "b", "a"])).backward()
    for row, name in enumerate(["d", "c", None, "b", "a"]):
        if name is not None:
            assert error(gradients_of(model.mlora, name), peft_gradients(base, batch, row, folders[name])) < 1e-10


def test_a_frozen_convolution_beside(tmp_path):
    base = build("conv")
    folders = {
        "a": make_adapter(tmp_path / "a", base, 0, target_modules=["classifier.1"]),
        "z": make_adapter(tmp_path / "z", base, 1, target_modules=["convolution"]),
    }
    model = trained(base, folders, frozen=("z",))
    batch = batch_of(CASES["head"]._replace(model="conv"), 3)
    entries = ["a", "z", {"a": 0.5, "z": 1.0}]
    want = logits(model, batch, adapter_names=entries)
    out = out_of(model, batch, adapter_names=entries)
    assert_close(out.detach(), want)
    loss_of(out[:1]).backward()
    want = peft_gradients(base, batch, 0, folders["a"])
    assert error(gradients_of(model.mlora, "a"), want) < 1e-5


def test_heads_of_tasks_are_trained(tmp_path):
    """`task_type` names them, as in PEFT."""
    from peft import LoraConfig, get_peft_model

    base = build("bert")
    config = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    torch.manual_seed(0)
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(**config), adapter_name="sql")
    runtime = mlora.patch(copy.deepcopy(base), memory=ROOM)
    runtime.add_adapter("sql", LoraConfig(**config), seed=0)
    want = [key for key, p in wrapped.named_parameters() if p.requires_grad]
    assert [key for key, _ in runtime.named_parameters("sql")] == want
    assert want[-1].endswith("classifier.modules_to_save.sql.bias")


def test_a_weight_saved_along_is_no_parameter(tmp_path):
    """PEFT saves the embedding and the head with a LoRA on one of them."""
    base = build("llama")
    folder = make_adapter(tmp_path / "a", base, 0, target_modules=["q_proj", "embed_tokens"])
    model = trained(base, {"a": folder})
    keys = [key for key, _ in model.mlora.named_parameters("a")]
    assert len(keys) == 6 and not any("modules_to_save" in key or "base_layer" in key for key in keys)


def test_frequencies_do_not_scale_gradients(tmp_path):
    base = build("llama")
    folder = make_adapter(tmp_path / "a", base, 0, target_modules=["embed_tokens"])
    base.model.embed_tokens.scale_grad_by_freq = True
    model = trained(base, {"a": folder})
    with pytest.raises(errors.UnsupportedAdapterError, match="scale_grad_by_freq"):
        out_of(model, batch_of(CASES["head"], 2), adapter_names="a")


def test_a_norm_with_zeros_is_not_trained():
    base = build("llama")
    with torch.no_grad():
        base.model.norm.weight[3] = 0
    runtime = mlora.patch(base, memory=ROOM)
    with pytest.raises(errors.UnsupportedAdapterError, match=r"model\.norm: this model's norm has zeros"):
        runtime.add_adapter("a", config_of(CASES["RMS norms"]), seed=0)
    assert not runtime.adapters


def test_a_head_of_another_size_is_not_trained(tmp_path):
    from conftest import resized

    base = build("bert")
    folder = folder_of(tmp_path, resized(base, 3), CASES["classifier"], "a", 0)
    runtime = mlora.patch(base, memory=ROOM)
    with pytest.raises(errors.UnsupportedAdapterError, match=r"'classifier.*' is served and not trained"):
        runtime.load_adapter(folder, "a", is_trainable=True)
    runtime.load_adapter(folder, "a")


def test_a_large_bias_of_a_norm_takes_no_digits(tmp_path):
    """bf16: the gradient of a norm's weight is made of what the norm makes of its input, and not of its output."""
    kind = CASES["layer norms"]
    base = base_of(kind, torch.bfloat16)
    with torch.no_grad():
        base.model.decoder.layers[0].self_attn_layer_norm.bias.add_(8)
    model = trained(base, {"a": folder_of(tmp_path, base, kind, "a", 0)})
    x, h = torch.randn(2, 3, 50, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    with model.mlora.use_adapters("a"):
        model.model.decoder.layers[0].self_attn_layer_norm(x).backward(h)
    mine = gradients_of(model.mlora, "a")[
        "base_model.model.model.decoder.layers.0.self_attn_layer_norm.modules_to_save.N.weight"
    ]
    want = (h.double() * torch.nn.functional.layer_norm(x.double(), (HIDDEN,))).sum((0, 1))
    assert (mine - want).norm() < 2**-9 * want.norm()


@pytest.mark.parametrize(
    "case", ["head", "RMS norms", "norms of heads", "whole embedding", "tokens", "embedding, Gemma's", "IA3, Conv1D"]
)
def test_packed_sequences(case, tmp_path):
    """Each has the gradients that PEFT gives it alone."""
    kind = CASES[case]
    kind = (
        kind._replace(model="llama", options={**kind.options, "target_modules": ["q_proj"]})
        if case == "whole embedding"
        else kind
    )
    base = base_of(kind)
    folders = {name: folder_of(tmp_path, base, kind, name, seed) for seed, name in enumerate("ab")}
    model, lengths = trained(base, folders), [5, 3, 2]
    parts = torch.randint(3, VOCAB, (10,), generator=torch.Generator().manual_seed(0)).split(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    with model.mlora.use_adapters(["b", None, "a"], lengths=lengths):
        out = out_of(model, {"input_ids": torch.cat(parts)[None], "position_ids": positions[None], "use_cache": False})
    sum(loss_of(own[None], row) for row, own in enumerate(out[0].split(lengths))).backward()
    for name, row in (("b", 0), ("a", 2)):
        want = peft_gradients(base, {"input_ids": parts[row][None].expand(row + 1, -1)}, row, folders[name])
        assert error(gradients_of(model.mlora, name), want) < 1e-5
