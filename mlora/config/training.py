"""What a config says of training: Ludwig's `trainer`, `prompt`, features and `preprocessing`, for all adapters or in
one, whose own then count before the others'."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import errors
from .check import check_keys, given, is_number, mapping
from .schema import FRESH, WEIGHTS, Config

_SPLIT = (0.7, 0.1, 0.2)  # Ludwig's: to train on, to validate with, to test with

# Of Ludwig's trainer: what has no meaning where many adapters share each call of the model.
_LEFT_ALONE = (
    "base_learning_rate", "bucketing_field", "compile", "enable_profiling", "eval_batch_size", "eval_steps",
    "evaluate_training_set", "max_batch_size", "packing", "packing_max_sequences_per_pack", "profiler",
    "use_mixed_precision", "validation_field", "validation_metric",
)  # fmt: skip
_TRAINER = (
    "type", "learning_rate", "learning_rate_scheduler", "epochs", "train_steps", "checkpoints_per_epoch",
    "steps_per_checkpoint", "batch_size", "effective_batch_size", "gradient_accumulation_steps", "early_stop",
    "optimizer", "should_shuffle", "gradient_clipping", "enable_gradient_checkpointing", "skip_all_evaluation",
    "seed", *_LEFT_ALONE,
)  # fmt: skip
_NOT_TRAINED = ("eva_config", "loftq_config", "corda_config", "loraplus_lr_ratio", "postprocessor")
_NOT_DONE = ("hyperopt", "defaults")  # sections that say what is trained, and how
_OPTIMIZERS = ("adam", "adamw", "sgd")
_DECAYS = {
    "linear": "linear",
    "cosine": "cosine",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt",
    None: "constant",
}


@dataclass(frozen=True)
class Training:
    """How one adapter is trained; the names are Ludwig's, checked.

    Args:
        lora: what PEFT's config says of training: dropout, bias, the first numbers.
        training, validation: data sets; `validation` is None where it is split off.
        sample_ratio: the share of the rows that are used at all, before they are split.
        split_column: the column whose 0, 1 and 2 mean training, validation and test; else `probabilities` split rows.
        template, chat, prompt, completion: as `mlora.data.Form` has them.
        steps_per_checkpoint, checkpoints_per_epoch: how often a checkpoint is written, each with an evaluation; 0 says
            nothing, and both 0 once an epoch. `early_stop`: how many evaluations may be no better; None: any.
    """

    lora: Mapping[str, Any]
    training: Any
    validation: Any
    sample_ratio: float
    split_column: str | None
    probabilities: Sequence[float]
    template: str | None
    chat: bool
    prompt: str | None
    completion: str | None
    max_length: int | None
    learning_rate: float
    schedule: str
    warmup: float
    epochs: float
    train_steps: int | None
    batch_size: int
    accumulation: int
    optimizer: str
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float
    steps_per_checkpoint: int
    checkpoints_per_epoch: int
    early_stop: int | None
    shuffle: bool
    evaluate: bool
    gradient_checkpointing: bool
    seed: int


def training_of(config: Config) -> dict[str, Training]:
    """The adapters that a config trains: those without weights and those with `pretrained_adapter_weights`.

    Raises:
        ConfigError: one has no data set, or a section has a key or value that it cannot have; the message names it.
    """
    if left := [key for key in _NOT_DONE if key in config.ignored]:
        raise errors.ConfigError(f"the config has {left[0]!r}, which mlora does not train by; leave it out")
    found = {}
    for name in config.adapters:
        own = config.sections.get(name, {})
        if not config.is_trained(name):
            if own:
                raise errors.ConfigError(
                    f"adapter {name!r} has {next(iter(own))!r} and a {' or '.join(WEIGHTS[:2])}, which is served as it "
                    f"is; pretrained_adapter_weights starts training from it"
                )
            continue
        if config.adapters[name].get("layer_replication"):
            raise errors.ConfigError(f"adapter {name!r} has layer_replication, which mlora does not train with")
        found[name] = _training(f"adapter {name!r}", own, config.shared, config.folder)
    if not found:
        raise errors.ConfigError(
            f"the config has no adapter to train: one without {' and '.join(WEIGHTS[:2])}, with {', '.join(FRESH[:2])} "
            f"and the like"
        )
    return found


def _training(where: str, own: Mapping[str, Any], shared: Mapping[str, Any], folder: Path) -> Training:
    def section(key: str) -> Mapping[str, Any]:
        return {**given(mapping(shared.get(key) or {}, key)), **given(mapping(own.get(key) or {}, f"{where}: {key}"))}

    dataset = own.get("dataset", shared.get("dataset"))
    if dataset is None:
        raise errors.ConfigError(
            f"{where} has no dataset to be trained on; give it one, or one for all beside 'adapters'"
        )
    training, validation = _dataset(dataset, where, folder)
    prompt, preprocessing = section("prompt"), section("preprocessing")
    check_keys(prompt, ("template", "task", "chat"), f"{where}: prompt")
    check_keys(preprocessing, ("split", "global_max_sequence_length", "sample_ratio"), f"{where}: preprocessing")
    template = prompt.get("template")
    if template is not None and not isinstance(template, str):
        raise errors.ConfigError(f"{where}: prompt.template is {template!r}; it must be text with {{columns}}")
    features = {
        key: _feature(own.get(key, shared.get(key)), f"{where}: {key}") for key in ("input_features", "output_features")
    }
    if template is not None:
        task = str(prompt.get("task", ""))
        sample = "{" + features["input_features"] + "}" if features["input_features"] else ""
        template = template.replace("{__task__}", task).replace("{__sample__}", sample)
    split_column, probabilities = _split(preprocessing.get("split"), f"{where}: preprocessing.split")
    return Training(
        lora=_lora(own, where),
        training=training,
        validation=validation,
        sample_ratio=_value(
            preprocessing,
            "sample_ratio",
            1.0,
            lambda v: _positive(v) and v <= 1,
            "a share above 0, at most 1",
            f"{where}: preprocessing",
        ),
        split_column=split_column,
        probabilities=probabilities,
        template=template,
        chat=_value(prompt, "chat", False, lambda v: isinstance(v, bool), "true or false", f"{where}: prompt"),
        prompt=None if template is not None else features["input_features"],
        completion=features["output_features"],
        max_length=_value(
            preprocessing,
            "global_max_sequence_length",
            None,
            lambda v: _whole(v) and v >= 2,
            "an integer of at least 2",
            f"{where}: preprocessing",
        ),
        **_trainer(section("trainer"), f"{where}: trainer"),
    )


def _lora(own: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in _NOT_TRAINED:
        if own.get(key):
            raise errors.ConfigError(f"{where} has {key}: {own[key]!r}, which mlora does not train with; leave it out")
    init, bias = own.get("init_lora_weights") or "default", own.get("bias_type") or "none"
    if init == "eva":
        raise errors.ConfigError(
            f"{where} has init_lora_weights: 'eva', which starts from data; in Python Runtime.add_adapter takes an "
            f"eva_state_dict"
        )
    if bias != "none":
        raise errors.ConfigError(f"{where} has bias_type: {bias!r}; mlora trains with 'none'")
    return {
        "lora_dropout": _value(own, "dropout", 0.05, lambda v: _least_0(v) and v < 1, "a share below 1", where),
        "bias": bias,
        "init_lora_weights": True if init == "default" else init,
    }


def _trainer(trainer: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_keys(trainer, _TRAINER, where)
    if (kind := trainer.get("type", "finetune")) != "finetune":
        raise errors.ConfigError(f"{where}.type is {kind!r}; mlora trains with 'finetune'")

    def value(key: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        return _value(trainer, key, default, fits, wanted, where)

    positive = "a finite number above 0"
    natural = "an integer, at least 0"
    patience = value("early_stop", 5, lambda v: _natural(v + 1) if _whole(v) else False, "an integer, at least -1")
    batch, accumulation = _batch(trainer, where)
    return {
        "learning_rate": value("learning_rate", 0.001, _positive, positive),
        "epochs": value("epochs", 100, _positive, positive),
        "train_steps": value("train_steps", None, _count, "a positive integer"),
        "batch_size": batch,
        "accumulation": accumulation,
        "steps_per_checkpoint": value("steps_per_checkpoint", 0, _natural, natural),
        "checkpoints_per_epoch": value("checkpoints_per_epoch", 0, _natural, natural),
        "early_stop": patience if patience > 0 else None,
        "shuffle": value("should_shuffle", True, lambda v: isinstance(v, bool), "true or false"),
        "evaluate": not value("skip_all_evaluation", False, lambda v: isinstance(v, bool), "true or false"),
        "gradient_checkpointing": value(
            "enable_gradient_checkpointing", False, lambda v: isinstance(v, bool), "true or false"
        ),
        "seed": value("seed", 42, lambda v: _natural(v) and v < 2**64, "an integer from 0 to 2**64 - 1"),
        "max_grad_norm": _clipping(trainer.get("gradient_clipping", {}), f"{where}.gradient_clipping"),
        **_optimizer(trainer.get("optimizer", {}), f"{where}.optimizer"),
        **_schedule(trainer.get("learning_rate_scheduler", {}), f"{where}.learning_rate_scheduler"),
    }


def _batch(trainer: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Rows, and how often they make up a step: an effective batch size is their product."""
    found = {}
    for key, default in (("batch_size", 1), ("gradient_accumulation_steps", "auto"), ("effective_batch_size", "auto")):
        value = trainer.get(key, default)
        if not (_count(value) or (value == "auto" and key != "batch_size")):
            raise errors.ConfigError(f"{where}.{key} is {value!r}; it must be a positive integer")
        found[key] = value
    batch, accumulation, effective = found.values()
    if effective == "auto":
        return batch, 1 if accumulation == "auto" else accumulation
    if accumulation == "auto" and effective % batch == 0:
        return batch, effective // batch
    if accumulation != "auto" and effective == batch * accumulation:
        return batch, accumulation
    raise errors.ConfigError(
        f"{where}: effective_batch_size {effective} is not batch_size {batch} times gradient_accumulation_steps"
        + ("" if accumulation == "auto" else f" {accumulation}")
    )


