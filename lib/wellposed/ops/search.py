"""What a random or grid search is worth: the mean over the orders of its trials."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["best_of_drawn"]


def best_of_drawn(valid_loss: Tensor, values: Tensor, k: int) -> Tensor:
    r"""Mean of ``values`` at the least validation loss among k trials, over all choices of k.

    The trial of rank j (from 0) among m is the best of k drawn ones in
    :math:`\binom{m-1-j}{k-1}` of :math:`\binom mk` cases.

    Args:
        valid_loss: shape ``(m, ...)``, one entry a trial.
        values: what to report, same shape.
        k: trials drawn, at least 1; more than m count as m.

    Returns:
        Shape ``(...)``.

    Raises:
        ValueError: shapes that differ, or ``k`` below 1.

    Source: ours; what a grid or random search finds does not depend on its order.

    Example:
        >>> loss = torch.tensor([3.0, 1.0, 2.0])
        >>> round(best_of_drawn(loss, loss, 2).item(), 4)  # pairs give 1, 2 and 1
        1.3333
    """
    if values.shape != valid_loss.shape or valid_loss.ndim == 0:
        raise ValueError("values must have the shape of valid_loss, (trials, ...)")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    m = len(valid_loss)
    k = min(k, m)
    share = [math.comb(m - 1 - j, k - 1) / math.comb(m, k) for j in range(m)]
    ranked = values.gather(0, valid_loss.argsort(0))
    mean: Tensor = torch.tensordot(values.new_tensor(share), ranked, dims=1)
    return mean
