"""A coverage-guided fuzzer of the loader.

    pip install atheris
    PYTHONPATH=.:tests python tests/adapters/fuzz_loader.py [CORPUS] [-max_total_time=60]

An input is the bytes of a config, a separator, and the bytes of a safetensors file. Whatever they are, loading
them ends in an error of mlora's or in a working adapter; anything else stops the fuzzer with the input.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mlora"]):
    import mlora
    from mlora import errors
    from mlora.adapters import folder as reading

import peft
from conftest import build, snapshot

SEPARATOR = b"\x00\xff----\xff\x00"
TARGETS = ["q_proj"]
SEEDS = (
    peft.LoraConfig(r=1, target_modules=TARGETS),
    peft.LoHaConfig(r=1, target_modules=TARGETS),
    peft.VBLoRAConfig(r=1, num_vectors=3, vector_length=16, target_modules=TARGETS, save_only_topk_weights=True),
    peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    peft.ShiraConfig(r=1, target_modules=TARGETS),
)

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
MODEL = build("llama")
RUNTIME = mlora.patch(MODEL, memory=1 << 18, max_adapters=2)
EMPTY = snapshot(MODEL)
reading.MOMENT = 0.0  # nobody else writes to its files


def one_input(data: bytes) -> None:
    config, _, weights = data.partition(SEPARATOR)
    (FOLDER / "adapter_config.json").write_bytes(config)
    (FOLDER / "adapter_model.safetensors").write_bytes(weights)
    try:
        RUNTIME.load_adapter(FOLDER, "fuzzed", approximate=2)
    except errors.MloraError:
        assert snapshot(MODEL) == EMPTY, "a refused adapter left something behind"
    else:
        RUNTIME.delete_adapter("fuzzed")


def seeds() -> Path:
    """A corpus of honest adapters to start from."""
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for index, config in enumerate(SEEDS):
        folder = FOLDER / str(index)
        peft.get_peft_model(build("llama"), config).save_pretrained(folder)
        files = [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
        (corpus / str(index)).write_bytes(SEPARATOR.join(files))
    return corpus


if __name__ == "__main__":
    own = any(not argument.startswith("-") for argument in sys.argv[1:])
    atheris.Setup([*sys.argv, *([] if own else [str(seeds())])], one_input)
    atheris.Fuzz()
