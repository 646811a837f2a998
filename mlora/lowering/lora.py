"""LoRA with rsLoRA, DoRA, KaSA, BdLoRA, aLoRA, rank and alpha patterns and `lora_bias`.

    LoRA    dW = s B A, s = alpha / r          (Hu et al., arXiv:2106.09685)
    rsLoRA  s = alpha / sqrt(r)                (Kalajdzievski, arXiv:2312.03732)
    DoRA    W' = m (W + s B A) / |W + s B A|   (Liu et al., arXiv:2402.09353), rows of (out, in)
    KaSA    W' = W_r + s B diag(d) A           (Wang et al., arXiv:2412.06071), W_r = W without its r
                                               smallest singular triplets
    BdLoRA  A or B is block-diagonal
    aLoRA   LoRA, on the tokens from the invocation on   (Greenewald et al., arXiv:2504.12397)
    convolutions  A is a convolution like the base's to r channels, B one of 1x1 with the base's groups, so A reads the
                  channels of all groups; PEFT gives A neither dilation nor a padding mode
    parameters  see `parameters.py`
    embeddings  y = embed_scale (W[ids] + s (B A[:, ids])^T), with `lora_embedding_A` (r, vocab) and
                `lora_embedding_B` (out, r); under DoRA g times that, with g = m / |W^T + s B A|

In PEFT's layout `lora_A.weight` is (r, in) and `lora_B.weight` is (out, r), for `nn.Linear` and for
GPT-2's `Conv1D` alike, so `fan_in_fan_out` only says how the base weight lies.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA rewrite the base when they start. Saved with PEFT's conversion they
are plain LoRAs of twice the rank. `rewritten.py` makes such of PiSSA and OLoRA; the others are refused unconverted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .. import errors
from ..ops import dispatch
from .delta import Delta, spread
from .module import TOKENS, Format, Lowering, Module, scaling
from .parameters import parameter_delta

_REWRITTEN = (
    "this initialisation rewrites the base weights{}; save the adapter with PEFT's "
    "path_initial_model_for_weight_conversion, which turns it into a plain LoRA, or load the base as it was rewritten "
    "and pass ignore=['init_lora_weights']"
)

# Why what they take out of the base cannot be computed again.
_LOST = {
    "pissa_niter": ", by an approximate decomposition that comes out differently each time",
    "corda": " by the activations of data that the file does not have",
    "lora_ga": " by the gradients of data that the file does not have",
    "loftq": " by what a quantization of them leaves over",
}

# Initialisations that leave the base weights alone; the others rewrite them.
_PLAIN_INITS = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}

FORMAT = Format(
    parts={
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora_B.bias": "bias",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
        "lora_diag": "diagonal",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "token_adapter.trainable_tokens_delta": TOKENS,
    },
    honoured={
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
        "init_lora_weights", "kasa_config", "use_bdlora", "trainable_token_indices", "target_parameters",
        "alora_invocation_tokens",
    },
    neutral={
        "lora_dropout", "megatron_core", "runtime_config", "eva_config", "corda_config", "loftq_config",
        "lora_ga_config", "qalora_group_size", "use_qalora", "velora_config", "monteclora_config",
        "ensure_weight_tying",
    },
    notes={
        "layer_replication": "it changes the number of layers",
        "arrow_config": "it routes each token by itself among other adapters",
        "enable_lora": "its factors are loralib's, of some parts of a module",
        "lora_B_layout": "its lora_B has the ranks of an expert side by side, PEFT's the experts of a rank",
    },
    convs={1, 2, 3},
    grouped=True,
)  # fmt: skip


def delta(module: Module) -> Delta:
    """The delta of one module; see the formulas above."""
    config, base = module.config, module.base
    _check_config(module)
    invocation = _invocation(module)
    if base.experts or module.parameter:
        return parameter_delta(module)
    if base.embed_scale is not None:
        return _embedding(module, base.embed_scale)
    for option, part in (("lora_bias", "bias"), ("use_dora", "magnitude"), ("kasa_config", "diagonal")):
        if bool(config.get(option)) != (part in module.parts):
            state = "has no" if config.get(option) else "has a"
            raise errors.AdapterError(
                f"{module.where}: {option} is {config.get(option)!r} but it {state} {part} tensor"
            )
    if {"lora_embedding_A", "lora_embedding_B"} & module.parts.keys():
        raise errors.AdapterError(f"{module.where}: it has embedding LoRA weights and is no embedding in this model")
    if base.conv is not None:
        _check_conv(module)
    a, b = factors(module)
    rank = a.shape[0]
    module.expect("lora_A has rank", rank, module.integer("r", 8, "rank_pattern"))
    scale = scale_of(module, rank)
    if "magnitude" in module.parts:
        return _dora(module, a.float(), b.float(), scale)
    if "diagonal" in module.parts:
        return _kasa(module, a.float(), b.float(), scale)
    shift = module.part("bias", base.out_features) * scale if "bias" in module.parts else None
    return Delta(a, b.t(), scale, shift=shift, invocation=invocation)


def _embedding(module: Module, embed_scale: float) -> Delta:
    """LoRA of an embedding, which is a linear of one-hot inputs. PEFT gives it no `lora_bias`."""
    config, base = module.config, module.base
    if option := next((option for option in ("kasa_config", "use_bdlora") if config.get(option)), None):
        raise errors.UnsupportedAdapterError(f"{module.where}: option {option} is not served for embeddings")
    a = module.part("lora_embedding_A", None, base.in_features)
    b = module.part("lora_embedding_B", base.out_features, a.shape[0])
    module.expect("lora_embedding_A has rank", a.shape[0], module.integer("r", 8, "rank_pattern"))
    scale = scale_of(module, a.shape[0])
    if bool(config.get("use_dora")) != ("magnitude" in module.parts):
        state = "has no" if config.get("use_dora") else "has a"
        raise errors.AdapterError(
            f"{module.where}: use_dora is {config.get('use_dora')!r} but it {state} magnitude tensor"
        )
    if "magnitude" not in module.parts:
        return Delta(a, b.t(), scale * embed_scale)
    if embed_scale == 0:
        raise errors.UnsupportedAdapterError(f"{module.where}: use_dora is not served, its embedding is scaled by 0")
    changed = torch.addmm(base.weight() / embed_scale, b, a, alpha=scale)
    gain = _gain(module, torch.linalg.vector_norm(changed, dim=1))
    return Delta(a, (b * gain[:, None]).t(), scale * embed_scale, gain=gain - 1)


def _gain(module: Module, norm: Tensor) -> Tensor:
    """g = m / norm, both (out,)."""
    if not (norm > 0).all():
        raise errors.AdapterError(f"module {module.base.name}: DoRA divides by a zero row norm of W + s B A")
    base = module.base
    if base.conv is not None:
        return module.matrix("magnitude", 1, base.out_features)[0] / norm
    return module.part("magnitude", base.out_features) / norm


def _dora(module: Module, a: Tensor, b: Tensor, scale: float) -> Delta:
    """y = base + (g-1)(base - bias) + g s B A x with g = m / |W + s B A|, as PEFT computes it."""
    base = module.base
    gain = _gain(module, dispatch.row_norms(base.weight(), b, a, scale))
    bias = base.bias()
    shift = None if bias is None else (1 - gain) * bias
    return Delta(a, (b * gain[:, None]).t(), scale, gain=gain - 1, shift=shift)


def _kasa(module: Module, a: Tensor, b: Tensor, scale: float) -> Delta:
    """s B diag(d) A, less the r smallest singular triplets of W: rank 2 r."""
    base, rank = module.base, a.shape[0]
    diagonal = module.part("diagonal", rank)
    if rank >= min(base.in_features, base.out_features):
        raise errors.AdapterError(f"{module.where}: KaSA removes {rank} singular values, which leaves none")
    u, s, vh = torch.linalg.svd(base.weight().double(), full_matrices=False)
    removed = (u[:, -rank:] * s[-rank:]).t()
    return Delta(torch.cat([a, vh[-rank:].float()]), torch.cat([(b * (diagonal * scale)).t(), -removed.float()]))


def scale_of(module: Module, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA."""
    return scaling(module, rank, "lora_alpha", rslora=bool(module.config.get("use_rslora")))


