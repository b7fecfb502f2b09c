r"""Projections on the simplex, and on its part with few nonzeros, along one axis.

The projection of $x$ on $\{p\ge0,\ \sum_ip_i=z\}$ is $p=[x-\theta]_+$ with the one threshold
$\theta$ that gives the right sum. With at most $k$ nonzeros the best support is that of the $k$
largest entries; the projection of those $k$ numbers on their own simplex is then exact.

Source: Held, Wolfe and Crowder, "Validation of subgradient optimization", Mathematical Programming
1974 (threshold); Kyrillidis, Becker, Cevher and Koch, "Sparse projections onto the simplex", ICML
2013 (support of the $k$ largest).
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

__all__ = ["project_simplex", "project_sparse_simplex", "simplex_threshold"]


def simplex_threshold(top: Tensor, z: float | Tensor) -> Tensor:
    r"""The threshold $\theta$ with $\sum_i[v_i-\theta]_+=z$.

    $$\rho=\max\{r: r v_r>\textstyle\sum_{i\le r}v_i-z\},\qquad
    \theta=\tfrac1\rho\bigl(\textstyle\sum_{i\le\rho}v_i-z\bigr)$$

    Args:
        top: $v$, in descending order along the last axis, `(..., k)`.
        z: total, at least 0; a number or `(...)`.

    Returns:
        $\theta$, `(..., 1)`. Differentiable.

    Raises:
        RuntimeError: from torch, where shapes do not fit.

    Example:
        >>> simplex_threshold(torch.tensor([3.0, 2.0, -4.0]), 1.0).item()   # exactly one entry left
        2.0
    """
    total = z.unsqueeze(-1) if isinstance(z, Tensor) else z
    excess = top.cumsum(-1) - total
    rank = torch.arange(1, top.shape[-1] + 1, device=top.device, dtype=top.dtype)
    rho = (rank * top > excess).sum(-1, keepdim=True).clamp(min=1)
    return excess.gather(-1, rho - 1) / rho


def project_sparse_simplex(x: Tensor, k: int, z: float | Tensor = 1.0, dim: int = -1) -> Tensor:
    r"""Projection on the vectors with sum $z$, no negative entry and at most $k$ nonzeros.

    $$\arg\min_p\ \|p-x\|^2\quad\text{with } p\ge0,\ \textstyle\sum_ip_i=z,\ \|p\|_0\le k$$

    Where the $k$-th and the next entry tie, either answer is a projection; one is returned.

    Args:
        x: any shape, floating.
        k: largest number of nonzeros, at least 1; above the length it means no limit.
        z: total, at least 0: a number, or a tensor with the shape of `x` without `dim`.
        dim: the axis that holds a vector.

    Returns:
        The shape of `x`; entries outside the support are exact zeros. Differentiable where the
        support does not change.

    Raises:
        TypeError: `x` is not a floating tensor, `k` is not an integer.
        ValueError: `k` below 1, `z` negative or of another shape, an empty axis.

    Example:
        >>> project_sparse_simplex(torch.tensor([0.5, 0.75, -1.0, 0.25]), 2).tolist()
        [0.375, 0.625, 0.0, 0.0]
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("x must be a floating tensor")
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if x.ndim == 0 or x.shape[dim] == 0:
        raise ValueError(f"x must have at least one entry along dim, got {tuple(x.shape)}")
    rows = x.movedim(dim, -1)
    if isinstance(z, Tensor):
        if z.ndim and z.shape != rows.shape[:-1]:
            raise ValueError(f"z must have shape {tuple(rows.shape[:-1])}, got {tuple(z.shape)}")
        z = z.to(x.dtype).expand(rows.shape[:-1])
    elif not isinstance(z, Real) or not 0 <= z < float("inf"):
        raise ValueError(f"z must be finite and at least 0, got {z}")
    if k >= rows.shape[-1]:  # nothing to leave out: no need to know where the largest are
        top = rows.sort(dim=-1, descending=True).values
        return (rows - simplex_threshold(top, z)).clamp(min=0).movedim(-1, dim)
    top, place = rows.topk(k, dim=-1)
    kept = (top - simplex_threshold(top, z)).clamp(min=0)
    return torch.zeros_like(rows).scatter(-1, place, kept).movedim(-1, dim)


def project_simplex(x: Tensor, z: float | Tensor = 1.0, dim: int = -1) -> Tensor:
    r"""Projection on the vectors with sum $z$ and no negative entry.

    Args:
        x: any shape, floating.
        z: total, at least 0: a number, or a tensor with the shape of `x` without `dim`.
        dim: the axis that holds a vector.

    Returns:
        The shape of `x`. Differentiable almost everywhere.

    Raises:
        TypeError, ValueError: see :func:`project_sparse_simplex`.

    Example:
        >>> project_simplex(torch.tensor([0.5, 1.0, -1.0])).tolist()
        [0.25, 0.75, 0.0]
    """
    return project_sparse_simplex(x, max(1, x.shape[dim]), z, dim)
