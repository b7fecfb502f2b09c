"""The discrete cosine transform of images, and denoising by shrinkage in this fixed basis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["dct_matrix", "dct_shrinkage"]


def dct_matrix(
    n: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    r"""The orthonormal cosine transform of type II as a matrix.

    .. math:: D_{kj}=\sqrt{\tfrac{2-[k=0]}{n}}\,\cos\frac{\pi k(2j+1)}{2n}

    Args:
        n: length, at least 1.
        dtype, device: of the matrix; the default ones if not given.

    Returns:
        ``(n, n)``; the rows are orthonormal, from the constant to the fastest wave.

    Raises:
        ValueError: ``n`` is less than 1.

    Example:
        >>> dct_matrix(2, dtype=torch.float64).square()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    k = torch.arange(n, dtype=torch.float64, device=device)
    waves = torch.cos(math.pi / (2 * n) * k[:, None] * (2 * k + 1))
    waves[0] /= math.sqrt(2)
    return (waves * math.sqrt(2 / n)).to(dtype or torch.get_default_dtype())


def dct_shrinkage(y: Tensor, *, sigma: float, factor: float = 3.0) -> Tensor:
    r"""Denoise images by hard thresholding in the cosine basis, the same basis for every image.

    .. math:: \hat x=\sum_k\mathbf 1\{|\langle y,e_k\rangle|>c\sigma\}\,\langle y,e_k\rangle\,e_k

    The mean of the image, the first coefficient, is always kept.

    Args:
        y: noisy images, ``(n, C, H, W)``.
        sigma: standard deviation of the noise, positive.
        factor: :math:`c`, at least 0; 0 returns the noisy images.

    Returns:
        Estimates ``(n, C, H, W)``.

    Raises:
        ValueError: ``y`` is not floating-point images, or a number is out of range.

    Source: D. Donoho and I. Johnstone, Biometrika 1994, for the threshold; they use wavelets.

    Example:
        >>> dct_shrinkage(torch.tensor([[[[3.0, 1.0]]]]), sigma=1.0).round(decimals=4)
        tensor([[[[2., 2.]]]])
    """
    if y.ndim != 4 or 0 in y.shape or not y.is_floating_point():
        raise ValueError(f"y must be floating-point images (n, C, H, W), got {tuple(y.shape)}")
    if not (0.0 < sigma < math.inf and 0.0 <= factor < math.inf):
        raise ValueError(
            f"sigma must be positive and factor at least 0, both finite, got {sigma} and {factor}"
        )
    down, across = (dct_matrix(n, dtype=y.dtype, device=y.device) for n in y.shape[2:])
    waves = down @ y @ across.mT
    keep = waves.abs() > factor * sigma
    keep[..., 0, 0] = True
    return down.mT @ (waves * keep) @ across