def factors(module: Module) -> tuple[Tensor, Tensor]:
    """A, (r, in), and B, (out, r), in the file's dtype."""
    base, parts = module.base, module.parts
    if (blocked := _blocked(module)) in parts:
        count, factor = _blocks(module), parts[blocked]
        if factor.dim() != 2 or factor.shape[0] % count:
            raise errors.AdapterError(
                f"{module.where}: {blocked} has shape {tuple(factor.shape)}, not of {count} diagonal blocks"
            )
        parts = {**parts, blocked: torch.block_diag(*factor.chunk(count))}
    kernel = base.kernel
    a = _factor(module, parts, "lora_A", 1, base.channels, kernel)
    b = spread(_factor(module, parts, "lora_B", 0, base.out_features, (1,) * len(kernel)), base.groups)
    if a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise errors.AdapterError(
            f"{module.where}: lora_A has rank {a.shape[0]}, lora_B has rank {b.shape[1]}; "
            "they must be equal and positive"
        )
    return a, b


def _factor(
    module: Module, parts: Mapping[str, Tensor], part: str, axis: int, width: int, kernel: tuple[int, ...]
) -> Tensor:
    """A factor as a matrix, whose `axis` is as wide as the module; a convolution's file has it with its kernel."""
    if (factor := parts.get(part)) is None:
        raise errors.AdapterError(f"{module.where}: {part} is missing")
    shape = factor.shape
    if len(shape) < 2 or tuple(shape[2:]) != kernel:
        wanted = f"of a convolution with kernel {kernel}" if kernel else "a matrix"
        raise errors.AdapterError(f"{module.where}: {part} has shape {tuple(shape)}; it must be {wanted}")
    if shape[axis] != width:
        axis_name = "columns" if axis == 1 else "rows"
        raise errors.AdapterError(f"{module.where}: {part} has {shape[axis]} {axis_name}, the module takes {width}")
    return factor.flatten(1) if kernel else factor


