"""Types whose delta has full rank by design: served as whole matrices, or approximated, where asked for.

FourierFT  dW = s Re(ifft2(S)), S sparse                        (Gao et al., arXiv:2405.03003)
C3A        dW = blocks, each circulant, / in                    (Chen et al., arXiv:2407.19342)
SHiRA      dW sparse                                            (Bhardwaj et al., arXiv:2406.13175)
HiRA       dW = W * (B A)                                       (Huang et al., ICLR 2025)
WaveFT     dW = s S, S sparse, or its inverse wavelet transform (Bilican et al., arXiv:2505.12532)

Where few rows or columns have values in them, a sparse matrix is exact in as many rank rows (SHiRA, WaveFT without
transform), and FourierFT is in two for each frequency that occurs along one of its sides: cos(a + b) =
cos a cos b - sin a sin b. Where those take less room than the weight they are served, without being asked for. For the
rest no exact form is cheaper than a copy of the weight: HiRA multiplies W itself, so it is no sum beside base(x), and
C3A's blocks are of low rank in the Fourier domain only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from .delta import Delta, Dense
from .module import Format, Lowering, Module


def _places(module: Module, count: int) -> tuple[Tensor, Tensor]:
    """The rows and columns, (count,) each, that PEFT draws from `random_loc_seed`."""
    outputs, inputs = module.base.out_features, module.base.in_features
    if count > outputs * inputs:
        raise errors.AdapterError(f"{module.where}: n_frequency is {count}, its weight has {outputs * inputs} numbers")
    generator = torch.Generator().manual_seed(module.integer("random_loc_seed", 777, least=0))
    places = torch.randperm(outputs * inputs, generator=generator)[:count]
    return places // inputs, places % inputs


def _spread(module: Module, places: tuple[Tensor, Tensor], values: Tensor) -> Tensor:
    """(out, in), fp64, with the values at their places."""
    dense = torch.zeros(module.base.out_features, module.base.in_features, dtype=torch.float64)
    return dense.index_put(places, values.double(), accumulate=True)


def _fourierft(module: Module) -> Delta | Dense:
    count, scale = module.integer("n_frequency", 1000, "n_frequency_pattern"), module.number("scaling", 150.0)
    outputs, inputs = module.base.out_features, module.base.in_features
    values, places = module.part("fourierft_spectrum", count), _places(module, count)
    sides = [(outputs, *places), (inputs, *places[::-1])]
    classes = [len(torch.minimum(first, size - first).unique()) for size, first, _ in sides]
    if 2 * min(classes) * (outputs + inputs) > outputs * inputs:
        return Dense(
            lambda: torch.fft.ifft2(_spread(module, places, values)).real * scale,
            "it is a sum of waves over the whole weight",
        )
    scale /= outputs * inputs
    if classes[0] <= classes[1]:
        b, a = _waves(outputs, places[0], inputs, places[1], values)
    else:
        a, b = _waves(inputs, places[1], outputs, places[0], values)
    return Delta(a, b, scale)


def _waves(size: int, along: Tensor, width: int, across: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(rank, size) and (rank, width) whose products add up to values cos(2 pi (along n / size + across m / width)): two
    rank rows for each frequency `along`, which differs from its negative in the sign of the sine."""
    classes, index = torch.minimum(along, size - along).unique(return_inverse=True)
    sign = torch.where(along > size - along, -1.0, 1.0).double()
    turn = 2 * math.pi / width * (across[:, None] * torch.arange(width) % width)
    wide = values.double()[:, None]
    second = torch.zeros(2, len(classes), width, dtype=torch.float64)
    second[0].index_add_(0, index, wide * turn.cos())
    second[1].index_add_(0, index, -sign[:, None] * wide * turn.sin())
    turn = 2 * math.pi / size * (classes[:, None] * torch.arange(size) % size)
    return torch.cat((turn.cos(), turn.sin())).float(), second.flatten(0, 1).float()


def _waveft(module: Module) -> Delta | Dense:
    count, scale = module.integer("n_frequency", 2592, "n_frequency_pattern"), module.number("scaling", 25.0)
    values = module.part("waveft_spectrum", count)
    if module.config.get("use_idwt", True):
        return Dense(lambda: _wavelets(module, values) * scale, "it is a sum of wavelets over the whole weight")
    base = module.base
    return sparse(*_places(module, count), values * scale, base.out_features, base.in_features)