def _optimizer(section: Any, where: str) -> dict[str, Any]:
    if isinstance(section, str):
        section = {"type": section}
    section = given(mapping(section, where))
    check_keys(section, ("type", "betas", "eps", "weight_decay"), where)
    kind = section.get("type", "adam")
    if kind not in _OPTIMIZERS:
        raise errors.ConfigError(f"{where}.type is {kind!r}; it must be one of {', '.join(_OPTIMIZERS)}")
    betas = section.get("betas", (0.9, 0.999))
    if not (isinstance(betas, (list, tuple)) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)):
        raise errors.ConfigError(f"{where}.betas is {betas!r}; it must be two numbers from 0 to below 1")
    return {
        "optimizer": kind,
        "betas": tuple(map(float, betas)),
        "eps": _value(section, "eps", 1e-8, _positive, "a finite number above 0", where),
        "weight_decay": _value(section, "weight_decay", 0.0, _least_0, "a finite number, at least 0", where),
    }


def _schedule(section: Any, where: str) -> dict[str, Any]:
    section = given(mapping(section or {}, where))
    check_keys(section, ("decay", "warmup_fraction"), where)
    decay = section.get("decay")
    if decay not in _DECAYS:
        raise errors.ConfigError(f"{where}.decay is {decay!r}; it must be one of {', '.join(filter(None, _DECAYS))}")
    warmup = _value(section, "warmup_fraction", 0.0, lambda v: _least_0(v) and v < 1, "a share below 1", where)
    schedule = _DECAYS[decay]
    return {"schedule": "constant_with_warmup" if schedule == "constant" and warmup else schedule, "warmup": warmup}


