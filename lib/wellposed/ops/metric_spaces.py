"""Metric spaces for responses that are no vectors, and distance correlation.

All functions take batches of samples on leading axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "bounded_metric",
    "distance_correlation",
    "spd_distances",
    "sphere_distances",
    "wasserstein_distances",
]


def _euclidean(points: Tensor) -> Tensor:
    """Distances of rows by differences: exact zeros on the diagonal, exactly symmetric."""
    found: Tensor = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return found


def wasserstein_distances(quantiles: Tensor) -> Tensor:
    r"""2-Wasserstein distances of distributions on the line, from their quantile functions.

    :math:`W_2(a, b)^2 = \int_0^1 (Q_a(t) - Q_b(t))^2 dt`, here the mean over the levels given.

    Args:
        quantiles: shape ``(..., n, q)``, the same levels for all distributions.

    Returns:
        Distances ``(..., n, n)``.

    Raises:
        ValueError: fewer than two axes, or no level.

    Source: the standard formula for distributions on the line.

    Example:
        >>> wasserstein_distances(torch.tensor([[0.0, 1.0], [3.0, 4.0]]))[0, 1]  # moved by three
        tensor(3.)
    """
    if quantiles.ndim < 2 or quantiles.shape[-1] < 1:
        raise ValueError(f"quantiles must have shape (..., n, q), got {tuple(quantiles.shape)}")
    return _euclidean(quantiles) / math.sqrt(quantiles.shape[-1])


def sphere_distances(points: Tensor) -> Tensor:
    r"""Arc lengths between unit vectors: :math:`2 \arctan(\|a-b\| / \|a+b\|)`.

    Unlike the arc cosine this is exact for equal points and accurate for opposite ones.

    Args:
        points: unit vectors, shape ``(n, d)``; batches ``(..., n, d)`` work too.

    Returns:
        Distances in :math:`[0, \pi]`, shape ``(..., n, n)``.

    Raises:
        ValueError: fewer than two axes, or rows that are not of length one.

    Source: Kahan's formula for the angle between vectors.

    Example:
        >>> east_north_west = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> (sphere_distances(east_north_west)[0] / torch.pi).tolist()
        [0.0, 0.5, 1.0]
    """
    if points.ndim < 2:
        raise ValueError(f"points must have shape (..., n, d), got {tuple(points.shape)}")
    if not bool(((points.norm(dim=-1) - 1.0).abs() < 1e-3).all()):
        raise ValueError("points must be unit vectors")
    sums = torch.cdist(points, -points, compute_mode="donot_use_mm_for_euclid_dist")
    return 2.0 * torch.atan2(_euclidean(points), sums)


def spd_distances(matrices: Tensor, *, power: float = 0.5) -> Tensor:
    r"""Power-Euclidean distances: :math:`\frac1\alpha \|A^\alpha - B^\alpha\|_F`.

    One half is the root metric, 1 is Frobenius; towards 0 it becomes the log-Euclidean metric.

    Args:
        matrices: symmetric positive definite, shape ``(..., n, m, m)``.
        power: :math:`\alpha > 0`.

    Returns:
        Distances ``(..., n, n)``.

    Raises:
        ValueError: no square matrices, an eigenvalue that is not positive, or a power not above 0.

    Source: Dryden, Koloydenko and Zhou 2009, the power-Euclidean metric.

    Example:
        >>> spd_distances(torch.diag_embed(torch.tensor([[1.0, 1.0], [4.0, 1.0]])))[0, 1]  # 2(2-1)
        tensor(2.)
    """
    if matrices.ndim < 3 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"matrices must have shape (..., n, m, m), got {tuple(matrices.shape)}")
    if not 0.0 < power < math.inf:
        raise ValueError(f"power must be positive, got {power}")
    values, vectors = torch.linalg.eigh(matrices)
    if not bool((values > 0.0).all()):
        raise ValueError("matrices must be positive definite")
    powers = (vectors * values.pow(power).unsqueeze(-2)) @ vectors.mT
    return _euclidean(powers.flatten(-2)) / power


def bounded_metric(distances: Tensor) -> Tensor:
    r"""The metric :math:`\rho / (m + \rho)` with the median distance :math:`m`: below 1.

    Args:
        distances: shape ``(..., n, n)``.

    Returns:
        Distances in [0, 1), same shape.

    Raises:
        ValueError: not square.

    Source: a usual way to bound a metric; the robust competitor of the same family.

    Example:
        >>> bounded_metric(torch.tensor([[0.0, 3.0], [3.0, 0.0]]))[0, 1]  # the median is 0 here
        tensor(1.)
    """
    if distances.ndim < 2 or distances.shape[-1] != distances.shape[-2]:
        raise ValueError(f"distances must have shape (..., n, n), got {tuple(distances.shape)}")
    median = distances.flatten(-2).median(-1).values[..., None, None]
    return distances / (median + distances).clamp_min(torch.finfo(distances.dtype).tiny)


def distance_correlation(a: Tensor, b: Tensor) -> Tensor:
    r"""Distance correlation, :math:`\sqrt{dCov^2(a,b) / \sqrt{dVar^2(a) dVar^2(b)}}`.

    Zero in the limit only for independent variables; it ignores sign, rotation and scale.

    Args:
        a: shape ``(n, p)``; batches ``(..., n, p)`` work too.
        b: shape ``(n, q)``, with the same batches.

    Returns:
        Number in [0, 1], shape ``(...)``; 0 where one side is constant.

    Raises:
        ValueError: shapes that do not match.

    Source: Székely, Rizzo and Bakirov 2007, V-statistics.

    Example:
        >>> a = torch.tensor([[0.0], [1.0], [3.0]])
        >>> distance_correlation(a, 5.0 - 2.0 * a)
        tensor(1.)
    """
    if a.ndim < 2 or a.shape[:-1] != b.shape[:-1] or a.shape[-2] < 1:
        raise ValueError(
            f"a and b must have shapes (..., n, p) and (..., n, q), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    parts = []
    for points in (a, b):
        d = _euclidean(points)  # dCor has no units: of mean one, its squares stay in range
        d = d / d.mean((-2, -1), keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)
        d = d - d.mean(-1, keepdim=True)
        parts.append(d - d.mean(-2, keepdim=True))
    (x, y), axes = parts, (-2, -1)
    cov, scale = (x * y).mean(axes), (x.square().mean(axes) * y.square().mean(axes)).sqrt()
    tiny = torch.finfo(scale.dtype).tiny
    return (cov / scale.clamp_min(tiny)).clamp(0.0, 1.0).sqrt()
