"""From cells to masks of the size of the images."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["render_mask"]


def _blur(mask: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Separable Gaussian blur of (N, 1, H, W) with reflected borders."""
    half = kernel_size // 2
    place = torch.arange(-half, half + 1, dtype=mask.dtype, device=mask.device)
    weights = (-0.5 * (place / sigma) ** 2).exp()
    weights = weights / weights.sum()
    padded = F.pad(mask, (half, half, half, half), mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def render_mask(
    cells: Tensor,
    size: tuple[int, int],
    kernel_size: int | None = None,
    sigma: float | None = None,
) -> Tensor:
    """Turn cells into masks of the size of the images: enlarge blocks, then blur.

    Args:
        cells: values of the cells, shape ``(N, J)``, J a square; row by row of the grid.
        size: height and width of the images.
        kernel_size: side of the Gaussian blur, odd; without it there is no blur.
        sigma: standard deviation of the blur in pixels, positive; goes with ``kernel_size``.

    Returns:
        Masks of shape ``(N, 1, H, W)``, to be multiplied with the images, all channels alike.

    Raises:
        ValueError: J is not a square, an even or too large kernel, a kernel without sigma.

    Source: the released code (training loop; kernel 13, sigma 6 at 224 pixels).

    Example:
        >>> render_mask(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), (2, 4))[0, 0].tolist()
        [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    """
    if cells.ndim != 2 or isqrt(cells.shape[1]) ** 2 != cells.shape[1] or cells.shape[1] == 0:
        raise ValueError(f"cells must have shape (N, J) with J a square, got {tuple(cells.shape)}")
    if (kernel_size is None) != (sigma is None):
        raise ValueError(f"kernel_size and sigma go together, got {kernel_size} and {sigma}")
    grid = isqrt(cells.shape[1])
    row, column = (torch.arange(n, device=cells.device) * grid // n for n in size)
    mask = cells.view(-1, 1, grid, grid).index_select(2, row).index_select(3, column)
    if kernel_size is None or sigma is None:
        return mask
    if kernel_size < 1 or kernel_size % 2 == 0 or kernel_size // 2 >= min(size):
        raise ValueError(
            f"kernel_size must be odd, positive and below twice the image, got {kernel_size}"
        )
    if not sigma > 0.0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    return _blur(mask, kernel_size, sigma)
