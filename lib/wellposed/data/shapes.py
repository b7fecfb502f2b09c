"""Images made by rule, whose best denoiser is known: disks, and regions with a smooth border."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["CONTOUR_SPREAD", "calpha_images", "disk_images", "disk_masks"]

CONTOUR_SPREAD = 0.15
"""Standard deviation of a contour's height, as a share of the image."""


def _check(n: int, size: int) -> None:
    if n < 1 or size < 4:
        raise ValueError(f"n must be at least 1 and size at least 4, got {n} and {size}")


def disk_masks(row: Tensor, column: Tensor, radius: Tensor, size: int) -> Tensor:
    r"""The share of each pixel that a disk covers, about: :math:`\min(1,\max(0,r-\rho+\frac12))`.

    Here :math:`\rho` is the distance of the pixel's center from the disk's, so that the mask moves
    smoothly with all three numbers.

    Args:
        row: of the center, in pixels, any shape.
        column: likewise; pixel centers lie at whole numbers.
        radius: in pixels.
        size: side of the images, at least 1.

    Returns:
        Masks in [0, 1], shape ``(..., size, size)``.

    Raises:
        ValueError: shapes that differ, or ``size`` below 1.

    Source: ours; the authors draw disks with a plotting library.

    Example:
        >>> one = torch.tensor(1.0)
        >>> disk_masks(one, one, one, 3)[1].tolist()  # the middle row
        [0.5, 1.0, 0.5]
    """
    if not row.shape == column.shape == radius.shape or size < 1:
        raise ValueError(
            "row, column and radius must have one shape and size be at least 1, got "
            f"{tuple(row.shape)}, {tuple(column.shape)}, {tuple(radius.shape)} and {size}"
        )
    place = torch.arange(size, dtype=row.dtype, device=row.device)
    down, right = place[:, None] - row[..., None, None], place - column[..., None, None]
    distance = torch.hypot(down, right)
    return (radius[..., None, None] - distance + 0.5).clamp(0, 1)


def disk_images(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Images of one disk: five numbers, drawn uniformly, tell all about an image.

    The center lies in the middle half of the image, the radius between 1/8 and 1/3 of the side, and
    the gray values of disk and background in [0, 1].

    Args:
        n: images, at least 1.
        size: side, at least 4.
        generator: source of the numbers; it decides the device.

    Returns:
        Shape ``(n, 1, size, size)``, float32, in [0, 1].

    Raises:
        ValueError: a number out of range.

    Source: Kadkhodaie et al. 2024, disk images (position, radius, two gray values).

    Example:
        >>> x = disk_images(2, 16, torch.Generator().manual_seed(0))
        >>> x.shape, len(x[0].unique()) > 2  # the disk's border is smooth
        (torch.Size([2, 1, 16, 16]), True)
    """
    _check(n, size)
    u = torch.rand(5, n, generator=generator, device=generator.device)
    center = (size - 1) / 2 + (u[:2] - 0.5) * size / 2
    mask = disk_masks(center[0], center[1], (1 / 8 + u[2] * (1 / 3 - 1 / 8)) * size, size)
    inside, outside = u[3:, :, None, None]
    gray: Tensor = outside + (inside - outside) * mask
    return gray[:, None]


def _smooth_noise(shape: tuple[int, ...], alpha: float, generator: torch.Generator) -> Tensor:
    r"""Uniform noise in (-1, 1) filtered by :math:`|k|^{-\alpha}` over the axes after the first."""
    device = generator.device
    noise = 2 * torch.rand(shape, generator=generator, device=device) - 1
    axes = tuple(range(1, len(shape)))
    squares = torch.zeros(shape[1:], device=device)
    for axis in axes:
        k = torch.fft.fftfreq(shape[axis], 1 / shape[axis], device=device)
        squares = squares + k.square().view(-1, *[1] * (len(shape) - 1 - axis))
    gain = squares.clamp(min=1).sqrt() ** -alpha  # the mean counts as the lowest frequency
    field: Tensor = torch.fft.ifftn(torch.fft.fftn(noise, dim=axes) * gain, dim=axes).real
    return field


def _between(field: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Fields moved and scaled, each by itself, so that they fill a range."""
    least, most = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
    moved: Tensor = low + (high - low) * (field - least) / (most - least)
    return moved


def calpha_images(n: int, alpha: float, size: int, generator: torch.Generator) -> Tensor:
    r"""Two smooth regions with a smooth border between them, both :math:`C^\alpha`.

    Regions and border are noise filtered by :math:`|k|^{-\alpha}`; one region fills a range that
    begins at 0, the other one that ends at 1. The border is blurred over two pixels.

    Args:
        n: images, at least 1.
        alpha: regularity, at least 0: the larger, the smoother.
        size: side, at least 4.
        generator: source of the numbers; it decides the device.

    Returns:
        Shape ``(n, 1, size, size)``, float32, in [0, 1].

    Raises:
        ValueError: a number out of range.

    Source: Kadkhodaie et al. 2024, :math:`C^\alpha` images; the authors' code (generators). Their
        contours' spread depends on the size of the image; ours is a constant.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> rough, smooth = (calpha_images(50, alpha, 16, g) for alpha in (1.0, 4.0))
        >>> bool(rough.diff(dim=-1).abs().mean() > smooth.diff(dim=-1).abs().mean())
        True
    """
    _check(n, size)
    if not 0.0 <= alpha < math.inf:
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
    device = generator.device
    first, second = (_smooth_noise((n, size, size), alpha, generator) for _ in range(2))
    u = torch.rand(3, n, 1, 1, generator=generator, device=device)
    dark, light = _between(first, u[0] * 0, u[0]), _between(second, u[1], u[1] * 0 + 1)
    height = _smooth_noise((n, size), alpha, generator)
    typical = height.square().mean().sqrt() if n > 1 else height.square().mean(1).sqrt()
    border = size * (0.5 + CONTOUR_SPREAD * height / typical)
    row = torch.arange(size, device=device)[:, None]
    above = (border[:, None, :] - row).clamp(0, 2) / 2  # 1 above the border, 0 below it
    above = torch.where(u[2] < 0.5, above, 1 - above)
    return (above * dark + (1 - above) * light)[:, None]
