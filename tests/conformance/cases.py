"""What the conformance suite runs: adapters of every PEFT type and option, made by PEFT, with the verdict of each.

Every trainable tensor is random, since most types start as a no-op. The oracle is a fresh PEFT model with
that adapter alone; for weighted rows, which PEFT has no form for, it is W + sum_i w_i (W_i - W) of the
weights W_i that PEFT merges.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from conftest import VOCAB, build, peft_alone, resized
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file
from torch import Tensor, nn

EXACT = "exact"
REFUSED = "refused"
DENSE = "exact; dense=True"


@dataclass(frozen=True, eq=False)
class Spec:
    """An adapter and what must become of it.

    Args:
        name: how the table lists it. `kind`: PEFT's config class. `options`: its arguments.
        verdict: EXACT, REFUSED by name, or DENSE: refused unless `dense` or a rank is given.
        reason: what the refusal must name.
        strength: of the random numbers, so that the adapter changes the answer and does not swamp it.
        rewritten: values put into the config afterwards, for what cannot be made offline.
        models: beside Llama. `llama`: whether on Llama at all.
        size: of the vocabulary, or the number of labels, of the base that it is made on, where that is another than the
            served one's; such adapters are in no sums.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    verdict: str = EXACT
    reason: str = ""
    strength: float = 0.3
    rewritten: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    llama: bool = True
    size: int = 0

    @property
    def id(self) -> str:
        return self.name.lower().replace(",", "").replace(" ", "-")

    @property
    def invocation(self) -> list[int]:
        """The tokens that activate an aLoRA; none of other adapters."""
        return list(self.options.get("alora_invocation_tokens", ()))

    def on(self, base: Any) -> Any:
        """The base that it is made on."""
        return resized(base, self.size) if self.size else base


# Modules that keep, widen and narrow, by model.
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "wi_1", "wo"],
    "bert": ["query", "dense"],
    "conv": ["embedder.convolution", "shortcut.convolution", "classifier.1", "layer.0.convolution"],
    "vit": ["q_proj", "fc1", "fc2"],
    "qwen2moe": ["q_proj", "v_proj", "shared_expert.up_proj", "shared_expert.down_proj"],
}

TEXTS = ("gpt2", "t5", "bert", "qwen2")
ALL = (*TEXTS, "vit", "qwen2moe")
LINEAR = ("t5", "bert", "vit", "qwen2moe")  # types that PEFT has no Conv1D layer for
CONV = (*LINEAR, "conv")  # and has one for convolutions

# What trains norms, and what embeds tokens, by model.
NORMS = {
    "llama": ["input_layernorm", "norm"],
    "qwen2": ["input_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_f"],
    "t5": ["layer_norm"],
    "bert": ["LayerNorm"],
    "vit": ["layernorm_before", "layernorm"],
    "qwen2moe": ["input_layernorm", "norm"],
}
EMBEDDINGS = {
    "llama": "embed_tokens",
    "qwen2": "embed_tokens",
    "gpt2": "wte",
    "t5": "shared",
    "bert": "word_embeddings",
    "qwen2moe": "embed_tokens",
}
EMBEDDING = "the model's embedding"

TOKENS = list(range(2, VOCAB, 2))

