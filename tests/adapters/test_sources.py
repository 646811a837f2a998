"""Adapters of other trainers, and adapters that are neither a folder nor on the hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from conftest import assert_close, build, inputs_for, logits, make_adapter, peft_alone, refused, rewrite
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mlora
from mlora import errors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def good(folders: dict[str, Path]) -> Path:
    return folders["r3"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote(good: Path) -> Any:
    """An in-memory filesystem with the files of `good`."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    for file in (CONFIG, WEIGHTS):
        files.pipe(f"/adapters/r3/{file}", (good / file).read_bytes())
    return files


def same(model: Any, first: str, second: str) -> bool:
    batch = inputs_for("llama", 2)
    return torch.equal(logits(model, batch, adapter_names=first), logits(model, batch, adapter_names=second))


# Sources


def test_a_safetensors_file_beside_its_config(patched: Any, good: Path, tmp_path: Path) -> None:
    for file in (CONFIG, WEIGHTS):
        shutil.copy(good / file, tmp_path / file.replace("adapter_model", "named"))
    patched.mlora.load_adapter(tmp_path / "named.safetensors", "file")
    assert same(patched, "file", "r3")


def test_a_url_is_fetched_once_and_again_when_it_changes(patched: Any, remote: Any, good: Path, cache: Path) -> None:
    info = patched.mlora.load_adapter("memory://adapters/r3", "url")
    assert info.source == "memory://adapters/r3" and same(patched, "url", "r3")
    assert len(list(cache.iterdir())) == 1
    patched.mlora.load_adapter("memory://adapters/r3/adapter_model.safetensors", "file")
    assert same(patched, "file", "r3") and len(list(cache.iterdir())) == 2

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("it is in the cache")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(remote), "get_file", opened)
        patched.mlora.load_adapter("memory://adapters/r3", "again")
    assert same(patched, "again", "r3")

    config = json.loads((good / CONFIG).read_text())
    remote.pipe("/adapters/r3/" + CONFIG, json.dumps({**config, "lora_alpha": 70}).encode())
    patched.mlora.load_adapter("memory://adapters/r3", "changed")
    assert not same(patched, "changed", "r3")


