"""How many frequencies a real vector is made of."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_participation_ratio"]


def inverse_participation_ratio(vectors: Tensor, r: int = 2) -> Tensor:
    r"""How few frequencies a real vector is made of: 1 for one wave.

    $\mathrm{IPR}_r=\sum_j(|\hat u_j|/\|\hat u\|_2)^{2r}$ over the $\lfloor p/2\rfloor+1$
    frequencies of the one-sided transform. All frequencies alike give one over their number to the
    power $r-1$. A constant vector has one frequency, zero, and IPR 1 as well.

    Args:
        vectors: real, shape (..., p).
        r: exponent, at least 1 (where the ratio is always 1).

    Returns:
        Shape (...), in [0, 1]; 0 for a vector of zeros.

    Raises:
        ValueError: `r` below 1, or a tensor that is not real floating point or has no entries
            along its last dimension.

    Source: Doshi et al. (2024), arXiv 2310.13061, with r = 2; one-sided as in the authors' code.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0, -1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        >>> [round(v, 4) for v in inverse_participation_ratio(vectors).tolist()]
        [1.0, 0.3333]
    """
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if not vectors.is_floating_point() or vectors.ndim == 0 or vectors.shape[-1] == 0:
        raise ValueError(
            f"vectors must be floating point of shape (..., p), got {vectors.dtype} "
            f"{tuple(vectors.shape)}"
        )
    if vectors.numel() == 0:  # which the transform does not accept
        return vectors.new_zeros(vectors.shape[:-1])
    # The ratio does not depend on the scale; dividing first keeps squares from overflowing.
    scale = vectors.abs().amax(-1, keepdim=True)
    power = torch.fft.rfft(vectors / scale.where(scale > 0, 1.0)).abs().square()
    total = power.sum(-1, keepdim=True)
    ratio: Tensor = (power / total.where(total > 0, 1.0)).pow(r).sum(-1)
    return ratio
