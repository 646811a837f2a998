"""Tiny models, PEFT adapters with every trainable tensor randomized, and the oracles they are judged by."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conformance_table
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if not torch.cuda.is_available():  # Triton reads it as it is imported, and then runs its kernels in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import mlora
from mlora import layout

torch.set_num_threads(2)
settings.register_profile("mlora", deadline=None)  # the first example pays for imports and kernels
settings.load_profile("mlora")

VOCAB = 67
HIDDEN = 32


class Mlp(nn.Module):
    """The plain module: no config, no transformers, one module used twice and one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 45)
        self.blocks = nn.Sequential(nn.Linear(45, 45, bias=False), nn.GELU(), nn.Linear(45, 45))
        self.head = nn.Linear(45, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.blocks(self.up(x))))


def _causal(config_class: str, **extra: Any) -> Any:
    import transformers

    sizes = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, config_class)(**{**sizes, **extra})
    return transformers.AutoModelForCausalLM.from_config(config)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=HIDDEN, n_layer=2, n_head=4, **ids))


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=24, pad_token_id=0, bos_token_id=1,
            eos_token_id=None,
        )
    )  # fmt: skip


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, num_labels=5,
        )
    )  # fmt: skip


def _resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    )


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=12, patch_size=4, num_labels=5,
        )
    )  # fmt: skip


BUILDERS = {
    "llama": lambda: _causal("LlamaConfig"),
    "qwen2": lambda: _causal("Qwen2Config"),
    "qwen3": lambda: _causal("Qwen3Config"),
    "gemma": lambda: _causal("GemmaConfig"),
    "gemma2": lambda: _causal("Gemma2Config", query_pre_attn_scalar=8),
    "mixtral": lambda: _causal("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "qwen2moe": lambda: _causal(
        "Qwen2MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
    ),
    "gpt2": _gpt2,
    "opt": _opt,
    "t5": _t5,
    "bert": _bert,
    "vit": _vit,
    "conv": _resnet,
    "mlp": Mlp,
}


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny model whose weights are large enough that logits differ clearly from row to row."""
    torch.manual_seed(seed)
    model = BUILDERS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def resized(base: Any, size: int) -> Any:
    """The same model with another number of tokens, or of labels where it has a `classifier`; what is new is random."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(size)
    with torch.no_grad():
        if isinstance(getattr(model, "classifier", None), nn.Linear):
            model.classifier = nn.Linear(HIDDEN, size)
            for parameter in model.classifier.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * HIDDEN**-0.5)
            return model.eval()
        model.resize_token_embeddings(size, mean_resizing=False)
        for module in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            module.weight[VOCAB:] = torch.randn(module.weight[VOCAB:].shape, generator=generator) * HIDDEN**-0.5
    return model.eval()


