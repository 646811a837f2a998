"""Weights that are read by code which does not call their module: refused by name, or right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from conftest import assert_close, make_adapter, peft_alone
from torch import Tensor, nn

import mlora
from mlora import errors
from mlora.layers import find_layers

WIDTH = 8


class Own(nn.Module):
    """Holds its matrix itself, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.t()


class Reader(nn.Module):
    """Has one of everything; `compute` is given the modules and x."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.norm = nn.LayerNorm(WIDTH)
        self.router = Own()
        self.second = nn.Linear(WIDTH, WIDTH)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, self.second(self.first(x)))


def lora(*names: str, bias: bool = False) -> mlora.Adapter:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in names:
        one = (1,) if name == "conv" else ()
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, WIDTH, *one, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(WIDTH, 2, *one, generator=generator)
        if bias:
            tensors[f"{name}.lora_B.bias"] = torch.randn(WIDTH, generator=generator)
    return mlora.Adapter(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(names), "lora_bias": bias}, tensors
    )


def saved_norm() -> mlora.Adapter:
    tensors = {f"norm.{part}": torch.rand(WIDTH) + 0.5 for part in ("weight", "bias")}
    own = lora("second")
    return mlora.Adapter({**own.config, "modules_to_save": ["norm"]}, {**own.tensors, **tensors})


def own_matrix() -> mlora.Adapter:
    tensors = {"router.lora_A.weight": torch.randn(2, WIDTH), "router.lora_B.weight": torch.randn(WIDTH, 2)}
    return mlora.Adapter(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["router.matrix"]}, tensors
    )


def attention(m: Any, x: Tensor) -> Tensor:
    w, b = m.proj.weight, torch.zeros(WIDTH)
    args = (x, x, x, WIDTH, 2, torch.empty(0), b.repeat(3), None, None, False, 0.0, m.first.weight, b)
    made, _ = F.multi_head_attention_forward(
        *args, use_separate_proj_weight=True, q_proj_weight=w, k_proj_weight=w, v_proj_weight=w
    )
    return made


READS: dict[str, tuple[Any, Callable[[Any, Tensor], Tensor], str]] = {
    "linear": (lora("proj"), lambda m, x: F.linear(x, m.proj.weight), "proj.weight"),
    "matmul": (lora("proj"), lambda m, x: (m.proj.weight @ x.transpose(1, 2)).transpose(1, 2), "proj.weight"),
    "turned": (lora("proj"), lambda m, x: x @ m.proj.weight.t(), "proj.weight"),
    "T": (lora("proj"), lambda m, x: x @ m.proj.weight.T, "proj.weight"),
    "data": (lora("proj"), lambda m, x: x @ m.proj.weight.data, "proj.weight"),
    "cast": (lora("proj"), lambda m, x: F.linear(x, m.proj.weight.to(x.dtype)), "proj.weight"),
    "row": (lora("proj"), lambda m, x: x * m.proj.weight[0], "proj.weight"),
    "in a list": (lora("proj"), lambda m, x: x @ torch.cat([m.proj.weight]), "proj.weight"),
    "attention": (lora("proj"), attention, "proj.weight"),
    "called as well": (lora("proj"), lambda m, x: m.proj(x) @ m.proj.weight, "proj.weight"),
    "bias": (lora("proj", bias=True), lambda m, x: m.proj(x) - m.proj.bias, "proj.bias"),
    "conv": (lora("conv"), lambda m, x: x * m.conv.weight.squeeze(2)[0], "conv.weight"),
    "norm": (saved_norm(), lambda m, x: F.layer_norm(x, (WIDTH,), m.norm.weight, None), "norm.weight"),
    "parameter": (own_matrix(), lambda m, x: x @ m.router.matrix, "router.matrix"),
}
TELLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "dtype": lambda m, x: x.to(m.proj.weight.dtype),
    "shape": lambda m, x: x.view(*x.shape[:-1], m.proj.weight.shape[1]),
    "size": lambda m, x: x[..., : m.proj.weight.size(0)],
    "device": lambda m, x: x + torch.zeros(1, device=m.proj.weight.device),
    "like": lambda m, x: x + torch.zeros_like(m.proj.weight)[0] + m.proj.weight.new_zeros(1),
    "as": lambda m, x: x.type_as(m.proj.weight).to(m.proj.bias),
    "checked": lambda m, x: x if isinstance(m.proj.weight, Tensor) and m.proj.weight.is_floating_point() else None,
    "rewritten": lambda m, x: x + 0 * len(m.proj.weight.data.div_(1).detach().mul_(1)),
    "other": lambda m, x: x + m.proj.bias,  # which LoRA leaves alone
}


def patched(compute: Callable[[Any, Tensor], Any], adapter: mlora.Adapter) -> Any:
    torch.manual_seed(0)
    model = Reader(compute).eval()
    mlora.patch(model).add_adapter("a", adapter)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", READS)
@torch.no_grad()
def test_a_read_of_what_the_plan_changes_is_refused_by_name(kind: str, x: Tensor) -> None:
    adapter, compute, name = READS[kind]
    model = patched(compute, adapter)
    bare = model(x)
    for names in (["a", None], "a"):
        with pytest.raises(errors.AttributionError, match=rf"{name} is read.*'a'"):
            model(x, adapter_names=names)
    assert torch.equal(model(x), bare)
    model.mlora.add_adapter("b", lora("second"))
    model(x, adapter_names=["b", None])  # which changes another one
    mlora.unpatch(model)
    assert torch.equal(model(x), bare)


@pytest.mark.parametrize("kind", ["linear", "attention", "conv", "called as well"])
@torch.no_grad()
def test_a_fold_acts_where_rows_are_refused(kind: str, x: Tensor) -> None:
    adapter, compute, name = READS[kind]
    model = patched(compute, adapter)
    want = copy.deepcopy(mlora.unpatch(model))
    module = name.partition(".")[0]
    a, b = (adapter.tensors[f"{module}.lora_{part}.weight"].flatten(1) for part in "AB")
    weight = want.get_submodule(module).weight
    weight += (b @ a).view(weight.shape)
    runtime = mlora.patch(model)
    runtime.add_adapter("a", adapter)
    runtime.merge_adapter("a")
    assert_close(model(x), want(x))


@pytest.mark.parametrize("kind", TELLS)
@torch.no_grad()
def test_what_tells_no_value_is_no_matter(kind: str, x: Tensor) -> None:
    """Whether the module runs behind that or not, as towers in decode steps and experts without tokens do not."""
    for then in (lambda m, h: m.proj(h), lambda m, h: h):
        model = patched(lambda m, h, then=then: then(m, TELLS[kind](m, h)), lora("proj"))
        called = patched(lambda m, h, then=then: then(m, h + m.proj.bias if kind == "other" else h), lora("proj"))
        assert_close(model(x, adapter_names=["a", None]), called(x, adapter_names=["a", None]))


@torch.no_grad()
def test_a_layers_own_hooks_read_it(x: Tensor) -> None:
    model = patched(lambda m, h: m.proj(h), lora("proj"))
    want = model(x, adapter_names=["a", None])
    seen = []
    model.proj.register_forward_pre_hook(lambda module, _: seen.append(module.weight.norm()))
    model.proj.register_forward_hook(lambda module, *_: seen.append(module.weight.norm()))
    assert torch.equal(model(x, adapter_names=["a", None]), want) and len(seen) == 2


@pytest.mark.parametrize("kind", ["linear", "bias", "conv"])
@torch.no_grad()
def test_compiled_code_refuses_when_it_runs(kind: str, x: Tensor) -> None:
    adapter, compute, name = READS[kind]
    model = patched(compute, adapter)
    bare = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x), bare)
    with model.mlora.use_adapters(["a", None]), pytest.raises(errors.AttributionError, match=f"{name} is read"):
        compiled(x)
    assert_close(compiled(x), bare)


@torch.no_grad()
def test_compiled_code_may_ask_for_a_dtype(x: Tensor) -> None:
    model = patched(lambda m, h: m.proj(h.to(m.proj.weight.dtype)), lora("proj"))
    want = model(x, adapter_names=["a", None])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with model.mlora.use_adapters(["a", None]):
        assert_close(compiled(x), want)


OWNERS = {
    "mamba": (tf.MambaConfig, {"state_size": 4}, ("dt_proj", "conv1d")),
    "falcon_mamba": (tf.FalconMambaConfig, {"state_size": 4}, ("dt_proj", "conv1d")),
    "mobilebert": (
        tf.MobileBertConfig,
        {"intra_bottleneck_size": 16, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
        ("dense",),
    ),
}


def owner(name: str) -> Any:
    torch.manual_seed(0)
    cls, options, _ = OWNERS[name]
    make = tf.AutoModelForMaskedLM if name == "mobilebert" else tf.AutoModelForCausalLM
    config = cls(vocab_size=48, hidden_size=32, num_hidden_layers=1, pad_token_id=0, **options)
    return make.from_config(config).eval()


@pytest.mark.parametrize("name", OWNERS)
@torch.no_grad()
def test_known_owners_are_refused_when_the_adapter_is_loaded(name: str) -> None:
    """But for what training did not reach: of all linears PEFT trains those there as little as it applies them."""
    model = owner(name)
    ids = torch.randint(1, 48, (2, 6))
    paths = find_layers(model)
    runtime = mlora.patch(model)
    bare = model(ids).logits
    for target in OWNERS[name][2]:
        at = next(path for path in paths if path.endswith(f"predictions.{target}" if name == "mobilebert" else target))
        width, *others = paths[at].weight.shape
        rank = width if target == "conv1d" else 2  # that many groups
        a = torch.randn(rank, *(others if target != "conv1d" else (width, others[1])))
        b = torch.randn(width, *((2,) if target != "conv1d" else (1, 1)))
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [at]}
        tensors = {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
        with pytest.raises(errors.UnsupportedAdapterError, match=rf"{at}: .*never calls it"):
            runtime.add_adapter("a", mlora.Adapter(config, tensors))
        tensors[f"{at}.lora_B.weight"] = torch.zeros_like(b)
        runtime.add_adapter(target, mlora.Adapter(config, tensors))
        assert torch.equal(model(ids, adapter_names=[target, None]).logits, bare)


@pytest.fixture(scope="module")
def deberta() -> Any:
    torch.manual_seed(0)
    config = tf.DebertaV2Config(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, legacy=False
    )
    return tf.DebertaV2ForMaskedLM(config).eval()


EMBEDDINGS = {
    "LoRA": {"target_modules": ["word_embeddings"]},
    "trained tokens": {"target_modules": ["query_proj"], "trainable_token_indices": {"word_embeddings": [3, 5]}},
    "saved": {"target_modules": ["query_proj"], "modules_to_save": ["word_embeddings"]},
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
@torch.no_grad()
def test_an_embedding_that_the_head_reads(deberta: Any, tmp_path: Path, kind: str) -> None:
    """PEFT shows the head what was trained of the embedding itself, and of an embedding with LoRA the base's."""
    ids = torch.randint(6, 48, (2, 5))
    folder = make_adapter(tmp_path / "a", deberta, 1, r=2, lora_alpha=2, **EMBEDDINGS[kind])
    model = copy.deepcopy(deberta)
    mlora.patch(model).load_adapter(folder, "a")
    if kind == "LoRA":
        got = model(ids, adapter_names=["a", None]).logits
        assert_close(got[:1], peft_alone(deberta, folder)(ids).logits[:1])
    else:
        with pytest.raises(errors.AttributionError, match=r"word_embeddings.weight is read"):
            model(ids, adapter_names=["a", None])
    assert_close(model(ids).logits, deberta(ids).logits)
