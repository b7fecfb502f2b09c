"""Neural collapse: how far features of classes are from one point a class, evenly spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CollapseMetrics", "balanced_one_hot", "collapse_metrics", "within_span_of_means"]


@dataclass(frozen=True)
class CollapseMetrics:
    """How far features are from collapse; each of the batch shape of the features."""

    within: Tensor  # trace of the within-class covariance
    between: Tensor  # trace of the covariance of the class means
    nc1_ratio: Tensor  # within / between, the paper's Eq. 3
    nc1_pinv: Tensor  # tr(within covariance x pseudo-inverse of the other) / K
    nc2: Tensor  # distance of the class means from a simplex


def balanced_one_hot(features: Tensor, labels: Tensor) -> Tensor:
    """One-hot labels of a balanced set of features.

    Args:
        features: `(..., N, d)`, float and finite.
        labels: `(N,)`, int64 in 0..K-1, equally many of each.

    Returns:
        `(N, K)`, dtype and device of the features.

    Raises:
        ValueError: shapes that do not fit, unbalanced or missing classes, a value not finite.

    Source: ours.

    Example:
        >>> balanced_one_hot(torch.zeros(2, 3), torch.tensor([1, 0]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    if features.ndim < 2 or features.numel() == 0 or not features.is_floating_point():
        raise ValueError(
            f"features must be a float tensor (..., N, d), got {features.dtype} of shape "
            f"{tuple(features.shape)}"
        )
    if labels.shape != features.shape[-2:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({features.shape[-2]},), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite")
    if int(labels.min()) < 0:
        raise ValueError("labels must be at least 0")
    counts = torch.bincount(labels)
    if not bool((counts == counts[0]).all()):
        raise ValueError(f"labels must be balanced over 0..K-1, got counts {counts.tolist()}")
    return torch.nn.functional.one_hot(labels, len(counts)).to(features)


def collapse_metrics(features: Tensor, labels: Tensor) -> CollapseMetrics:
    r"""Measure within-class variability and the structure of the class means.

    $$\Sigma_W=\frac1{Kn}\sum_{k,i}(h_{k,i}-\bar h_k)(\cdot)^\top,\quad
    \Sigma_B=\frac1K\sum_k(\bar h_k-\bar h_G)(\cdot)^\top,\quad
    \widetilde{NC}_1=\frac{\mathrm{Tr}\,\Sigma_W}{\mathrm{Tr}\,\Sigma_B},$$
    $$NC_1=\tfrac1K\mathrm{Tr}(\Sigma_W\Sigma_B^\dagger),\qquad
    NC_2=\Big\|\frac G{\|G\|}-\frac{I-11^\top/K}{\sqrt{K-1}}\Big\|$$

    with $G$ the Gram matrix of the centered class means.

    Args:
        features: `(..., N, d)`, float and finite; leading axes are a batch.
        labels: `(N,)`, int64 in 0..K-1, equally many of each of at least 2 classes.

    Returns:
        Metrics of the batch shape. Where the class means coincide, the two NC1 are infinite: a
        vanishing $\Sigma_B$ is not collapse.

    Raises:
        ValueError: shapes that do not fit, unbalanced or missing classes, a value not finite.

    Source: Tirer et al. 2023, Eq. 3 and Section 5.

    Example:
        >>> h = torch.tensor([[0.0], [2.0], [4.0], [6.0]])     # means 1 and 5
        >>> found = collapse_metrics(h, torch.tensor([0, 0, 1, 1]))
        >>> found.within.item(), found.between.item(), found.nc1_ratio.item()
        (1.0, 4.0, 0.25)
    """
    one_hot = balanced_one_hot(features, labels)
    k = one_hot.shape[1]
    if k < 2:
        raise ValueError("labels must hold at least 2 classes: there is nothing between one")
    # A power of two near the largest entry: nothing overflows, and nothing is rounded.
    largest = features.detach().abs().amax((-2, -1), keepdim=True)
    scale = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 1)
    h = features / scale
    means = one_hot.mT @ h / (len(labels) // k)
    deviation = h - one_hot @ means
    centered = means - means.mean(-2, keepdim=True)
    within = deviation.square().sum((-2, -1)) / len(labels)
    between = centered.square().sum((-2, -1)) / k
    gram = centered @ centered.mT
    size = gram.square().sum((-2, -1), keepdim=True).sqrt()
    eye = torch.eye(k, dtype=h.dtype, device=h.device)
    simplex = (eye - 1 / k) / math.sqrt(k - 1)
    off = gram / torch.where(size > 0, size, torch.ones_like(size)) - simplex
    apart = between > 0
    safe = torch.where(apart, between, torch.ones_like(between))
    endless = torch.full_like(between, math.inf)
    pinv = _pinv_trace(deviation, centered) / k
    square = scale[..., 0, 0].square()
    return CollapseMetrics(
        within * square,
        between * square,
        torch.where(apart, within / safe, endless),
        torch.where(apart, pinv, endless),
        torch.linalg.vector_norm(off, dim=(-2, -1)),
    )


def _pinv_trace(deviation: Tensor, centered: Tensor) -> Tensor:
    """Tr(within covariance x pseudo-inverse of the covariance of the means), from Gram matrices."""
    k = centered.shape[-2]
    gram = centered @ centered.mT
    # The direction (1, ..., 1) is null by construction; lifted, it is never divided by noise.
    lift = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None] / k
    values, vectors = torch.linalg.eigh(gram + torch.where(lift > 0, lift, 1.0))
    cutoff = 8 * torch.finfo(gram.dtype).eps * values[..., -1:]  # relative 1e-6 in float32
    keep = values > cutoff
    inverse = torch.where(keep, 1 / torch.where(keep, values, torch.ones_like(values)), 0.0)
    along = deviation @ (centered.mT @ vectors)
    power = along.square().sum(-2) / deviation.shape[-2]
    trace: Tensor = k * (power * inverse.square()).sum(-1)
    return trace


def within_span_of_means(features: Tensor, labels: Tensor) -> Tensor:
    r"""Part of $\mathrm{Tr}\,\Sigma_W$ that lies in the span of the class means.

    $\mathrm{Tr}(Q^\top\Sigma_WQ)$ with an orthonormal basis $Q$ of $\bar h_1,\dots,\bar h_K$.

    Args:
        features: `(..., N, d)`, float and finite, $d\ge K$.
        labels: `(N,)`, int64 in 0..K-1, equally many of each.

    Returns:
        0-d, or of the batch shape; at most `within` of :func:`collapse_metrics`.

    Raises:
        ValueError: as :func:`balanced_one_hot`; fewer dimensions than classes.

    Source: ours.

    Example:
        >>> h = torch.tensor([[3.0, 2.0], [5.0, -2.0]])     # mean (4, 0), deviation (1, -2)
        >>> within_span_of_means(h, torch.tensor([0, 0])).item()
        1.0
    """
    one_hot = balanced_one_hot(features, labels)
    k = one_hot.shape[1]
    if features.shape[-1] < k:
        raise ValueError(f"features must have at least {k} dimensions, one for each class")
    means = one_hot.mT @ features / (len(labels) // k)
    basis = torch.linalg.qr(means.mT)[0]
    along: Tensor = (features - one_hot @ means) @ basis
    return along.square().sum((-2, -1)) / len(labels)