def test_a_half_finished_download_is_never_used(
    patched: Any, remote: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = type(remote).get_file

    def broken(self: Any, source: str, target: str, **options: Any) -> None:
        whole(self, source, target, **options)
        if source.endswith(WEIGHTS):
            os.truncate(target, 100)
            raise OSError("connection reset")

    def short(self: Any, source: str, target: str, **options: Any) -> None:
        whole(self, source, target, **options)
        os.truncate(target, 100)

    for method, wanted in ((broken, "connection reset"), (short, "ended before")):
        monkeypatch.setattr(type(remote), "get_file", method)
        with refused(patched, errors.AdapterError, "memory://adapters/r3", wanted):
            patched.mlora.load_adapter("memory://adapters/r3", "new")
        assert not list(cache.iterdir())
    monkeypatch.setattr(type(remote), "get_file", whole)
    patched.mlora.load_adapter("memory://adapters/r3", "new")
    assert same(patched, "new", "r3")


@pytest.mark.parametrize(
    ("url", "wanted"),
    (("memory://adapters/none", "has none of"), ("nothing://x/y", "nothing"), ("memory://a.safetensors", "has none")),
    ids=("no-files", "no-such-protocol", "no-file"),
)
def test_urls_that_lead_nowhere(patched: Any, remote: Any, cache: Path, url: str, wanted: str) -> None:
    with refused(patched, errors.AdapterError, url, wanted):
        patched.mlora.load_adapter(url, "new")


def linked(good: Path, folder: Path, file: str) -> Path:
    """A copy of `good` in which `file` is a link to the original."""
    shutil.copytree(good, folder)
    (folder / file).unlink()
    (folder / file).symlink_to(good / file)
    return folder


@pytest.mark.parametrize("file", (CONFIG, WEIGHTS))
def test_links_are_read_in_a_users_own_folder_and_not_out_of_a_download(
    patched: Any, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    import huggingface_hub

    patched.mlora.load_adapter(linked(good, tmp_path / "own", file), "own")
    assert same(patched, "own", "r3")
    snapshot = linked(good, tmp_path / "hub" / "snapshots" / "abc", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    with refused(patched, errors.AdapterError, file, "link out of its download"):
        patched.mlora.load_adapter("some/adapter", "new")


def test_the_hubs_own_links_are_followed(
    patched: Any, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(good, blobs)
    snapshot.mkdir(parents=True)
    for file in (CONFIG, WEIGHTS):
        (snapshot / file).symlink_to(Path("../../blobs") / file)
    patched.mlora.load_adapter(snapshot, "new")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    patched.mlora.load_adapter("some/adapter", "hub")
    assert same(patched, "new", "r3") and same(patched, "hub", "r3")


# Other trainers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(12, 8), nn.Linear(8, 12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention()])


class Unet(nn.Module):
    """The module names of a diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        attention = self.down_blocks[0].attentions[0]
        return attention.to_out(torch.tanh(attention.to_q(x)))


PATHS = {"to_q": "down_blocks.0.attentions.0.to_q", "to_out": "down_blocks.0.attentions.0.to_out"}
SIZES = {"to_q": (12, 8), "to_out": (8, 12)}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).float()


def check_file(folder: Path, tensors: dict[str, Tensor], deltas: dict[str, Tensor], **metadata: str) -> Any:
    """A bare .safetensors file of `tensors` adds `deltas` to the linears of `Unet`, computed in fp64."""
    torch.manual_seed(0)
    model = Unet().eval()
    want = Unet().double()
    want.load_state_dict(model.state_dict())
    for child, delta in deltas.items():
        want.get_submodule(PATHS[child]).weight.data += delta
    file = folder / "adapter.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=metadata or None)
    runtime = mlora.patch(model)
    x = numbers(3, 5, 12)
    bare = model(x)
    info = runtime.load_adapter(file, "new")
    got = model(x, adapter_names="new")
    assert not torch.equal(got, bare)
    assert_close(got, want(x.double()))
    runtime.save_adapter("new", folder / "saved")
    runtime.load_adapter(folder / "saved", "again")
    assert torch.equal(model(x, adapter_names="again"), got)
    return info


@pytest.mark.parametrize(
    ("prefix", "down", "up", "dots"),
    (
        ("lora_unet_", "lora_down.weight", "lora_up.weight", False),
        ("lycoris_", "lora_down.weight", "lora_up.weight", False),
        ("unet.", "lora.down.weight", "lora.up.weight", True),
        ("unet.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight", True),
        ("transformer.", "lora_A.weight", "lora_B.weight", True),
        ("", "lora_A.weight", "lora_B.weight", True),
    ),
    ids=("kohya", "lycoris", "diffusers", "old-diffusers", "diffusers-peft", "bare"),
)
@pytest.mark.parametrize("alpha", (None, 3.0), ids=("no-alpha", "alpha"))
def test_loras_of_other_trainers(
    tmp_path: Path, prefix: str, down: str, up: str, dots: bool, alpha: float | None
) -> None:
    tensors, deltas = {}, {}
    for child, (inputs, outputs) in SIZES.items():
        name = prefix + (PATHS[child] if dots else PATHS[child].replace(".", "_"))
        a, b = numbers(2, inputs), numbers(outputs, 2)
        tensors |= {f"{name}.{down}": a, f"{name}.{up}": b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        deltas[child] = (1 if alpha is None else alpha / 2) * b.double() @ a.double()
    assert check_file(tmp_path, tensors, deltas).peft_type == "LYCORIS"


def test_loha_and_lokr_of_lycoris(tmp_path: Path) -> None:
    q, out = (f"lycoris_{path.replace('.', '_')}" for path in PATHS.values())
    hada = {"hada_w1_a": numbers(8, 2), "hada_w1_b": numbers(2, 12), "hada_w2_a": -numbers(8, 2)}
    hada["hada_w2_b"] = numbers(2, 12) + 1
    kron = {"lokr_w1": numbers(3, 2), "lokr_w2_a": numbers(4, 1), "lokr_w2_b": numbers(1, 4)}
    tensors = {f"{q}.{k}": t for k, t in hada.items()} | {f"{out}.{k}": t for k, t in kron.items()}
    tensors |= {f"{q}.alpha": torch.tensor(4.0), f"{out}.alpha": torch.tensor(0.5)}
    h, k = ({key: t.double() for key, t in part.items()} for part in (hada, kron))
    check_file(
        tmp_path,
        tensors,
        {
            "to_q": 4 / 2 * (h["hada_w1_a"] @ h["hada_w1_b"]) * (h["hada_w2_a"] @ h["hada_w2_b"]),
            "to_out": 0.5 / 1 * torch.kron(k["lokr_w1"], k["lokr_w2_a"] @ k["lokr_w2_b"]),
        },
    )


def test_the_config_in_a_diffusers_header(tmp_path: Path) -> None:
    a, b = numbers(2, 12), numbers(8, 2)
    tensors = {f"unet.{PATHS['to_q']}.lora_A.weight": a, f"unet.{PATHS['to_q']}.lora_B.weight": b}
    metadata = {"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["to_q"], "unet.use_rslora": True}
    info = check_file(
        tmp_path, tensors, {"to_q": 6 / 2**0.5 * b.double() @ a.double()}, lora_adapter_metadata=json.dumps(metadata)
    )
    assert info.peft_type == "LORA" and info.variant == "rsLoRA"


REFUSED: tuple[tuple[str, dict[str, Tensor], tuple[str, ...]], ...] = (
    ("text-encoder", {"lora_te_text_model_encoder.lora_down.weight": numbers(2, 12)}, ("lora_te_text", "no linear")),
    ("dora", {"lora_unet_down_blocks_0_attentions_0_to_q.dora_scale": numbers(8, 1)}, ("dora_scale", "left over")),
    (
        "tucker",
        {"lora_unet_down_blocks_0_attentions_0_to_q.lora_mid.weight": numbers(2, 2)},
        ("lora_mid", "is a linear"),
    ),
    ("only-alpha", {"lora_unet_down_blocks_0_attentions_0_to_q.alpha": torch.tensor(1.0)}, ("to_q", "no weights")),
    (
        "value-head",
        {"lora_unet_x.alpha": torch.tensor(1.0), "v_head.summary.weight": numbers(1, 12)},
        ("v_head", "value head", "ignore=['v_head.summary.weight']"),
    ),
    (
        "two-names",
        {f"{p}down_blocks_0_attentions_0_to_q.alpha": torch.tensor(1.0) for p in ("lora_unet_", "lycoris_")},
        ("several models (lora_unet, lycoris)", "ignore=['lycoris_*']"),
    ),
)


@pytest.mark.parametrize(("tensors", "wanted"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_other_files_hold_beside_loras_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], wanted: tuple[str, ...]
) -> None:
    model = Unet()
    mlora.patch(model)
    save_file(tensors, tmp_path / "x.safetensors")
    with refused(model, errors.AdapterError, *wanted):
        model.mlora.load_adapter(tmp_path / "x.safetensors", "new")


def test_adapters_of_several_models_in_one_file_are_refused(tmp_path: Path) -> None:
    model = Unet()
    mlora.patch(model)
    text = json.dumps({"unet.r": 2, "text_encoder.r": 2})
    save_file({"unet.x": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": text})
    with refused(model, errors.AdapterError, "several models", "text_encoder, unet"):
        model.mlora.load_adapter(tmp_path / "x.safetensors", "new")


def test_unsloth_and_trl_files_are_pefts(llama: Any, patched: Any, good: Path, tmp_path: Path) -> None:
    extra = {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, "task_type": "CAUSAL_LM"}
    patched.mlora.load_adapter(rewrite(good, tmp_path / "unsloth", extra), "unsloth")
    assert same(patched, "unsloth", "r3")
    head = rewrite(good, tmp_path / "trl", tensors=lambda state: {**state, "v_head.summary.weight": torch.ones(1, 32)})
    with refused(patched, errors.UnsupportedAdapterError, "v_head", "value head"):
        patched.mlora.load_adapter(head, "trl")


def test_the_same_lora_from_pefts_file_and_from_kohyas(tmp_path: Path) -> None:
    base = build("llama")
    folder = make_adapter(tmp_path / "peft", base, 4, r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    tensors = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        flat = "lora_te_" + name.replace(".", "_")
        tensors[f"{flat}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    batch = inputs_for("llama", 2)
    want = logits(peft_alone(base, folder), batch)
    mlora.patch(base).load_adapter(tmp_path / "kohya.safetensors", "kohya")
    assert_close(logits(base, batch, adapter_names="kohya"), want)


# Subfolders, and what is there instead of an adapter


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    """A run's folder: an adapter by its name, and one in each checkpoint."""
    for name in ("sql", "checkpoint-10", "checkpoint-20/sql"):
        shutil.copytree(good, tmp_path / "run" / name)
    return tmp_path / "run"


def test_subfolders_are_named_and_read(patched: Any, run: Path) -> None:
    with refused(
        patched, errors.AdapterError, "checkpoint-10, checkpoint-20/sql, sql", "subfolder='checkpoint-10'", CONFIG
    ):
        patched.mlora.load_adapter(run, "new")
    for name in ("sql", "checkpoint-20/sql"):
        info = patched.mlora.load_adapter(run, "new", subfolder=name)
        assert info.source == f"{run}/{name}" and same(patched, "new", "r3")
        patched.mlora.delete_adapter("new")
    assert patched.mlora.load_adapter(run, subfolder="checkpoint-10").name == "checkpoint-10"
    with refused(patched, errors.AdapterError, "no subfolder 'chat'", "sql"):
        patched.mlora.load_adapter(run, "new", subfolder="chat")
    with refused(patched, errors.AdapterError, "is a file"):
        patched.mlora.load_adapter(run / "sql" / WEIGHTS, "new", subfolder="chat")


def test_a_subfolder_of_a_hub_id(patched: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **options: asked.append(options) or str(run))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: [f"sql/{CONFIG}", "README.md"])
    info = patched.mlora.load_adapter("some/adapters", "new", subfolder="sql")
    assert info.source == "some/adapters/sql" and same(patched, "new", "r3")
    assert f"sql/{WEIGHTS}" in asked[0]["allow_patterns"] and WEIGHTS not in asked[0]["allow_patterns"]
    with refused(patched, errors.AdapterError, "some/adapters", "subfolder='sql'"):
        patched.mlora.load_adapter("some/adapters", "other")


def test_a_subfolder_of_a_url(patched: Any, remote: Any, cache: Path) -> None:
    assert patched.mlora.load_adapter("memory://adapters", "new", subfolder="r3").source == "memory://adapters/r3"
    assert same(patched, "new", "r3")
    with refused(patched, errors.AdapterError, "subfolder='r3'"):
        patched.mlora.load_adapter("memory://adapters", "other")


def test_a_path_from_home(patched: Any, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(good, tmp_path / "here")
    patched.mlora.load_adapter("~/here", "new")
    assert same(patched, "new", "r3")
    with refused(patched, errors.AdapterError, "~nobody_of_this_name/x"):
        patched.mlora.load_adapter("~nobody_of_this_name/x", "other")


@pytest.mark.parametrize("name", ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"))
def test_a_model_is_called_one(patched: Any, tmp_path: Path, name: str) -> None:
    save_file({"model.embed_tokens.weight": torch.ones(2, 2), "lm_head.bias": torch.ones(2)}, tmp_path / name)
    with refused(patched, errors.AdapterError, "full model", name):
        patched.mlora.load_adapter(tmp_path, "new")
    if name.endswith(".safetensors"):
        with refused(patched, errors.AdapterError, "full model", name):
            patched.mlora.load_adapter(tmp_path / name, "new")


def test_an_x_lora_is_called_one(patched: Any, tmp_path: Path) -> None:
    (tmp_path / "xlora_config.json").write_text("{}")
    with refused(patched, errors.AdapterError, "X-LoRA"):
        patched.mlora.load_adapter(tmp_path, "new")
    (tmp_path / CONFIG).write_text('{"peft_type": "XLORA"}')
    with refused(patched, errors.UnsupportedAdapterError, "X-LoRA", str(tmp_path)):
        patched.mlora.load_adapter(tmp_path, "new")
