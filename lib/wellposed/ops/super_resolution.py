"""Pairs of small and large images, and how well the large ones are restored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["enlarge", "psnr", "random_pairs", "shrink", "to_gray"]


def _check_images(name: str, images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
        raise ValueError(f"{name} must be floating images (n, c, h, w), got {tuple(images.shape)}")


def to_gray(images: Tensor) -> Tensor:
    """Brightness of color images.

    Args:
        images: ``(n, 3, h, w)``.

    Returns:
        ``(n, 1, h, w)``, with the weights of ITU-R BT.601.

    Raises:
        ValueError: not three channels.

    Example:
        >>> round(to_gray(torch.ones(1, 3, 1, 1)).item(), 4)
        1.0
    """
    _check_images("images", images)
    if images.shape[1] != 3:
        raise ValueError(f"images must have three channels, got {images.shape[1]}")
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def shrink(images: Tensor, scale: int) -> Tensor:
    """Smaller images by bicubic interpolation with antialiasing, the usual degradation.

    Args:
        images: ``(n, c, h, w)``, sides divisible by ``scale``.
        scale: at least 1.

    Returns:
        ``(n, c, h / scale, w / scale)``.

    Raises:
        ValueError: sides that are not divisible.

    Example:
        >>> shrink(torch.ones(1, 1, 8, 8), 2).shape
        torch.Size([1, 1, 4, 4])
    """
    _check_images("images", images)
    h, w = images.shape[2:]
    if scale < 1 or h % scale or w % scale:
        raise ValueError(f"scale must be >= 1 and divide the sides {h}, {w}, got {scale}")
    return F.interpolate(images, size=(h // scale, w // scale), mode="bicubic", antialias=True)


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Larger images by bicubic interpolation: what a network has to beat.

    Args:
        images: ``(n, c, h, w)``.
        scale: at least 1.

    Returns:
        ``(n, c, h * scale, w * scale)``.

    Raises:
        ValueError: a scale below 1.

    Example:
        >>> enlarge(torch.ones(1, 1, 4, 4), 2).shape
        torch.Size([1, 1, 8, 8])
    """
    _check_images("images", images)
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    return F.interpolate(images, scale_factor=scale, mode="bicubic")


def random_pairs(
    small: Tensor, large: Tensor, *, crop: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Crops at random places, the same in a small image and in its large one.

    Args:
        small: ``(n, c, h, w)``.
        large: ``(n, c, h * s, w * s)``.
        crop: side of the small crops, at most h and w.
        count: how many.
        generator: draws images and places on its own device.

    Returns:
        Crops ``(count, c, crop, crop)`` and ``(count, c, crop * s, crop * s)``.

    Raises:
        ValueError: sizes that do not match, or a crop that does not fit.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> a, b = random_pairs(torch.rand(3, 1, 8, 8), torch.rand(3, 1, 16, 16), crop=4, count=5,
        ...                     generator=g)
        >>> a.shape[2:], b.shape[2:]
        (torch.Size([4, 4]), torch.Size([8, 8]))
    """
    _check_images("small", small)
    _check_images("large", large)
    (n, c, h, w), scale = small.shape, large.shape[2] // small.shape[2]
    if large.shape != (n, c, h * scale, w * scale):
        raise ValueError(f"large must match small, got {tuple(large.shape)}, {tuple(small.shape)}")
    if not 1 <= crop <= min(h, w) or count < 1:
        raise ValueError(f"crop must be from 1 to {min(h, w)} and count >= 1, got {crop}, {count}")
    high = torch.tensor([[n], [h - crop + 1], [w - crop + 1]], device=generator.device)
    draws = torch.rand(3, count, generator=generator, device=generator.device)
    image, top, left = (draws * high).long().minimum(high - 1).to(small.device)

    def cut(source: Tensor, times: int) -> Tensor:
        span = torch.arange(crop * times, device=source.device)
        rows = (top * times).view(-1, 1, 1) + span.view(1, -1, 1)
        columns = (left * times).view(-1, 1, 1) + span.view(1, 1, -1)
        return source[image.view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)

    return cut(small, 1), cut(large, scale)


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [0, 1], in decibels.

    Args:
        error: mean squared errors, any shape; zero gives infinity.

    Returns:
        ``-10 log10(error)``.

    Example:
        >>> psnr(torch.tensor([0.01, 0.001])).tolist()
        [20.0, 30.0]
    """
    return -10.0 * error.log10()