_LORA = {"r": 3, "lora_alpha": 7}
_WEIGHTS = ["q_proj.weight", "mlp.down_proj.weight", "embed_tokens.weight"]
_ALORA = {**_LORA, "task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 9]}
_VECTORS = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
_SERIES = {"use_cayley_neumann": True, "cayley_neumann_eps": 0.9}
_ANY_MATRIX = {"psoft_orth": False, "psoft_mag_a": False}
_QUIET = {"progressbar": False}
_ONE_BLOCK = {"boft_block_size": 0, "boft_block_num": 1}


def _lora(name: str, verdict: str = EXACT, reason: str = "", **options: Any) -> Spec:
    return Spec(name, "LoraConfig", {**_LORA, **options}, verdict, reason)


def _rewritten(name: str, reason: str, **values: Any) -> Spec:
    return Spec(name, "LoraConfig", _LORA, REFUSED, reason, rewritten=values)


def _refused(name: str, kind: str, reason: str) -> Spec:
    """A type that is refused whatever its files hold."""
    return _rewritten(name, reason, peft_type=kind)


_PROMPTS = {
    "P-tuning": "P_TUNING",
    "Multitask prompt tuning": "MULTITASK_PROMPT_TUNING",
    "CPT": "CPT",
    "Cartridge": "CARTRIDGE",
    "Adaption prompt": "ADAPTION_PROMPT",
}

SPECS: tuple[Spec, ...] = (
    Spec("LoRA", "LoraConfig", _LORA, models=(*ALL, "conv")),
    Spec("rsLoRA", "LoraConfig", {**_LORA, "use_rslora": True}, models=("conv",)),
    Spec("DoRA", "LoraConfig", {**_LORA, "use_dora": True}, models=(*ALL, "conv")),
    _lora("LoRA with rank and alpha patterns", rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 3}),
    Spec("LoRA with lora_bias", "LoraConfig", {**_LORA, "lora_bias": True}, models=("conv",)),
    Spec("LoRA with bias lora_only", "LoraConfig", {**_LORA, "bias": "lora_only"}, models=(*ALL, "conv")),
    Spec("LoRA with bias all, linears", "LoraConfig", {**_LORA, "bias": "all"}, models=("qwen2",)),
    Spec("DoRA with bias lora_only", "LoraConfig", {**_LORA, "use_dora": True, "bias": "lora_only"}, models=("qwen2",)),
    # Not on T5 and BERT: PEFT's truncation, an SVD in fp32, is up to 1e-4 from the same in fp64 there, ours 1e-7.
    _lora("KaSA", kasa_config=KasaConfig()),
    _lora(
        "BdLoRA",
        r=4,
        use_bdlora=BdLoraConfig(
            target_modules_bd_a=["q_proj", "down"], target_modules_bd_b=["v_proj", "up_proj"], nblocks=2
        ),
    ),
    _lora("LoRA with a trained lm_head", modules_to_save=["lm_head"]),
    Spec("LoRA with a trained classifier", "LoraConfig", {**_LORA, "task_type": "SEQ_CLS"}, models=("bert",)),
    Spec(
        "LoRA with a trained head",
        "LoraConfig",
        {**_LORA, "modules_to_save": ["lm_head", "classifier"]},
        models=("vit",),
    ),
    Spec("IA3 with a trained lm_head", "IA3Config", {"modules_to_save": ["lm_head"]}),
    _lora("LoRA with a trained norm", modules_to_save=["norm"]),
    Spec("LoRA with trained norms", "LoraConfig", {**_LORA, "modules_to_save": ["post_attention_layernorm"]}),
    Spec("LoRA with bias all", "LoraConfig", {**_LORA, "bias": "all"}, models=("gpt2", "bert", "qwen2")),
    # GPT-2's head is tied to its embedding.
    Spec("LoRA with trained embeddings", "LoraConfig", {**_LORA, "modules_to_save": [EMBEDDING]}, models=TEXTS),
    Spec(
        "LoRA with trained embeddings, tied",
        "LoraConfig",
        {**_LORA, "modules_to_save": [EMBEDDING], "ensure_weight_tying": True},
        models=("gpt2",),
    ),
    _lora("MiCA", init_lora_weights="mica"),
    _lora("LoRA, orthogonal init", r=4, init_lora_weights="orthogonal"),
    Spec("EVA", "LoraConfig", _LORA, rewritten={"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
    _lora("PiSSA, converted", init_lora_weights="pissa"),
    _lora("PiSSA with rsLoRA, converted", init_lora_weights="pissa", use_rslora=True),
    _lora("OLoRA, converted", init_lora_weights="olora"),
    Spec("PiSSA", "LoraConfig", {**_LORA, "init_lora_weights": "pissa"}, models=("gpt2", "bert", "qwen2moe")),
    _lora("PiSSA with rsLoRA", init_lora_weights="pissa", use_rslora=True),
    _lora("PiSSA with DoRA", init_lora_weights="pissa", use_dora=True),
    # Not on GPT-2, of which PEFT takes the weight for its transpose: the factors of most modules would not fit.
    Spec("OLoRA", "LoraConfig", {**_LORA, "init_lora_weights": "olora"}, models=("t5", "vit")),
    _rewritten("Fast PiSSA", "differently each time", init_lora_weights="pissa_niter_4"),
    _rewritten("CorDA", "activations of data", init_lora_weights="corda"),
    _rewritten("LoftQ", "quantization", init_lora_weights="loftq"),
    _rewritten("LoRA-GA", "gradients of data", init_lora_weights="lora_ga"),
    _rewritten("Arrow", "arrow_config", arrow_config={"top_k": 2}),
    _rewritten("LoRA with layer_replication", "layer_replication", layer_replication=[[0, 2], [0, 2]]),
    Spec("aLoRA", "LoraConfig", _ALORA, models=("gpt2", "qwen2")),
    _lora("aLoRA with lora_bias", **_ALORA, use_rslora=True, lora_bias=True),
    Spec(
        "LoRA with a classifier of another size",
        "LoraConfig",
        {**_LORA, "modules_to_save": ["classifier"]},
        models=("bert", "vit"),
        llama=False,
        size=7,
    ),
    Spec(
        "LoRA with a vocabulary of another size",
        "LoraConfig",
        {**_LORA, "modules_to_save": ["embed_tokens", "lm_head"]},
        models=("qwen2",),
        size=VOCAB + 5,
    ),
    Spec("LoRA with trained tokens", "LoraConfig", {**_LORA, "trainable_token_indices": TOKENS}, models=TEXTS),
    Spec(
        "LoRA with other trained tokens in the head",
        "LoraConfig",
        {**_LORA, "trainable_token_indices": {EMBEDDING: TOKENS, "lm_head": TOKENS[::3]}},
        models=("gpt2",),
    ),
    _lora("LoRA of embeddings", target_modules=["embed_tokens", "q_proj"]),
    _lora("DoRA of embeddings", target_modules=["embed_tokens", "q_proj"], use_dora=True),
    Spec("AdaLoRA", "AdaLoraConfig", {"init_r": 4, "lora_alpha": 6, "total_step": 9}, models=ALL),
    Spec("AdaLoRA, pruned", "AdaLoraConfig", {"init_r": 4, "lora_alpha": 6, "total_step": 9}),
    Spec("LoHa", "LoHaConfig", {"r": 2, "alpha": 3}, strength=0.6, models=CONV),
    Spec("LoHa of full rank", "LoHaConfig", {"r": 6, "alpha": 3}, strength=0.6, models=("conv",)),
    Spec(
        "LoHa, Tucker",
        "LoHaConfig",
        {"r": 2, "alpha": 3, "use_effective_conv2d": True},
        strength=0.6,
        models=("conv",),
    ),
    Spec("LoKr, low rank", "LoKrConfig", {"r": 2, "alpha": 2, "decompose_both": True}, models=LINEAR),
    Spec("LoKr, one full factor", "LoKrConfig", {"r": 2, "alpha": 2}, models=LINEAR),
    Spec(
        "LoKr, Tucker",
        "LoKrConfig",
        {"r": 1, "alpha": 2, "decompose_both": True, "use_effective_conv2d": True},
        models=("conv",),
    ),
    Spec("LoKr, full", "LoKrConfig", {"r": 16, "alpha": 4}, DENSE, "LOKR", models=CONV),
    Spec("VeRA", "VeraConfig", {"r": 5}, models=ALL),
    Spec("VeRA without projections", "VeraConfig", {"r": 5, "save_projection": False}),
    Spec("VB-LoRA", "VBLoRAConfig", {"r": 3, "num_vectors": 11, "vector_length": 8}, models=ALL),
    Spec(
        "VB-LoRA, top-k only",
        "VBLoRAConfig",
        {"r": 3, "num_vectors": 11, "vector_length": 8, "topk": 3, "save_only_topk_weights": True},
    ),
    Spec("DeLoRA", "DeloraConfig", {"r": 3, "rank_pattern": {"v_proj": 5}}, models=LINEAR),
    Spec("RandLora", "RandLoraConfig", {"r": 5, "randlora_alpha": 40}, strength=0.1, models=ALL),
    Spec("RandLora, sparse", "RandLoraConfig", {"r": 4, "randlora_alpha": 40, "sparse": True}, strength=0.1),
    Spec("RandLora, very sparse", "RandLoraConfig", {"r": 4, "randlora_alpha": 40, "very_sparse": True}, strength=0.1),
    Spec(
        "RandLora without projections",
        "RandLoraConfig",
        {"r": 4, "save_projection": False},
        REFUSED,
        "save_projection",
        strength=0.1,
    ),
    Spec("MiSS", "MissConfig", {"r": 5}, models=LINEAR),
    Spec("MiSS mini", "MissConfig", {"r": 4, "mini_r": 8, "init_weights": "mini"}),
    Spec("MiSS bat", "MissConfig", {"r": 4, "init_weights": "bat"}, models=LINEAR),
    Spec("GraLoRA", "GraloraConfig", {"r": 4, "alpha": 6}, models=ALL),
    Spec("GraLoRA, hybrid", "GraloraConfig", {"r": 4, "alpha": 6, "hybrid_r": 3}),
    Spec("GraLoRA of full rank", "GraloraConfig", {"r": 8, "alpha": 6, "hybrid_r": 2, "gralora_k": 4}),
    Spec("HRA", "HRAConfig", {"r": 3}, models=CONV),
    Spec("HRA, Gram-Schmidt", "HRAConfig", {"r": 4, "apply_GS": True}),
    Spec("IA3", "IA3Config", models=(*ALL, "conv")),
    Spec("RoAd 1", "RoadConfig", {"group_size": 8}, models=LINEAR),
    Spec("RoAd 2", "RoadConfig", {"group_size": 2, "variant": "road_2"}, models=LINEAR),
    Spec("RoAd 4", "RoadConfig", {"group_size": 16, "variant": "road_4"}, models=LINEAR),
    Spec("OFT", "OFTConfig", {"oft_block_size": 4}, models=CONV),
    Spec("OFT, one block", "OFTConfig", {"r": 1, "oft_block_size": 0}),
    Spec("OFT, exact Cayley", "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}, models=CONV),
    Spec("OFT, shared block", "OFTConfig", {"oft_block_size": 4, "block_share": True}, models=CONV),
    Spec("OFT, constrained", "OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.9}, models=CONV),
    Spec(
        "OFT, constrained, shared block",
        "OFTConfig",
        {"oft_block_size": 8, "coft": True, "eps": 0.5, "block_share": True},
    ),
    Spec("BOFT", "BOFTConfig", {"boft_block_size": 4}, DENSE, "rotates", models=LINEAR),
    Spec("BOFT, one block", "BOFTConfig", _ONE_BLOCK, DENSE, "rotates", models=("conv",)),
    Spec("BEFT", "BeftConfig", models=("qwen2", "bert")),
    Spec("PVeRA", "PveraConfig", {"r": 5}, models=("gpt2",)),
    Spec("PVeRA without projections", "PveraConfig", {"r": 5, "save_projection": False}),
    Spec("PVeRA that samples", "PveraConfig", {"r": 5, "sample_at_inference": True}, REFUSED, "random numbers"),
    Spec("UniLoRA", "UniLoraConfig", {"r": 3, "theta_d_length": 40}, strength=1.0, models=("gpt2", "t5")),
    Spec("UniLoRA with places", "UniLoraConfig", {"r": 3, "theta_d_length": 40, "save_indices": True}, strength=1.0),
    Spec("TinyLoRA", "TinyLoraConfig", {"r": 3, "u": 5}, models=("gpt2", "t5")),
    Spec("TinyLoRA without projections", "TinyLoraConfig", {"r": 3, "u": 5, "save_projection": False}),
    Spec("TinyLoRA, tied", "TinyLoraConfig", {"r": 2, "u": 5, "weight_tying": 0.6}),
    Spec("TinyLoRA of embeddings", "TinyLoraConfig", {"r": 3, "u": 5, "target_modules": ["embed_tokens", "q_proj"]}),
    Spec("DEFT", "DeftConfig", {"r": 3, "alpha": 5}, models=("gpt2", "bert")),
    Spec("DEFT, orthogonal", "DeftConfig", {"r": 3, "decomposition_method": "qr"}),
    Spec("DEFT, PaRa", "DeftConfig", {"r": 3, "decomposition_method": "qr", "para": True}),
    Spec("PEANuT", "PeanutConfig", {"r": 4}, models=("bert",)),
    Spec("PEANuT, deep", "PeanutConfig", {"r": 4, "depth": 2, "act_fn": "gelu", "scaling": 0.5}, strength=0.6),
    Spec("PSOFT", "PsoftConfig", {"r": 4, "psoft_alpha": 6}, models=("bert",)),
    Spec("PSOFT, series", "PsoftConfig", {"r": 5, "ab_svd_init": "pissa_init", **_SERIES}),
    Spec("PSOFT, any matrix", "PsoftConfig", {"r": 4, "psoft_svd": "lowrank", "random_seed": 3, **_ANY_MATRIX}),
    Spec("OSF", "OSFConfig", {"effective_rank": 0.9}, models=("bert",)),
    Spec("OSF of full rank", "OSFConfig"),
    Spec("GLoRA, vectors", "GloraConfig", _VECTORS, models=("qwen2", "bert")),
    Spec("GLoRA, numbers", "GloraConfig", {"config_A_B": "constant", "config_C": "none"}),
    Spec("GLoRA", "GloraConfig", {"r": 3}, DENSE, "elementwise", models=("qwen2",)),
    Spec("FRoD", "FrodConfig", {"sparse_rate": 0.1, **_QUIET}, DENSE, "anew", models=("gpt2", "bert")),
    Spec("FRoD without projections", "FrodConfig", {"save_projection": False, **_QUIET}, REFUSED, "save_projection"),
    Spec("Super-Tuning", "SupertuningConfig", {"sparsity": 0.9}, DENSE, "sparse", models=("vit",)),
    Spec("Super-Tuning, Supra", "SupertuningConfig", {"sparsity": 0.9, "r": 3, "lora_alpha": 5}, DENSE, "sparse"),
    Spec("AdaMSS", "AdamssConfig", {"r": 9, "num_subspaces": 3, "subspace_rank": 2}, models=("qwen2", "vit")),
    Spec("FourierFT", "FourierFTConfig", {"n_frequency": 30, "random_loc_seed": 5}, DENSE, "waves"),
    Spec("WaveFT", "WaveFTConfig", {"n_frequency": 30, "scaling": 5.0}, DENSE, "wavelets"),
    Spec(
        "WaveFT, longer wavelets",
        "WaveFTConfig",
        {"n_frequency": 30, "wavelet_family": "sym5", "scaling": 5.0},
        DENSE,
        "wave",
    ),
    Spec(
        "WaveFT without transform",
        "WaveFTConfig",
        {"n_frequency": 30, "use_idwt": False, "scaling": 5.0},
        DENSE,
        "sparse",
    ),
    Spec("C3A", "C3AConfig", {"block_size": 8}, DENSE, "circulant", strength=4.0, models=("bert",)),
    Spec("SHiRA", "ShiraConfig", {"r": 2}, DENSE, "sparse"),
    Spec("HiRA", "HiraConfig", {"r": 3}, DENSE, "elementwise", strength=1.0, models=("conv",)),
    Spec("LN tuning", "LNTuningConfig", models=ALL),
    Spec("LN tuning with a trained lm_head", "LNTuningConfig", {"modules_to_save": ["lm_head"]}),
    Spec("Trainable tokens", "TrainableTokensConfig", {"token_indices": TOKENS}, models=TEXTS),
    Spec("Prompt tuning", "PromptTuningConfig", {"num_virtual_tokens": 2}, REFUSED, "virtual tokens"),
    Spec("Prefix tuning", "PrefixTuningConfig", {"num_virtual_tokens": 2}, REFUSED, "virtual tokens"),
    *(_refused(name, kind, "virtual tokens") for name, kind in _PROMPTS.items()),
    _refused("Lily", "LILY", "other rows"),
    _refused("Poly", "POLY", "task_ids"),
    _refused("X-LoRA", "XLORA", "runs the model twice"),
    _refused("Shadow", "SHADOW", "a small model of its own"),
    Spec(
        "LoRA with target parameters",
        "LoraConfig",
        {**_LORA, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank_pattern": {"down_proj": 2}},
        models=("qwen2moe",),
        llama=False,
    ),
    Spec(
        "LoRA with a router among its target parameters",
        "LoraConfig",
        {**_LORA, "target_parameters": ["mlp.gate.weight", "experts.down_proj"]},
        models=("qwen2moe",),
        llama=False,
    ),
    _lora("LoRA with linears' weights as target parameters", target_modules=["v_proj"], target_parameters=_WEIGHTS),
)  # fmt: skip

_OWN_TARGETS = ("TrainableTokensConfig", "PromptTuningConfig", "PrefixTuningConfig")
_NO_FAN_IN = ("RandLoraConfig", "VeraConfig", "LNTuningConfig", "TrainableTokensConfig")


def make(folder: Path, spec: Spec, model: str, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """Save the adapter of `spec` for a model of conftest's in `dtype`, with every trainable tensor random, in fp32."""
    base = spec.on(build(model, dtype).float())
    options = {key: _named(value, EMBEDDINGS.get(model, "")) for key, value in spec.options.items()}
    if spec.kind == "LNTuningConfig":
        options["target_modules"] = NORMS[model]
    elif spec.kind not in _OWN_TARGETS:
        options.setdefault("target_modules", TARGETS[model])
    if spec.kind == "OFTConfig" and model == "conv":  # which has no exact meaning for larger kernels
        options["target_modules"] = ["shortcut.convolution", "classifier.1"]
    if spec.kind == "IA3Config":
        options["feedforward_modules"] = TARGETS[model][-1:]
    if spec.kind in ("PromptTuningConfig", "PrefixTuningConfig"):
        options["task_type"] = "CAUSAL_LM"
    if model == "gpt2" and spec.kind not in _NO_FAN_IN:
        options["fan_in_fan_out"] = True
    config = getattr(peft, spec.kind)(**options)
    convert = "converted" in spec.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, config)
        if convert:  # PEFT subtracts the adapter as it was initialised
            wrapped.peft_config["default"].init_lora_weights = True
            wrapped.save_pretrained(folder / "initial")
            wrapped.peft_config["default"].init_lora_weights = spec.options["init_lora_weights"]
        # T5 does not scale its attention, so what is strong elsewhere saturates it.
        randomize(wrapped, seed, spec.strength * (0.5 if model == "t5" else 1))
        if "pruned" in spec.name:  # as training leaves it: masks of other lengths, one module with nothing left
            kept = {"q_proj": [1, 0, 1, 1], "v_proj": [0, 0, 0, 0], "up_proj": [0, 1, 0, 0], "down_proj": [1, 1, 1, 1]}
            wrapped.peft_config["default"].rank_pattern = {
                name.removeprefix("base_model.model."): [bool(bit) for bit in mask]
                for name, _ in wrapped.named_parameters()
                for child, mask in kept.items()
                if f"{child}.lora_E" in name
            }
        extra = {"path_initial_model_for_weight_conversion": str(folder / "initial")} if convert else {}
        wrapped.save_pretrained(folder, **extra)
    if spec.rewritten:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **spec.rewritten}))
    return folder


def _named(value: Any, embedding: str) -> Any:
    """An option with the name of the model's embedding in it."""
    if isinstance(value, dict):
        return {embedding if key == EMBEDDING else key: item for key, item in value.items()}
    return [embedding if item == EMBEDDING else item for item in value] if isinstance(value, list) else value


def randomize(model: nn.Module, seed: int, strength: float) -> None:
    """Give every trainable tensor random values, in the range that its kind is made for."""
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            changed += 1
            noise = torch.randn(parameter.shape, generator=generator)
            if any(
                part in name for part in ("magnitude", "ia3_l", "road_alpha", "boft_s", "delora_lambda", "norm", "ln_")
            ):
                parameter.mul_(1 + strength * noise.clamp(-2, 2))  # a gain
            elif any(part in name for part in ("road_theta", "logits", "lora_E", "diag", "spectrum", "hra_u")):
                parameter.copy_(noise)
            elif "randlora" in name:
                parameter.add_(strength * noise * (1 if "lambda" in name else parameter.abs().mean()))
            elif "bias" in name:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(strength * noise)
    assert changed, "the adapter trains nothing"


def untied(model: nn.Module) -> nn.Module:
    """A copy in which no two modules have one weight."""
    model, seen = copy.deepcopy(model), set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            if id(weight) in seen:
                module.weight = nn.Parameter(weight.detach().clone())
            seen.add(id(module.weight))
    return model


def planted(ids: Tensor, entries: Sequence[Any]) -> Tensor:
    """Token ids with what the rows of some adapters need in them: an aLoRA's invocation in the middle, twice, or later;
    and a token that only an adapter with a larger vocabulary has."""
    ids = ids.clone()
    for row, entry in enumerate(entries):
        for spec in entry if isinstance(entry, Mapping) else [entry]:
            if spec is not None and spec.size > VOCAB:
                ids[row, 1] = spec.size - 1
            for at in ((2,), (0, 3), (3,))[row % 3] if spec is not None and spec.invocation else ():
                ids[row, at : at + len(spec.invocation)] = torch.tensor(spec.invocation)
    return ids


def merged(base: nn.Module, mix: Mapping[Path, float]) -> nn.Module:
    """The base with the weighted sum of the differences that PEFT's own merges make, in fp64."""
    base = untied(base)  # where weights are tied, PEFT merges what changes one end into both
    keys = {key for folder in mix for key in load_file(folder / "adapter_model.safetensors")}
    biased = {key.rpartition(part)[0] for key in keys for part in (".lora_B.bias", ".beft_bias") if key.endswith(part)}
    for name, module in base.named_modules():
        # PEFT merges a shift only into a bias.
        if f"base_model.model.{name}" in biased and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0], dtype=module.weight.dtype))
    states: dict[Path, dict[str, Tensor]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for folder in mix:
            state = peft_alone(base, folder).merge_and_unload(safe_merge=True).state_dict()
            # With LN tuning, PEFT leaves its copies of modules to save where they are.
            states[folder] = {key.replace(".modules_to_save.oracle-0", ""): value for key, value in state.items()}
    result = copy.deepcopy(base)
    state = result.state_dict()
    for key, value in state.items():
        total = value.double()
        for folder, weight in mix.items():
            total = total + weight * (states[folder][key].double() - value.double())
        state[key] = total.to(value.dtype)
    result.load_state_dict(state)
    return result.eval()
