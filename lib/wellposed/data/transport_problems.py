"""Transport problems to solve: random costs, and images on their pixel grid."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["image_transport", "random_assignment"]


def random_assignment(
    n: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Costs drawn uniformly from $[0,1]$, uniform marginals.

    Args:
        n: number of rows and of columns.
        generator: source of the costs; its device is the device of the result.
        dtype: of the result.

    Returns:
        `cost` `(n, n)`, `r` `(n,)` and `c` `(n,)`.

    Raises:
        ValueError: `n` below 1.

    Source: Tang et al., "Accelerating Sinkhorn Algorithm with Sparse Newton Iterations",
    arXiv:2401.12253, section 6.

    Example:
        >>> cost, r, c = random_assignment(4, generator=torch.Generator().manual_seed(0))
        >>> tuple(cost.shape), r.tolist() == c.tolist() == [0.25] * 4
        ((4, 4), True)
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    cost = torch.rand(n, n, generator=generator, dtype=dtype, device=generator.device)
    r = cost.new_full((n,), 1 / n)
    return cost, r, r.clone()


def image_transport(
    source: Tensor, target: Tensor, *, power: int, constant: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Move the mass of one image to another on the pixel grid.

    The cost of two pixels is $\|p-q\|_1$ (`power=1`) or $\|p-q\|_2^2$ (`power=2`), scaled to a
    largest value of 1.

    Args:
        source: gray values, `(h, w)`, at least 0.
        target: gray values of the same shape.
        power: 1 or 2.
        constant: positive mass added to each pixel before scaling to a total of 1.

    Returns:
        `cost` `(h w, h w)`, `r` and `c`, both `(h w,)` with sum 1, in the dtype of `source`.

    Raises:
        ValueError: shapes differ, negative gray values, other powers, `constant` not positive.

    Source: Tang et al., arXiv:2401.12253, section 6; the scale of the cost and the constant
    are ours.

    Example:
        >>> cost, r, c = image_transport(torch.eye(2), torch.ones(2, 2), power=1)
        >>> cost[0].tolist(), c.tolist()
        ([0.0, 0.5, 0.5, 1.0], [0.25, 0.25, 0.25, 0.25])
    """
    if source.ndim != 2 or source.shape != target.shape or source.numel() < 2:
        shapes = f"{tuple(source.shape)} and {tuple(target.shape)}"
        raise ValueError(f"source and target must share a shape (h, w), got {shapes}")
    if (source < 0).any() or (target < 0).any():
        raise ValueError("source and target must not be negative")
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if not constant > 0:
        raise ValueError(f"constant must be positive, got {constant}")
    axes = [torch.arange(size, device=source.device, dtype=source.dtype) for size in source.shape]
    pixels = torch.cartesian_prod(*axes)
    cost = (pixels[:, None] - pixels).abs().pow(power).sum(-1)
    r, c = source.flatten() + constant, target.flatten() + constant
    return cost / cost.max(), r / r.sum(), c / c.sum()
