"""Which tokenizer and chat template serve an entry: an adapter may bring its own, with other tokens or another
template."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import errors

TEMPLATES = ("chat_template.jinja", "chat_template.json")
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "sentencepiece.bpe.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", *TEMPLATES,
)  # fmt: skip
WAY_OUT = "--base-tokenizer uses the base's for every line"


def serving(names: Iterable[str], base: Any, own: Mapping[str, Any], raw: bool = False, way_out: str = WAY_OUT) -> Any:
    """The tokenizer, with its chat template, of a row that uses adapters `names`: theirs where all have the same, the
    base's where none has another.

    Args:
        base: of the base model. `own`: adapter -> the tokenizer that it brings; those without one have the base's.
        raw: the chat template is not used, and need not be the same. `way_out`: ends the message of a refusal.

    Raises:
        AdapterError: the adapters' are not the same.
    """
    first: tuple[str, Any] | None = None
    for name in names:
        tokenizer = own.get(name, base)
        if first is None:
            first = name, tokenizer
        elif difference := differ(first[1], tokenizer, raw):
            raise errors.AdapterError(
                f"adapters {first[0]!r} and {name!r} have different {difference}; a mix would need one; {way_out}"
            )
    return base if first is None else first[1]


def differ(one: Any, other: Any, raw: bool = False) -> str:
    """What of two tokenizers differs in a way that matters: "tokenizers" or "chat templates"; empty for copies."""
    if one is other:
        return ""
    if _encoding(one) != _encoding(other):
        return "tokenizers"
    if not raw and one.chat_template != other.chat_template:
        return "chat templates"
    return ""


def _encoding(tokenizer: Any) -> tuple[Any, ...]:
    """All that turns text into tokens and back. Padding is the caller's business, and so is truncation."""
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if key != "pad_token"}
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        rules: Any = (type(tokenizer).__name__, tokenizer.get_vocab())
    else:
        rules = {key: value for key, value in json.loads(core.to_str()).items() if key not in ("padding", "truncation")}
    return special, rules, getattr(tokenizer, "clean_up_tokenization_spaces", None)


def own_tokenizer(name: str, files: Sequence[Path], base: Any) -> Any | None:
    """The tokenizer that an adapter brings in `files`; None where it brings none, or a copy of the base's.

    Raises:
        AdapterError: it brings one that cannot be read.
    """
    if not files:
        return None
    there = {file.name: file for file in files}
    try:
        if set(there) <= set(TEMPLATES):
            tokenizer = copy.deepcopy(base)
            tokenizer.chat_template = _template(there)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(files[0].parent))
    except Exception as error:  # tokenizers' own errors have no common base short of Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise errors.AdapterError(
            f"adapter {name!r} brings a tokenizer ({', '.join(there)}) that cannot be read: {reason}; {WAY_OUT}"
        ) from None
    if not tokenizer.chat_template and base is not None:  # saved without one: it was trained with the base's
        tokenizer.chat_template = base.chat_template
    return tokenizer if base is None or differ(tokenizer, base) else None


def _template(files: Mapping[str, Path]) -> str:
    if TEMPLATES[0] in files:
        return files[TEMPLATES[0]].read_text(encoding="utf-8")
    return str(json.loads(files[TEMPLATES[1]].read_text(encoding="utf-8"))["chat_template"])


def files_of(
    name: str, source: str, folder: Path, *, revision: str | None = None, token: str | None = None
) -> list[Path]:
    """The files of the tokenizer that an adapter brings, fetched if they are on the hub; empty for one without.

    Args:
        source: what the adapter was loaded from. `folder`: where that lies now, as `local_path` says.

    Raises:
        AdapterError: they are where they cannot be read from.
    """
    if "://" in source:
        import fsspec

        files, path = fsspec.core.url_to_fs(source)
        where = path.rpartition("/")[0] if path.endswith(".safetensors") else path
        if there := [file for file in FILES if files.isfile(f"{where}/{file}")]:
            raise errors.AdapterError(
                f"adapter {name!r} brings a tokenizer ({', '.join(there)}), which is read from folders and the hub "
                f"only, not from {source}; {WAY_OUT}"
            )
        return []
    if not Path(source).exists():
        from huggingface_hub import snapshot_download

        patterns = [pattern for file in FILES for pattern in (file, f"*/{file}")]
        snapshot_download("/".join(source.split("/")[:2]), revision=revision, token=token, allow_patterns=patterns)
    if not folder.is_dir():  # a file: what lies beside it is its own only where its config does
        folder = folder.parent
        if not (folder / "adapter_config.json").is_file():
            return []
    return [folder / file for file in FILES if (folder / file).is_file()]
