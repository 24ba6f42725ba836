"""Weights and samples hold neither NaN nor infinity, or are refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError


def is_finite(value: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. A finite sum, which is cheap to compute, proves it."""
    if value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return True
    wide = _wide(value)
    return bool(torch.isfinite(wide.sum())) or bool(torch.isfinite(wide).all())


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.element_size() == 1 else value  # 8-bit floats have no sum of their own


def check_finite(weights: Mapping[str, Any], where: str | Path, advice: str = "get them again, or take earlier ones") -> None:
    """A UserError where tensors of `weights`, read from `where`, hold NaN or infinity; it names the first of them."""
    bad = [name for name, value in weights.items() if isinstance(value, Tensor) and not is_finite(value)]
    if bad:
        value = weights[bad[0]]
        count = int((~torch.isfinite(_wide(value))).sum())
        others = f", and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise UserError(
            f"{where}: these weights cannot be used: {count} of the {value.numel()} numbers of {bad[0]} are not finite (NaN or "
            f"infinity){others}; {advice}"
        )