def _clipping(section: Any, where: str) -> float:
    if section is None:
        return 0.0
    section = mapping(section, where)
    check_keys(section, ("clipglobalnorm", "clipnorm", "clipvalue"), where)
    if section.get("clipvalue") is not None:
        raise errors.ConfigError(f"{where}.clipvalue is not served; clipglobalnorm is")
    norms = [section[key] for key in ("clipglobalnorm", "clipnorm") if section.get(key) is not None]
    if not norms:
        return 0.5 if "clipglobalnorm" not in section else 0.0
    if not all(_least_0(norm) for norm in norms):
        raise errors.ConfigError(f"{where} is {dict(section)!r}; its norms must be finite numbers, at least 0")
    return float(min(norms))


def _dataset(value: Any, where: str, folder: Path) -> tuple[Any, Any]:
    """Training and validation. Paths start from the config's folder."""

    def found(source: Any) -> Any:
        if not isinstance(source, str) or not source:
            raise errors.ConfigError(
                f"{where}: dataset is {value!r}; it must be a file or a hub id, or training: and validation:"
            )
        here = folder / Path(source).expanduser()
        return here if here.exists() or here.suffix else source

    if isinstance(value, Mapping):
        check_keys(value, ("training", "validation"), f"{where}: dataset")
        if "training" not in value:
            raise errors.ConfigError(f"{where}: dataset has no 'training'")
        return found(value["training"]), None if value.get("validation") is None else found(value["validation"])
    return found(value), None


