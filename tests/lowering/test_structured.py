"""Types whose deltas have a structure of their own, where their options give it a form that no other test reaches."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft
from torch import Tensor, nn

import mlora
from mlora import errors


class BlockDiagonal:
    """PEFT's CUDA extension, without which it trains one butterfly factor only."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.mark.parametrize(("factors", "size"), ((2, 4), (3, 4), (3, 2), (4, 2)))
def test_butterflies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factors: int, size: int) -> None:
    monkeypatch.setattr(boft, "get_fbd_cuda", BlockDiagonal)
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(16, 12)), torch.randn(3, 16)
    config = peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    for name, parameter in wrapped.named_parameters():
        if "boft" in name:
            parameter.data.add_(torch.randn(parameter.shape) * 0.4)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        want = wrapped(x)
    runtime = mlora.patch(base)
    assert not runtime.load_adapter(tmp_path, "a", dense=True).errors
    with torch.no_grad(), runtime.use_adapters("a"):
        torch.testing.assert_close(base(x), want, rtol=1e-5, atol=1e-5)


def test_butterflies_that_do_not_fit() -> None:
    config = {"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 3, "target_modules": ["0"]}
    adapter = mlora.Adapter(config, {"0.boft_R": torch.ones(3, 2, 4, 4), "0.boft_s": torch.ones(8, 1)})
    with pytest.raises(errors.AdapterError, match=r"boft_n_butterfly_factor is 3.*2 blocks of 4"):
        mlora.patch(nn.Sequential(nn.Linear(8, 8))).add_adapter("a", adapter, dense=True)


def shira(places: Tensor) -> tuple[Any, Tensor, mlora.Adapter]:
    """A linear of 9 to 7, its dense delta, and the adapter that has it at `places`."""
    values = torch.randn(places.shape[1], generator=torch.Generator().manual_seed(0))
    dense = torch.zeros(7, 9).index_put(tuple(places), values, accumulate=True)
    config = {"peft_type": "SHIRA", "r": 1, "target_modules": ["0"]}
    tensors = {"0.shira_weight": values, "0.shira_indices": places.int()}
    return nn.Sequential(nn.Linear(9, 7)), dense, mlora.Adapter(config, tensors)


ROWS = torch.tensor([[5, 5, 2, 5, 2, 2, 0, 5], [1, 3, 8, 0, 4, 3, 6, 3]])
CASES = {"rows": (ROWS, 3), "columns": (torch.stack((ROWS[1] % 7, ROWS[0])), 3), "one": (ROWS[:, :1], 1)}


@pytest.mark.parametrize("case", CASES)
def test_a_sparse_delta_in_few_rows_or_columns_is_exact(case: str) -> None:
    places, rank = CASES[case]
    base, dense, adapter = shira(places)
    bare, x = copy.deepcopy(base), torch.randn(4, 9)
    runtime = mlora.patch(base)
    info = runtime.add_adapter("a", adapter)
    assert info.rank == rank and not info.errors
    with torch.no_grad(), runtime.use_adapters("a"):
        torch.testing.assert_close(base(x), bare(x) + x @ dense.t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", (4, 7))
def test_a_sparse_delta_all_over_the_weight_is_refused(rows: int) -> None:
    base, _, adapter = shira(torch.stack((torch.arange(rows), torch.arange(rows))))
    with pytest.raises(errors.UnsupportedAdapterError, match=r"sparse.*dense=True.*252 bytes"):
        mlora.patch(base).add_adapter("a", adapter)


@pytest.mark.parametrize(("out", "width", "count"), ((30, 50, 6), (50, 30, 6), (33, 64, 9)))
def test_few_waves_are_exact_in_rank_rows(out: int, width: int, count: int) -> None:
    base = nn.Sequential(nn.Linear(width, out))
    bare, x = copy.deepcopy(base), torch.randn(4, width)
    values = torch.randn(count, generator=torch.Generator().manual_seed(1))
    config = {"peft_type": "FOURIERFT", "n_frequency": count, "random_loc_seed": 3, "target_modules": ["0"]}
    adapter = mlora.Adapter(config, {"0.fourierft_spectrum": values})
    places = torch.randperm(out * width, generator=torch.Generator().manual_seed(3))[:count]
    spectrum = torch.zeros(out * width, dtype=torch.float64)
    spectrum[places] = values.double()
    dense = torch.fft.ifft2(spectrum.view(out, width)).real * 150
    info = mlora.patch(base, memory=1 << 20).add_adapter("a", adapter)
    assert 0 < info.rank <= 2 * count and not info.dense and not info.errors
    with torch.no_grad(), base.mlora.use_adapters("a"):
        torch.testing.assert_close(base(x).double(), bare(x).double() + x.double() @ dense.t(), rtol=1e-6, atol=1e-6)


def test_few_values_without_transform_are_exact_in_rank_rows() -> None:
    base = nn.Sequential(nn.Linear(50, 30))
    config = {"peft_type": "WAVEFT", "n_frequency": 8, "use_idwt": False, "target_modules": ["0"]}
    adapter = mlora.Adapter(config, {"0.waveft_spectrum": torch.randn(8)})
    info = mlora.patch(base, memory=1 << 20).add_adapter("a", adapter)
    assert 0 < info.rank <= 8 and not info.dense
