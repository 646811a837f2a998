"""Where adapters come from: a folder, a file, a hub id, or any URL that fsspec knows -> local files.

What is fetched is cached by what it is: a download appears under its final name only when it is complete,
and each adapter by itself.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .. import errors
from .instead import CONFIG, DIFFUSERS, instead, names_under

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
FILES = (CONFIG, WEIGHTS, PICKLE, DIFFUSERS)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_path(
    name: str, revision: str | None, token: str | None, subfolder: str | None = None, cache: Path | None = None
) -> Path:
    """The folder or `.safetensors` file that `name` stands for, or a folder in it, fetched if it is not local.

    Raises:
        AdapterError: there is nothing of that name.
    """
    if "://" in name:
        return from_url(f"{name.rstrip('/')}/{subfolder}" if subfolder else name, cache)
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # no such user
        raise errors.AdapterError(f"there is no folder {name!r}: {error}") from error
    try:
        folder, there = path.is_dir(), path.exists()
    except OSError as error:
        raise errors.AdapterError(f"there is no folder {name!r}: {error.strerror}") from error
    if folder and subfolder:
        if not (path / subfolder).is_dir():
            raise errors.AdapterError(f"{name!r} has no subfolder {subfolder!r}{instead(names_under(path))}")
        return path / subfolder
    if folder:
        return path
    if there:
        if path.is_file() and path.suffix == ".safetensors" and not subfolder:
            return path
        raise errors.AdapterError(f"{name!r} is a file; an adapter is a PEFT folder, or a .safetensors file")
    if not _HUB_ID.fullmatch(name):
        raise errors.AdapterError(f"there is no folder {name!r}, and it is not a hub id of the form 'org/name'")
    return _from_hub(name, revision, token, subfolder)


def _from_hub(name: str, revision: str | None, token: str | None, subfolder: str | None) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download

    inner = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        patterns = [inner + file for file in FILES]
        snapshot = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
        folder = snapshot / inner
        there = [file for file in FILES if (folder / file).is_file()]
        names = [] if there else list_repo_files(name, revision=revision, token=token)
    except Exception as error:  # the hub client's errors have no common base short of Exception
        raise errors.AdapterError(
            f"there is no folder {name!r}, and as a hub id it could not be fetched: {_reason(error)}"
        ) from error
    if not there:
        raise errors.AdapterError(f"{name}/{inner} on the hub has none of {', '.join(FILES)}{instead(names)}")
    for file in there:
        _check_link(snapshot, folder / file)
    return folder


def _check_link(snapshot: Path, path: Path) -> None:
    """Refuse what leads out of a download: the hub's cache links into the `blobs` beside its snapshots."""
    roots, target = (snapshot.resolve(), snapshot.parent.parent.resolve() / "blobs"), path.resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise errors.AdapterError(f"{path} is a link out of its download, to {target}")


def from_url(url: str, cache: Path | None = None) -> Path:
    """Fetch the adapter's files from an fsspec URL of a folder or of one `.safetensors` file.

    The cache, `$MLORA_CACHE` or `~/.cache/mlora`, holds one folder for each URL and state of its files, so
    what has changed there is fetched anew.
    """
    import fsspec
    from fsspec.callbacks import TqdmCallback

    root = cache or Path(os.environ.get("MLORA_CACHE") or "~/.cache/mlora").expanduser()
    try:
        files, path = fsspec.core.url_to_fs(url)
        folder, _, single = path.rpartition("/") if path.endswith(".safetensors") else (path, "", "")
        wanted = (single, CONFIG) if single else FILES
        present = [name for name in wanted if files.isfile(f"{folder}/{name}")]
        if not present or (single and single not in present):
            below = "" if single else instead(_names_below(files, folder))
            raise errors.AdapterError(f"{url} has none of {', '.join(wanted)}{below}")
        state = [url, *(f"{name} {files.ukey(f'{folder}/{name}')}" for name in present)]
        target = root / hashlib.sha256("\n".join(state).encode()).hexdigest()
        if not target.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            half = Path(tempfile.mkdtemp(dir=root, prefix="half-"))
            try:
                for name in present:
                    bar: Any = TqdmCallback(
                        tqdm_kwargs={"desc": name, "unit": "B", "unit_scale": True, "disable": None}
                    )
                    files.get_file(f"{folder}/{name}", str(half / name), callback=bar)
                    wanted_size = files.size(f"{folder}/{name}")
                    if wanted_size is not None and (half / name).stat().st_size != wanted_size:
                        raise errors.AdapterError(f"{url}: {name} ended before its {wanted_size:,} bytes")
                _move(half, target)
            finally:
                shutil.rmtree(half, ignore_errors=True)
    except errors.AdapterError:
        raise
    except Exception as error:  # each filesystem has errors of its own
        raise errors.AdapterError(f"{url} could not be fetched: {_reason(error)}") from error
    return target / single if single else target


def _names_below(files: Any, folder: str) -> list[str]:
    return [name.removeprefix(folder).lstrip("/") for name in files.find(folder, maxdepth=3)]


def _move(half: Path, target: Path) -> None:
    try:
        half.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same files
            raise


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
