"""One pool of examples, split anew for each network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.train import generator

__all__ = ["Splits", "make_splits"]


@dataclass(frozen=True)
class Splits:
    """One pool of examples, and for each network its own split of the pool.

    Attributes:
        x, y: inputs ``(n, ...)`` and classes ``(n,)`` of the pool.
        train, val, test: positions in the pool, int64, ``(s, ...)``: row ``i`` is network ``i``'s.
    """

    x: Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor


def make_splits(
    x: Tensor,
    y: Tensor,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    seeds: Sequence[int],
) -> Splits:
    """Draw one random split of a pool of examples for each seed.

    Args:
        x: inputs, shape ``(n, ...)``.
        y: classes, shape ``(n,)``, int64.
        num_train, num_val, num_test: sizes, each at least 1, together at most ``n``.
        seeds: one for each network; equal seeds give equal splits.

    Returns:
        The pool and ``len(seeds)`` splits, on the device of ``x``.

    Raises:
        ValueError: sizes that do not fit, no seeds, or ``x`` and ``y`` of different lengths.

    Source: our own experiment.

    Example:
        >>> x, y = torch.zeros(6, 1), torch.zeros(6, dtype=torch.int64)
        >>> splits = make_splits(x, y, num_train=3, num_val=2, num_test=1, seeds=[0, 1])
        >>> everything = torch.cat([splits.train, splits.val, splits.test], dim=1)
        >>> splits.train.shape, everything.sum(1).tolist()  # 0 + 1 + ... + 5
        (torch.Size([2, 3]), [15, 15])
    """
    sizes = [num_train, num_val, num_test]
    if len(x) != len(y) or not len(seeds):
        raise ValueError(
            f"x and y must pair up and seeds not be empty, got {len(x)}, {len(y)}, {len(seeds)}"
        )
    if min(sizes) < 1 or sum(sizes) > len(y):
        raise ValueError(
            f"num_train, num_val, num_test must be positive and sum to at most {len(y)}, "
            f"got {sizes}"
        )
    orders = [torch.randperm(len(y), generator=generator(seed)) for seed in seeds]
    parts = torch.stack(orders)[:, : sum(sizes)].to(x.device).split(sizes, dim=1)
    return Splits(x, y, *parts)