def _feature(value: Any, where: str) -> str | None:
    """The column that a list of one text feature names."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 1 or not isinstance(value[0], Mapping):
        raise errors.ConfigError(f"{where} is {value!r}; it must be a list of one feature")
    feature = given(value[0])
    check_keys(feature, ("name", "type", "column"), where)  # preprocessing.global_max_sequence_length cuts examples off
    name = feature.get("column", feature.get("name"))
    if not isinstance(name, str) or feature.get("type", "text") != "text":
        raise errors.ConfigError(f"{where} is {value!r}; it must be a text feature, with the name of a column")
    return name


def _split(section: Any, where: str) -> tuple[str | None, Sequence[float]]:
    section = given(mapping(section or {}, where))
    check_keys(section, ("type", "probabilities", "column"), where)
    kind = section.get("type", "random")
    if kind == "fixed":
        return str(section.get("column", "split")), _SPLIT
    if kind != "random":
        raise errors.ConfigError(f"{where}.type is {kind!r}; it must be 'random' or 'fixed'")
    shares = section.get("probabilities", _SPLIT)
    if not (
        isinstance(shares, (list, tuple))
        and len(shares) == 3
        and all(_least_0(share) for share in shares)
        and math.isclose(sum(shares), 1, abs_tol=1e-6)
        and shares[0] > 0
    ):
        raise errors.ConfigError(
            f"{where}.probabilities is {shares!r}; it must be three shares that add up to 1: training, validation, test"
        )
    return None, tuple(shares)


def _value(
    section: Mapping[str, Any], key: str, default: Any, fits: Callable[[Any], bool], wanted: str, where: str
) -> Any:
    value = section.get(key, default)
    if key in section and not fits(value):
        raise errors.ConfigError(f"{where}.{key} is {value!r}; it must be {wanted}")
    return value


def _least_0(value: Any) -> bool:
    return is_number(value) and math.isfinite(value) and value >= 0


def _positive(value: Any) -> bool:
    return _least_0(value) and value > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _natural(value: Any) -> bool:
    return _whole(value) and value >= 0


def _count(value: Any) -> bool:
    return _whole(value) and value >= 1
