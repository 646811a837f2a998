"""Deltas against the formula of each type in fp64, from the files alone: what holds even where PEFT rounds.

The formulas are written as the papers and PEFT's files define them, one entry at a time where that is
clearest, and share nothing with the lowerings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SPECS, Spec, make
from conftest import build
from safetensors.torch import load_file
from torch import Tensor

import mlora
from mlora.layers import base_linear, find_layers
from mlora.lowering import lower

EYE = torch.eye
Parts = dict[str, Tensor]  # in fp64, by the key's end; whole-adapter tensors among them


def low_rank(t: Parts, w: Tensor, c: dict) -> Tensor:
    return c["lora_alpha"] / c["r"] * t["lora_B.weight"] @ t["lora_A.weight"]


def kasa(t: Parts, w: Tensor, c: dict) -> Tensor:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    s[-c["r"] :] = 0
    return (u * s) @ vh - w + c["lora_alpha"] / c["r"] * t["lora_B.weight"] @ t["lora_diag"].diag() @ t["lora_A.weight"]


def adalora(t: Parts, w: Tensor, c: dict) -> Tensor:
    return c["lora_alpha"] / (c["init_r"] + 1e-5) * t["lora_B"] @ (t["lora_A"] * t["lora_E"])


def loha(t: Parts, w: Tensor, c: dict) -> Tensor:
    return c["alpha"] / c["r"] * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def lokr(t: Parts, w: Tensor, c: dict) -> Tensor:
    w1, w2 = (t[f"lokr_w{i}"] if f"lokr_w{i}" in t else t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"] for i in (1, 2))
    blocks = [torch.cat([w1[i, j] * w2 for j in range(w1.shape[1])], dim=1) for i in range(w1.shape[0])]
    return c["alpha"] / c["r"] * torch.cat(blocks)


def vera(t: Parts, w: Tensor, c: dict) -> Tensor:
    a, b = t["vera_A"][:, : w.shape[1]], t["vera_B"][: w.shape[0]]
    return t["vera_lambda_b"].diag() @ b @ t["vera_lambda_d"].diag() @ a


def vblora(t: Parts, w: Tensor, c: dict) -> Tensor:
    def vector(logits: Tensor) -> Tensor:
        best = logits.argsort(descending=True)[: c["topk"]]
        weights = logits[best].exp() / logits[best].exp().sum()
        return sum(weight * t["vblora_vector_bank"][i] for weight, i in zip(weights, best, strict=True))

    a = torch.stack([torch.cat([vector(piece) for piece in row]) for row in t["vblora_logits_A"]])
    b = torch.cat([torch.stack([vector(piece) for piece in tile], dim=1) for tile in t["vblora_logits_B"]])
    return b @ a


def delora(t: Parts, w: Tensor, c: dict) -> Tensor:
    a, b = t["delora_A"], t["delora_B"]
    strengths = [t["delora_lambda"] / len(a) / (a[i].norm() * b[:, i].norm()) for i in range(len(a))]
    # The norms of W's columns are PEFT's, in fp32.
    assert torch.allclose(t["delora_w_norm"], w.norm(dim=0), rtol=1e-5)
    return b @ torch.cat(strengths).diag() @ a @ t["delora_w_norm"].diag()


def randlora(t: Parts, w: Tensor, c: dict) -> Tensor:
    low, high = min(w.shape), max(w.shape)
    total = torch.zeros(high, low, dtype=torch.float64)
    rank, bases = t["randlora_lambda"].shape
    # PEFT lays its small bases out rank by rank and its large ones base by base, and so pairs them crosswise.
    small = [(k, j) for k in range(rank) for j in range(bases)]
    large = [(j, k) for j in range(bases) for k in range(rank)]
    for (k, j), (other, column) in zip(small, large, strict=True):
        row = t["randlora_lambda"][k, j] * t["base_model.randlora_A"][k, 0, :low] * t["randlora_gamma"][j]
        total += torch.outer(t["base_model.randlora_B"][:high, other, column], row)
    return c["randlora_alpha"] / c["r"] * (total if w.shape[1] == low else total.t())


def miss(t: Parts, w: Tensor, c: dict) -> Tensor:
    m = t["miss_block"]
    return torch.stack([m[i % len(m)].repeat(w.shape[0] // m.shape[1]) for i in range(w.shape[1])], dim=1)


def bat(t: Parts, w: Tensor, c: dict) -> Tensor:
    result, r = torch.zeros_like(w), c["r"]
    for o in range(0, w.shape[0], r):
        for i in range(0, w.shape[1], r):
            block = t["miss_block"][o // r]
            result[o : o + r, i : i + r] = w[o : o + r, i : i + r] @ block + block
    return result


def gralora(t: Parts, w: Tensor, c: dict) -> Tensor:
    k, rank = c["gralora_k"], c["r"]
    sub, (rows, columns) = rank // k, (w.shape[0] // k, w.shape[1] // k)
    result = torch.zeros_like(w)
    for o in range(k):
        for i in range(k):
            a = t["gralora_A"][i][:, o * sub : (o + 1) * sub]
            b = t["gralora_B"][o][i * sub : (i + 1) * sub]
            result[o * rows : (o + 1) * rows, i * columns : (i + 1) * columns] = (a @ b).t()
    if c["hybrid_r"]:
        result += t["gralora_B_general.weight"] @ t["gralora_A_general.weight"]
    return c["alpha"] / (rank + c["hybrid_r"]) * result


def hra(t: Parts, w: Tensor, c: dict) -> Tensor:
    u = t["hra_u"]
    if c["apply_GS"]:
        q, _ = torch.linalg.qr(u)
        return -2 * w @ q @ q.t()
    product = EYE(len(u), dtype=torch.float64)
    for i in range(u.shape[1]):
        unit = u[:, i] / u[:, i].norm()
        product = product @ (EYE(len(u), dtype=torch.float64) - 2 * torch.outer(unit, unit))
    return w @ product - w


def ia3(t: Parts, w: Tensor, c: dict) -> Tensor:
    return w * t["ia3_l"] - w


def road(t: Parts, w: Tensor, c: dict) -> Tensor:
    rotation, half, n = torch.zeros(len(w), len(w), dtype=torch.float64), c["group_size"] // 2, w.shape[0]
    theta, alpha = t["road_theta"], t["road_alpha"]
    for o in range(n):
        group, inside = divmod(o, 2 * half)
        other, sign = (o + half, -1) if inside < half else (o - half, 1)
        if c["variant"] == "road_1":
            one = two = group * half + inside % half
        elif c["variant"] == "road_2":
            one = two = o
        else:
            one, two = group * 4 * half + inside, group * 4 * half + 2 * half + inside
        rotation[o, o] = alpha[one] * theta[one].cos()
        rotation[o, other] = sign * alpha[two] * theta[two].sin()
    return rotation @ w - w


def oft(t: Parts, w: Tensor, c: dict) -> Tensor:
    size = c["oft_block_size"]
    result = w.clone()
    bound = c["eps"] / len(t["oft_R.weight"]) ** 0.5
    for block in range(w.shape[1] // size):
        packed = t["oft_R.weight"][0 if c["block_share"] else block]
        q = torch.zeros(size, size, dtype=torch.float64)
        q[tuple(torch.triu_indices(size, size, 1))] = packed
        q, eye = q - q.t(), EYE(size, dtype=torch.float64)
        if c["coft"]:
            q = q * min(1.0, bound / q.norm().item())
        if c["use_cayley_neumann"]:
            rotation = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        else:
            rotation = (eye - q) @ torch.linalg.inv(eye + q)
        span = slice(block * size, (block + 1) * size)
        result[:, span] = w[:, span] @ rotation.t()
    return result - w


def boft(t: Parts, w: Tensor, c: dict) -> Tensor:
    (blocks,), size = t["boft_R"], t["boft_R"].shape[-1]
    result = w.clone()
    for i, block in enumerate(blocks):
        q, eye, span = (block - block.t()) / 2, EYE(size, dtype=torch.float64), slice(i * size, (i + 1) * size)
        result[:, span] = w[:, span] @ ((eye - q) @ torch.linalg.inv(eye + q)).t()
    return t["boft_s"] * result - w


def waveft(t: Parts, w: Tensor, c: dict) -> Tensor:
    """Haar's wavelets: each value of a quarter of the spectrum adds to a 2 x 2 block, with the quarter's signs."""
    places = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(c["random_loc_seed"]))
    rows, columns = w.shape
    result = torch.zeros_like(w)
    for place, value in zip(places, t["waveft_spectrum"], strict=False):
        (down, o), (across, i) = divmod(int(place) // columns, rows // 2), divmod(int(place) % columns, columns // 2)
        for y in (0, 1):
            for x in (0, 1):
                # PEFT takes the quarter beside the coarse one for that of differences down a column.
                sign = (-1) ** (across * y + down * x)
                result[2 * o + y, 2 * i + x] += sign * value / 2
    return c["scaling"] * result


def fourierft(t: Parts, w: Tensor, c: dict) -> Tensor:
    places = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(c["random_loc_seed"]))
    rows, columns = w.shape
    result = torch.zeros_like(w)
    o, i = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)[None]
    for place, value in zip(places, t["fourierft_spectrum"], strict=False):
        f, g = divmod(int(place), columns)
        result += value * torch.cos(2 * torch.pi * (f * o / rows + g * i / columns)) / w.numel()
    return c["scaling"] * result


def c3a(t: Parts, w: Tensor, c: dict) -> Tensor:
    size = c["block_size"]
    result = torch.zeros_like(w)
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            result[o, i] = t["c3a_kernel"][o // size, i // size, (i - o) % size]
    return result / w.shape[1]


def shira(t: Parts, w: Tensor, c: dict) -> Tensor:
    result = torch.zeros_like(w)
    for (o, i), value in zip(t["shira_indices"].t().long(), t["shira_weight"], strict=True):
        result[o, i] += value
    return result


def hira(t: Parts, w: Tensor, c: dict) -> Tensor:
    return w * (t["hira_B"] @ t["hira_A"])


def pvera(t: Parts, w: Tensor, c: dict) -> Tensor:
    a, b = t["pvera_A"][: c["r"], : w.shape[1]], t["pvera_B"][: w.shape[0]]
    return t["pvera_lambda_b"].diag() @ b @ t["pvera_lambda_d"][: c["r"]].diag() @ a


def unilora(t: Parts, w: Tensor, c: dict) -> Tensor:
    a, b = (t["unilora_theta_d"][t[f"unilora_indices_{s}"].long()] * t[f"unilora_scales_{s}"] for s in "AB")
    return b @ a


def deft(t: Parts, w: Tensor, c: dict) -> Tensor:
    p = t["deft_P"]
    q, right = (p, p.clamp(min=0)) if c["decomposition_method"] == "relu" else [torch.linalg.qr(p)[0]] * 2
    added = 0 if c["para"] else (c["alpha"] / c["r"] if c["alpha"] else 1) * q @ t["deft_R"]
    return (EYE(len(w), dtype=torch.float64) - q @ right.t()) @ w + added - w


def peanut(t: Parts, w: Tensor, c: dict) -> Tensor:
    columns = [t["peanut_B.weight"] @ (t["peanut_A.weight"] @ w[:, i]).clamp(min=0) for i in range(w.shape[1])]
    return c["scaling"] * torch.stack(columns, dim=1)


def supertuning(t: Parts, w: Tensor, c: dict) -> Tensor:
    result = torch.zeros_like(w)
    for place, value in zip(t["supertuning_indices"].long().tolist(), t["supertuning_values"], strict=True):
        result[divmod(place, w.shape[1])] += value
    if c["r"]:
        result += c["lora_alpha"] / c["r"] * t["supertuning_lora_B.weight"] @ t["supertuning_lora_A.weight"]
    return result


def glora(t: Parts, w: Tensor, c: dict) -> Tensor:
    return w * (t["glora_A.Xd"] @ t["glora_A.Xu"]) + t["glora_B.Xd"] @ t["glora_B.Xu"]


FORMULAS: dict[str, Callable[[Parts, Tensor, dict], Tensor]] = {
    "LoRA": low_rank, "KaSA": kasa, "AdaLoRA": adalora, "LoHa": loha, "LoHa of full rank": loha, "LoKr, low rank": lokr,
    "LoKr, one full factor": lokr, "LoKr, full": lokr, "VeRA": vera, "VB-LoRA": vblora, "DeLoRA": delora,
    "RandLora": randlora, "RandLora, sparse": randlora, "MiSS": miss, "MiSS mini": miss, "MiSS bat": bat,
    "GraLoRA": gralora, "GraLoRA, hybrid": gralora, "GraLoRA of full rank": gralora, "HRA": hra,
    "HRA, Gram-Schmidt": hra, "IA3": ia3, "RoAd 1": road, "RoAd 2": road, "RoAd 4": road, "OFT": oft,
    "OFT, exact Cayley": oft, "OFT, shared block": oft, "FourierFT": fourierft, "C3A": c3a, "SHiRA": shira,
    "OFT, constrained": oft, "OFT, constrained, shared block": oft,
    "HiRA": hira, "BOFT": boft, "BOFT, one block": boft, "WaveFT": waveft, "PVeRA": pvera,
    "UniLoRA with places": unilora, "DEFT": deft, "DEFT, orthogonal": deft, "DEFT, PaRa": deft, "PEANuT": peanut,
    "Super-Tuning": supertuning, "Super-Tuning, Supra": supertuning, "GLoRA": glora,
}  # fmt: skip


@cache
def llama() -> Any:
    return build("llama")


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name in FORMULAS], ids=lambda spec: spec.id)
def test_delta_is_the_formula(tmp_path: Path, spec: Spec) -> None:
    adapter = mlora.Adapter.from_pretrained(make(tmp_path, spec, "llama", 3))
    bases = {name: base_linear(name, module) for name, module in find_layers(llama()).items()}
    deltas = lower(adapter, bases, dense=True).deltas
    assert len(deltas) == 8
    whole = {key: tensor.double() for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    for name, delta in deltas.items():
        w = bases[name].weight().double()
        start = f"base_model.model.{name}."
        parts = {key.removeprefix(start): tensor for key, tensor in whole.items() if key.startswith(start)}
        parts |= {key: tensor for key, tensor in whole.items() if "layers" not in key}
        parts |= {key.rpartition(".")[2]: tensor for key, tensor in whole.items() if "layers" not in key}
        want = FORMULAS[spec.name](parts, w, dict(adapter.config))
        got = torch.zeros_like(w)
        if delta.matrix is not None:
            got += delta.scale * delta.matrix.read().double()
        if delta.a is not None and delta.b is not None:
            got += delta.scale * delta.b.double().t() @ delta.a.double()
        if delta.gain is not None:
            got += delta.gain.double()[:, None] * w
        if delta.in_gain is not None:
            got += delta.in_gain.double() * w
        if delta.turn is not None:
            got += delta.turn.times(w.t()).t()
        if delta.in_turn is not None:
            got += delta.in_turn.times(w, transposed=True)
        # Each factor is fp32: a product of two has a relative error of 2^-23 or so in each of its terms.
        error, size = (got - want).norm(), want.norm()
        assert size > 0 and error <= 5e-7 * size, f"{name}: off by {error / size:.2g}"