def _wavelets(module: Module, values: Tensor) -> Tensor:
    """The inverse wavelet transform of the spectrum, padded and cut as PEFT does it, with PEFT's tables of filters."""
    family = module.config.get("wavelet_family", "db1")
    try:
        from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
        from peft.tuners.waveft.waverec2d import waverec2d
    except ImportError as error:
        raise errors.UnsupportedAdapterError(
            f"adapter from {module.source}: WaveFT needs the package peft, for the filters of its wavelets"
        ) from error
    if not isinstance(family, str) or family not in WAVELET_REDUCTIONS:
        raise errors.AdapterError(f"adapter from {module.source}: wavelet_family is {family!r}, which PEFT lacks")
    spectrum = _spread(module, _places(module, len(values)), values)
    height, width = spectrum.shape
    extra = [lost + (size + lost) % 2 for size, lost in zip((height, width), WAVELET_REDUCTIONS[family], strict=True)]
    top, left = (number // 2 for number in extra)
    padded = F.pad(spectrum, (left, extra[1] - left, top, extra[0] - top))
    low, high = padded.chunk(2)
    (coarse, across), (down, diagonal) = low.chunk(2, dim=1), high.chunk(2, dim=1)
    full: Tensor = waverec2d((coarse, (across, down, diagonal)), family)  # type: ignore[arg-type]
    top, left = (full.shape[0] - height) // 2, (full.shape[1] - width) // 2
    return full[top : top + height, left : left + width]


def _c3a(module: Module) -> Dense:
    base, size = module.base, module.integer("block_size", 256, "block_size_pattern")
    module.divides("block_size", size, base.in_features, base.out_features)
    kernel = module.part("c3a_kernel", base.out_features // size, base.in_features // size, size).double()

    def weight() -> Tensor:
        # Output i of a block takes input j with kernel[(j - i) mod size].
        steps = (torch.arange(size) - torch.arange(size)[:, None]) % size
        blocks = kernel[:, :, steps] / base.in_features  # (m, n, size, size)
        return blocks.permute(0, 2, 1, 3).reshape(base.out_features, base.in_features)

    return Dense(weight, "its blocks are circulant")


def _shira(module: Module) -> Delta | Dense:
    outputs, inputs = module.base.out_features, module.base.in_features
    values = module.part("shira_weight", None)
    places = module.part("shira_indices", 2, len(values)).long()
    if places.min() < 0 or places[0].max() >= outputs or places[1].max() >= inputs:
        raise errors.AdapterError(f"{module.where}: shira_indices lie outside of its ({outputs}, {inputs}) weight")
    return sparse(places[0], places[1], values, outputs, inputs)


def sparse(rows: Tensor, columns: Tensor, values: Tensor, outputs: int, inputs: int) -> Delta | Dense:
    """`values` at these places of an (outputs, inputs) matrix: exact in as many rank rows as there are rows or columns
    with values in them, where those take less room than the matrix."""
    own_rows, row = rows.unique(return_inverse=True)
    own_columns, column = columns.unique(return_inverse=True)
    least = min(len(own_rows), len(own_columns))
    if least * (outputs + inputs) > outputs * inputs:
        return Dense(
            lambda: torch.zeros(outputs, inputs).index_put((rows, columns), values, accumulate=True),
            "it is sparse over the whole weight",
        )
    if least == len(own_rows):
        a = torch.zeros(least, inputs).index_put((row, columns), values, accumulate=True)
        return Delta(a, torch.eye(outputs)[own_rows])
    b = torch.zeros(least, outputs).index_put((column, rows), values, accumulate=True)
    return Delta(torch.eye(inputs)[own_columns], b)


def _hira(module: Module) -> Dense:
    base, rank = module.base, module.integer("r", 32, "rank_pattern")
    a = module.matrix("hira_A", rank, base.channels, base.kernel)
    b = module.matrix("hira_B", base.out_features, rank)
    return Dense(
        lambda: base.weight().double() * (b.double() @ a.double()), "it multiplies the base weight elementwise"
    )


FOURIERFT = Lowering(
    Format(
        parts={"fourierft_spectrum": "fourierft_spectrum"},
        honoured={"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern"},
        neutral={"init_weights"},
    ),
    _fourierft,
    starts=lambda config: bool(config.get("init_weights")),
)
WAVEFT = Lowering(
    Format(
        parts={"waveft_spectrum": "waveft_spectrum"},
        honoured={"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "use_idwt", "wavelet_family"},
        neutral={"init_weights"},
    ),
    _waveft,
)
C3A = Lowering(
    Format(parts={"c3a_kernel": "c3a_kernel"}, honoured={"block_size", "block_size_pattern"}, neutral={"init_weights"}),
    _c3a,
    starts=lambda config: config.get("init_weights") is True,
)
SHIRA = Lowering(
    Format(
        parts={"shira_weight": "shira_weight", "shira_indices": "shira_indices"},
        neutral={"r", "mask_type", "random_seed", "init_weights"},
        integers={"shira_indices"},
    ),
    _shira,
)
HIRA = Lowering(
    Format(
        parts={"hira_A": "hira_A", "hira_B": "hira_B"},
        honoured={"r", "rank_pattern"},
        neutral={"hira_dropout", "init_weights"},
        convs={1, 2, 3},
    ),
    _hira,
)