def inputs_for(
    kind: str, rows: int, seed: int = 1, length: int = 7, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Keyword arguments for a forward; the last row but one is right-padded where the model takes tokens."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 12, 12, generator=generator).to(dtype)}
    if kind == "conv":
        return {"pixel_values": torch.randn(rows, 3, 21, 18, generator=generator).to(dtype)}
    if kind == "mlp":
        return {"x": torch.randn(rows, length, HIDDEN, generator=generator).to(dtype)}
    ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-2, length - 2 :] = 0
        ids[-2, length - 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        batch["decoder_input_ids"] = torch.randint(2, VOCAB, (rows, length - 2), generator=generator)
    return batch


@pytest.fixture
def in_threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def row_of(batch: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {key: value[row : row + 1] for key, value in batch.items()}


def logits(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The output of one forward, without gradients, with padding positions zeroed."""
    with torch.no_grad():
        out = model(**batch, **options)
    out = out if isinstance(out, Tensor) else out.logits
    mask = batch.get("attention_mask")
    if mask is not None and out.dim() == 3 and "decoder_input_ids" not in batch:
        out = out * mask[..., None].to(out.dtype)
    return out


def identity(model: nn.Module) -> list[Any]:
    """What says that two models are the very same modules, without traces in them."""
    return [(name, id(m), type(m), set(m.__dict__)) for name, m in model.named_modules(remove_duplicate=False)]


def served(base: Any, folders: dict[str, Path], **options: Any) -> Any:
    """A patched copy of `base` with the adapters of `folders` loaded. `options` are `mlora.patch`'s."""
    model = copy.deepcopy(base)
    runtime = mlora.patch(model, **options)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    return model


def make_adapter(
    folder: Path,
    model: Any,
    seed: int,
    dtype: torch.dtype = torch.float32,
    strength: float = 0.5,
    **config: Any,
) -> Path:
    """Save a PEFT adapter for `model` in `folder`. Every trainable tensor is random: PEFT's initial values
    are no-ops, which hide errors."""
    from peft import LoraConfig, get_peft_model

    base = copy.deepcopy(model).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(base, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad:
                continue
            changed += 1
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:  # a norm: positive
                parameter.mul_(0.6 + 0.8 * torch.rand(parameter.shape, generator=generator))
            elif "lora_A" in name:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(noise * strength * parameter.shape[-1] ** -0.5)
    assert changed, "the adapter trains nothing"
    with warnings.catch_warnings():  # PEFT takes a trained bias for a tensor that was not gathered
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    if dtype != torch.float32:
        file = folder / "adapter_model.safetensors"
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def peft_alone(model: Any, *folders: Path, weights: Sequence[float] = ()) -> Any:
    """A fresh PEFT model with one adapter; or with several active at once, the scaling of each multiplied by
    its weight, which is PEFT's own way to add LoRA deltas."""
    names = [f"oracle-{index}" for index in range(len(folders))]  # PEFT takes a bare "0" for the one of "layers.0"
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            wrapped.load_adapter(folder, adapter_name=name)
    if len(folders) > 1:
        wrapped.base_model.set_adapter(names)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for name, weight in zip(names, weights, strict=False):
                if name in module.scaling:
                    module.scaling[name] *= weight
    return wrapped.eval()


def formula(model: Any, mix: Mapping[Path, float], dtype: torch.dtype = torch.float64) -> Any:
    """The weighted sum of deltas, from the files alone: the oracle for what PEFT cannot express."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    model = copy.deepcopy(model).to(dtype)
    modules = dict(model.named_modules())
    hooks: dict[str, list[Any]] = {}
    for folder, weight in mix.items():
        config = LoraConfig.from_pretrained(str(folder))
        tensors = {k.removeprefix("base_model.model."): t.to(dtype) for k, t in _tensors(folder).items()}
        for key in tensors:
            if not key.endswith(".lora_A.weight"):
                continue
            name = key.removesuffix(".lora_A.weight")
            a, b = tensors[key].flatten(1), tensors[f"{name}.lora_B.weight"].flatten(1)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
            scale = alpha / (a.shape[0] ** 0.5 if config.use_rslora else a.shape[0])
            bias = tensors.get(f"{name}.lora_B.bias")
            magnitude = tensors.get(f"{name}.lora_magnitude_vector")
            hooks.setdefault(name, []).append(
                (weight, scale * b @ a, scale * bias if bias is not None else 0, magnitude)
            )

    def hook(name: str) -> Any:
        module = modules[name]
        w = module.weight.detach()
        w = w.t() if isinstance(module, Conv1D) else w.flatten(1)

        def product(x: Tensor, matrix: Tensor) -> Tensor:
            if not isinstance(module, nn.Conv2d):
                return x @ matrix.t()
            kernel = matrix.view(module.weight.shape)
            return nn.functional.conv2d(x, kernel, stride=module.stride, padding=module.padding)

        def add(_: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
            base = product(args[0], w)
            for weight, delta, shift, magnitude in hooks[name]:
                if magnitude is None:
                    by = shift if isinstance(shift, int) or out.dim() < 4 else shift[:, None, None]
                    out = out + weight * (product(args[0], delta) + by)
                else:
                    gain = magnitude.flatten() / (w + delta).norm(dim=1)
                    gain = gain if out.dim() < 4 else gain[:, None, None]
                    out = out + weight * (gain * (base + product(args[0], delta)) - base)
            return out

        return add

    for name in hooks:
        modules[name].register_forward_hook(hook(name))
    return model.eval()


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def rewrite(folder: Path, target: Path, config: Mapping[str, Any] | None = None, tensors: Any = None) -> Path:
    """A copy of an adapter folder with config values replaced and its tensors passed through `tensors`."""
    target.mkdir()
    values = json.loads((folder / "adapter_config.json").read_text())
    values.update(config or {})
    (target / "adapter_config.json").write_text(json.dumps(values))
    state = _tensors(folder)
    state = tensors(state) if tensors else state
    save_file({k: t.contiguous() for k, t in state.items()}, target / "adapter_model.safetensors")
    return target


def assert_close(got: Tensor, want: Tensor, relative: float = 1e-5) -> None:
    """No value is further from `want` than `relative` of its largest."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    scale = want.double().abs().max().item()
    error = (got.double() - want.double()).abs().max().item()
    assert error <= relative * scale, f"off by {error:.3g} where the largest value is {scale:.3g}"


def state_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that a refused call must leave alone."""
    runtime = model.mlora
    store = runtime._store
    resident = [packed for packed in store._adapters.values() if packed.resident]
    return {
        "adapters": runtime.adapters,
        "used": store.used,
        "blobs": [
            space.place(offset, size).tolist()
            for at, space in enumerate(store.spaces)
            for offset, size in sorted((packed.offsets[at], packed.size(at)) for packed in resident)
        ],
        "tables": [
            space.tables.tolist() if space.tables.numel() < 50_000 else space.tables.sum().item()
            for space in store.spaces
        ],
        "pins": {name: packed.pins for name, packed in store._adapters.items()},
        "default": runtime._shared.default,
        "plan": runtime._shared.local.plan,
        "words": [_in_force(words.tolist()) for words in runtime._shared.words],
        "weights": state_hash(model),
    }


def _in_force(words: list[int]) -> list[int]:
    """What a plan buffer says; the words beyond its last entry mean nothing."""
    rows, routes, terms = words[:3]
    return words[: layout.PLAN_HEADER + 2 * (routes + 1) + rows + 2 * terms] if rows else words[: layout.PLAN_HEADER]


@contextmanager
def refused(model: Any, error: type[BaseException], *wanted: str) -> Iterator[None]:
    """The block raises `error`, whose message has every one of `wanted`, and nothing has changed."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    for part in wanted:
        assert part in message, f"{part!r} is not in the message: {message}"
    after = snapshot(model)
    for key, value in before.items():
        assert after[key] == value, f"the refused call changed {key}"


LLAMA_ADAPTERS: dict[str, dict[str, Any]] = {
    "r3": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "rs16": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
    "dora1": {
        "r": 1, "lora_alpha": 2, "use_dora": True,
        "target_modules": r".*\.(0|1)\.(self_attn\.o|mlp\.gate)_proj",
    },
    "bias8": {
        "r": 8, "lora_alpha": 4, "lora_bias": True, "target_modules": ["k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2, r".*\.1\.mlp\.down_proj": 5}, "alpha_pattern": {"o_proj": 12},
    },
}  # fmt: skip


@pytest.fixture
def model(llama: Any) -> Any:
    """A bare model of the test's own."""
    return copy.deepcopy(llama)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Inputs of four rows for `model`."""
    return inputs_for("llama", 4)


@pytest.fixture(scope="session")
def llama() -> Any:
    """The bare fp32 model; tests copy it before they patch."""
    return build("llama")


@pytest.fixture(scope="session")
def folders(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT folders of `LLAMA_ADAPTERS`."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(root / name, llama, seed, **config)
        for seed, (name, config) in enumerate(LLAMA_ADAPTERS.items(), start=10)
    }


@pytest.fixture
def patched(llama: Any, folders: dict[str, Path]) -> Any:
    """A fresh patched copy of `llama` with all of `folders` loaded."""
    model = copy.deepcopy(llama)
    runtime = mlora.patch(model, memory=1 << 20, max_adapters=8)
    for name, folder in folders.items():
        runtime.load_adapter(folder, name)
    return model


# The conformance table: type x scenario, from what the tests themselves saw.


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler() -> None:
    """Each file compiles as if it were the first: dynamo runs code as it is that was compiled too often before."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance-table",
        metavar="FILE",
        help="write the conformance suite's verdicts as Markdown, and their summary between the README's marks",
    )


VERDICTS = pytest.StashKey[dict[str, dict[str, set[str]]]]()
PLACES = pytest.StashKey[dict[str, int]]()  # of a row's first test among all


@pytest.fixture
def verdicts(request: pytest.FixtureRequest) -> Any:
    """A context in which a test earns a verdict for a cell of the table; it is WRONG if the block raises."""
    table = request.config.stash.setdefault(VERDICTS, {})
    places, place = request.config.stash.setdefault(PLACES, {}), request.session.items.index(request.node)

    @contextmanager
    def record(name: str, model: str, scenario: str, verdict: str) -> Iterator[None]:
        column = scenario if model == "llama" else model
        cell = table.setdefault(name, {}).setdefault(column, set())
        places[name] = min(place, places.get(name, place))
        try:
            yield
        except BaseException:
            cell.add("WRONG")
            raise
        cell.add(verdict)

    return record


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    file, table = config.getoption("--conformance-table"), config.stash.get(VERDICTS, {})
    places = config.stash.get(PLACES, {})
    if hasattr(config, "workeroutput"):  # one process of several; the one that started them writes
        config.workeroutput["verdicts"] = [
            (name, places[name], {column: sorted(cell) for column, cell in cells.items()})
            for name, cells in table.items()
        ]
    elif file and table:
        conformance_table.write(Path(file), {name: table[name] for name in sorted(table, key=places.__getitem__)})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A process of pytest-xdist has ended: what its tests saw."""
    table, places = node.config.stash.setdefault(VERDICTS, {}), node.config.stash.setdefault(PLACES, {})
    for name, place, cells in getattr(node, "workeroutput", {}).get("verdicts", ()):
        places[name] = min(place, places.get(name, place))
        for column, cell in cells.items():
            table.setdefault(name, {}).setdefault(column, set()).update(cell)