def _check_conv(module: Module) -> None:
    conv, config = module.base.conv, module.config
    assert conv is not None
    if conv.dilated:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: it is a dilated convolution; PEFT gives lora_A no dilation, so it reads other positions"
        )
    unserved = [option for option in ("kasa_config", "use_bdlora") if config.get(option)]
    if conv.groups > 1 and config.get("use_dora"):
        unserved.append("use_dora on a convolution of several groups")  # PEFT takes the norm of a matrix shuffled
    if unserved:
        raise errors.UnsupportedAdapterError(f"{module.where}: option {unserved[0]} is not served for convolutions")


def _blocked(module: Module) -> str:
    """The factor that BdLoRA makes block-diagonal in this module, or ""."""
    options = module.config.get("use_bdlora")
    if not options:
        return ""
    if not isinstance(options, dict):
        raise errors.AdapterError(f"adapter from {module.source}: use_bdlora is {options!r}; it must be an object")
    child = module.file.rsplit(".", 1)[-1]
    factors = [
        part
        for part, key in (("lora_A", "target_modules_bd_a"), ("lora_B", "target_modules_bd_b"))
        if any(str(target) in child for target in options.get(key) or ())  # PEFT looks for a part of the name
    ]
    if len(factors) > 1 or (not factors and options.get("match_strict", True)):
        named = "both factors" if factors else "no factor"
        raise errors.AdapterError(f"{module.where}: use_bdlora makes {named} of it block-diagonal; one was wanted")
    return factors[0] if factors else ""


def _blocks(module: Module) -> int:
    return replace(module, config=module.config["use_bdlora"]).integer("nblocks", 1)


def _invocation(module: Module) -> tuple[int, ...]:
    """The tokens that activate an aLoRA, () of other LoRAs."""
    config, tokens = module.config, module.config.get("alora_invocation_tokens")
    if not tokens:
        return ()
    if not isinstance(tokens, (list, tuple)) or not all(type(token) is int and token >= 0 for token in tokens):
        raise errors.AdapterError(
            f"adapter from {module.source}: alora_invocation_tokens is {tokens!r}; it must be a list of token ids"
        )
    option = f"adapter from {module.source}: option alora_invocation_tokens={tokens!r} is not served"
    if (task := config.get("task_type")) is None or str(getattr(task, "value", task)) != "CAUSAL_LM":
        raise errors.UnsupportedAdapterError(f"{option} with task_type {task!r}: PEFT applies it in CAUSAL_LM only")
    if config.get("bias", "none") != "none":
        raise errors.UnsupportedAdapterError(
            f"{option} with bias {config['bias']!r}: trained biases apply to all tokens, the rest of a module to some"
        )
    base = module.base
    if base.experts or module.parameter or base.conv is not None or base.embed_scale is not None:
        raise errors.UnsupportedAdapterError(f"{option} on {base.name}: PEFT defines it for linears only")
    return tuple(tokens)


def _check_config(module: Module) -> None:
    config = module.config
    init = config.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init  # PEFT takes some in any case
    if isinstance(init, (dict, list)) or init not in _PLAIN_INITS:
        raise errors.UnsupportedAdapterError(
            f"adapter from {module.source}: option init_lora_weights={config['init_lora_weights']!r} is not served: "
            + _REWRITTEN.format(next((why for start, why in _LOST.items() if str(init).startswith(start)), ""))
        )
    chosen = [
        option for option in ("use_dora", "kasa_config", "use_bdlora", "alora_invocation_tokens") if config.get(option)
    ]
    if len(chosen) > 1 or (chosen and chosen != ["alora_invocation_tokens"] and config.get("lora_bias")):
        both = [*chosen, "lora_bias"][:2]
        raise errors.UnsupportedAdapterError(
            f"adapter from {module.source}: option {both[1]} is not served together with {both[0]}, "
            "which PEFT does not define"
        )


LORA = Lowering(FORMAT, delta, starts=lambda config: not config.get("kasa_config"))
