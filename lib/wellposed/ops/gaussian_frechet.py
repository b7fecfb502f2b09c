"""Fréchet distance between Gaussians, and the weighted moments that describe them (for FID)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frechet_distance", "weighted_moments"]


def weighted_moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of weighted rows, for many sets of rows at once.

    :math:`m=\sum_iw_ix_i/\sum_iw_i`, :math:`C=\sum_iw_i(x_i-m)(x_i-m)^\top/\sum_iw_i`; with
    weights 0 and 1, the moments of a part of the rows, without gathering them.

    Args:
        x: rows (..., n, d).
        weight: (..., n), at least 0; where all are 0, both moments are 0.

    Returns:
        Means (..., d) and covariances (..., d, d).

    Raises:
        ValueError: shapes that do not match.

    Source: the definition.

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [9.0]])
        >>> mean, cov = weighted_moments(x, torch.tensor([1, 1, 0]))
        >>> mean.item(), cov.item()
        (1.0, 1.0)
    """
    if x.ndim < 2 or x.shape[:-1] != weight.shape:
        raise ValueError(
            f"weight must have the shape of x without its last axis, got {tuple(weight.shape)} "
            f"for x of shape {tuple(x.shape)}"
        )
    weight = weight.to(x.dtype)
    share = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    mean = (share.unsqueeze(-1) * x).sum(-2)
    centered = x - mean.unsqueeze(-2)
    return mean, (share.unsqueeze(-1) * centered).mT @ centered


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    r"""Squared 2-Wasserstein distance between Gaussians.

    :math:`|m_a-m_b|^2+\mathrm{tr}\,C_a+\mathrm{tr}\,C_b-2\,\mathrm{tr}(C_a^{1/2}C_bC_a^{1/2})^{1/2}`.

    Args:
        mean_a: (..., d).
        cov_a: (..., d, d), symmetric and positive semidefinite; so is `cov_b`.
        mean_b: (..., d), may broadcast against the first.
        cov_b: (..., d, d).

    Returns:
        (...), at least 0 up to rounding; float64 is advised.

    Raises:
        ValueError: shapes that do not match, or a number that is not finite.

    Source: Dowson and Landau 1982; Heusel et al. 2017, equation (6), use it on features.

    Example:
        >>> zero, one = torch.zeros(1).double(), torch.eye(1).double()
        >>> frechet_distance(zero, one, zero + 3, 4 * one).item()  # 3^2 + (1 - 2)^2
        10.0
    """
    d = mean_a.shape[-1] if mean_a.ndim else 0
    shapes = [tuple(t.shape[-k:]) for t, k in ((cov_a, 2), (mean_b, 1), (cov_b, 2))]
    if d == 0 or shapes != [(d, d), (d,), (d, d)]:
        raise ValueError(f"means (..., d) and covariances (..., d, d) must match, got {shapes}")
    if not all(bool(t.isfinite().all()) for t in (mean_a, cov_a, mean_b, cov_b)):
        raise ValueError("means and covariances must be finite")
    # Each covariance in units of its largest variance: their product stays in range.
    unit_a, unit_b = (_largest(cov) for cov in (cov_a, cov_b))
    values, vectors = torch.linalg.eigh(cov_a / unit_a[..., None, None])
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    inner = root @ (cov_b / unit_b[..., None, None]) @ root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum(-1)
    cross = cross * unit_a.sqrt() * unit_b.sqrt()
    traces = (cov_a + cov_b).diagonal(dim1=-2, dim2=-1).sum(-1)
    out: Tensor = (mean_a - mean_b).square().sum(-1) + traces - 2 * cross
    return out


def _largest(cov: Tensor) -> Tensor:
    """The largest variance, or 1 where it is 0."""
    top = cov.diagonal(dim1=-2, dim2=-1).amax(-1)
    return torch.where(top > 0, top, 1.0)
