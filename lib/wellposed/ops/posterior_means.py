"""Denoisers in closed form: what the best estimate is if the images' distribution is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["empirical_mean", "two_level_mean", "wiener_mean"]


def _check(y: Tensor, other: Tensor, name: str, sigma: float) -> None:
    if y.ndim != 2 or other.ndim != 2 or 0 in other.shape or y.shape[1] != other.shape[1]:
        raise ValueError(
            f"y and {name} must be rows of one length, got {tuple(y.shape)}, {tuple(other.shape)}"
        )
    if not 0.0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}")


def wiener_mean(y: Tensor, mean: Tensor, covariance: Tensor, *, sigma: float) -> Tensor:
    r"""The best linear denoiser, :math:`m+C(C+\sigma^2I)^{-1}(y-m)`.

    It shrinks along the principal components of the images, the same for every image.

    Args:
        y: noisy images, one a row, ``(n, d)``.
        mean: :math:`m`, ``(d,)``.
        covariance: :math:`C`, symmetric and without negative eigenvalues, ``(d, d)``.
        sigma: standard deviation of the noise, positive.

    Returns:
        Estimates ``(n, d)``.

    Raises:
        ValueError: shapes that do not fit, or ``sigma`` out of range.

    Example:
        >>> wiener_mean(torch.tensor([[2.0]]), torch.zeros(1), torch.ones(1, 1), sigma=1.0).item()
        1.0
    """
    _check(y, covariance, "covariance", sigma)
    if mean.shape != y.shape[1:] or len(covariance) != len(mean):
        raise ValueError(
            f"mean must be ({y.shape[1]},) and covariance square, got {tuple(mean.shape)}, "
            f"{tuple(covariance.shape)}"
        )
    # In single precision the decomposition fails for some covariances of low rank.
    values, vectors = (v.to(y.dtype) for v in torch.linalg.eigh(covariance.double()))
    values = values.clamp(min=0)
    gain = values / (values + sigma**2)
    out: Tensor = mean + ((y - mean) @ vectors * gain) @ vectors.mT
    return out


def empirical_mean(y: Tensor, images: Tensor, *, sigma: float) -> Tensor:
    r"""The posterior mean if only these images exist: the optimum of a network that memorizes.

    .. math:: \hat x(y)=\sum_iw_ix_i,\qquad w_i\propto e^{-\|y-x_i\|^2/2\sigma^2}

    Args:
        y: noisy images, one a row, ``(n, d)``.
        images: the images :math:`x_i`, ``(m, d)``.
        sigma: standard deviation of the noise, positive.

    Returns:
        Estimates ``(n, d)``.

    Raises:
        ValueError: shapes that do not fit, or ``sigma`` out of range.

    Example:
        >>> empirical_mean(torch.tensor([[0.5]]), torch.tensor([[0.0], [1.0]]), sigma=1.0).item()
        0.5
    """
    _check(y, images, "images", sigma)
    scores = y @ images.mT - images.square().sum(1) / 2  # what does not depend on i drops out
    return (scores / sigma**2).softmax(1) @ images


def two_level_mean(y: Tensor, masks: Tensor, *, sigma: float) -> Tensor:
    r"""The posterior mean of images with two gray values, one inside an unknown mask.

    All masks are equally likely, and so are all gray values. For one mask the estimate is the
    projection on constants and the mask. With :math:`\bar y` the mean of :math:`y` and :math:`e_k`
    the k-th mask, its mean removed and its length :math:`l_k` set to one,

    .. math::
        \hat x(y)=\bar y+\sum_kw_k\langle y,e_k\rangle e_k,\qquad
        w_k\propto\frac1{l_k}e^{\langle y,e_k\rangle^2/2\sigma^2}.

    Args:
        y: noisy images, one a row, ``(n, d)``.
        masks: ``(m, d)``; constant ones are left out.
        sigma: standard deviation of the noise, positive.

    Returns:
        Estimates ``(n, d)``.

    Raises:
        ValueError: shapes that do not fit, ``sigma`` out of range, or only constant masks.

    Example:
        >>> two_level_mean(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]), sigma=1.0)
        tensor([[1., 2.]])
    """
    _check(y, masks, "masks", sigma)
    varying = masks - masks.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(varying, dim=1)
    scale = masks.abs().amax(1) * math.sqrt(masks.shape[1])
    seen = length > 1e-5 * scale
    if not bool(seen.any()):
        raise ValueError("masks must hold one that is not constant")
    length = torch.where(seen, length, 1.0)
    unit = varying / length[:, None]
    inner = y @ unit.mT
    logits = inner.square() / (2 * sigma**2) - length.log()
    weight = logits.masked_fill(~seen, -torch.inf).softmax(1)
    return y.mean(1, keepdim=True) + (weight * inner) @ unit
