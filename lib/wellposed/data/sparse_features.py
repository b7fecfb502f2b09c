"""Random sparse features with columns of very uneven size, on which coordinate methods differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["sparse_features"]

DENSITY = 10.0  # of the paper's features


def sparse_features(rows: int, columns: int, *, generator: torch.Generator) -> Tensor:
    r"""Features of the data sets A, B and C: sparse, shifted, with columns of very uneven size.

    Entries are drawn from $N(1,1)$, columns are multiplied by draws from $N(0,100)$, and an entry
    is kept with probability $10\log(m)/m$ for $m$ rows.

    Args:
        rows: m, at least 2.
        columns: n, at least 1.
        generator: source of the draws; its device is the device of the result.

    Returns:
        $A$, `(rows, columns)`, float64.

    Raises:
        ValueError: a size out of range.

    Source: Nutini, Laradji and Schmidt, JMLR 2022, data sets A, B and C, and the authors' code.

    Example:
        >>> A = sparse_features(200, 50, generator=torch.Generator().manual_seed(0))
        >>> tuple(A.shape), f"{(A != 0).double().mean():.1f}"    # 10 log(200) / 200
        ((200, 50), '0.3')
    """
    if rows < 2 or columns < 1:
        raise ValueError(f"rows must be at least 2 and columns at least 1, got {rows}, {columns}")
    blank = torch.empty(rows, columns, dtype=torch.float64, device=generator.device)
    entries = 1 + blank.normal_(generator=generator)
    sizes = 10 * blank.new_empty(columns).normal_(generator=generator)
    kept = torch.empty_like(blank).uniform_(generator=generator) < DENSITY * math.log(rows) / rows
    return torch.where(kept, entries * sizes, 0.0)
