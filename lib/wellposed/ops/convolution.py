"""Convolutions as linear maps: their matrices and their singular values."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv_matrix", "singular_values"]

Padding = Literal["circular", "zeros", "valid"]


def check_layer(out_channels: int, in_channels: int, kernel_size: int, stride: int) -> None:
    """Refuse numbers out of range, by name."""
    if out_channels < 1 or in_channels < 1:
        raise ValueError(
            f"out_channels and in_channels must be >= 1, got {out_channels}, {in_channels}"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")


def check_kernel(kernel: Tensor, stride: int, ndim: int = 4) -> tuple[int, int, int]:
    """M, C and k of a kernel, or of a stack of kernels."""
    name = "kernel" if ndim == 4 else "kernels"
    if kernel.ndim != ndim or kernel.shape[-1] != kernel.shape[-2] or len(kernel) < 1:
        axes = "(M, C, k, k)" if ndim == 4 else "(r, M, C, k, k)"
        raise ValueError(f"{name} must have shape {axes}, got {tuple(kernel.shape)}")
    if not kernel.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, got {kernel.dtype}")
    m, c, k = kernel.shape[-4], kernel.shape[-3], kernel.shape[-1]
    check_layer(m, c, k, stride)
    return m, c, k


def check_size(size: int, stride: int, kernel_size: int) -> None:
    """Refuse an image that is smaller than the kernel."""
    if size < 1 or size * stride < kernel_size:
        raise ValueError(
            f"size * stride must be at least the kernel's size {kernel_size}, got {size} * {stride}"
        )


def responses(kernels: Tensor, size: int, stride: int, padding_mode: Padding) -> Tensor:
    """Matrices (r, M * size², inputs) of several layers: their outputs for each unit image."""
    r, m, c, k, _ = kernels.shape
    half = k // 2
    side = (size - 1) * stride + k if padding_mode == "valid" else size * stride
    units = torch.eye(c * side**2, dtype=kernels.dtype, device=kernels.device)
    units = units.view(-1, c, side, side)
    if half and padding_mode != "valid":
        mode = "circular" if padding_mode == "circular" else "constant"
        units = F.pad(units, (half, half, half, half), mode=mode)
    out = F.conv2d(units, kernels.flatten(0, 1), stride=stride)
    return out.view(-1, r, m * size**2).permute(1, 2, 0)


def check_padding(padding_mode: str) -> None:
    """Refuse a padding that is not known."""
    if padding_mode not in ("circular", "zeros", "valid"):
        raise ValueError(f"padding_mode must be circular, zeros or valid, got {padding_mode!r}")


def conv_matrix(
    kernel: Tensor, size: int, stride: int = 1, *, padding_mode: Padding = "circular"
) -> Tensor:
    r"""The matrix of a convolution (torch's cross-correlation), written out.

    Images are flattened by channel, row, column.

    Args:
        kernel: shape (M, C, k, k), k odd.
        size: N, height and width of the *output*.
        stride: S, at least 1.
        padding_mode: circular; zeros, with as much padding; or valid, no padding at all.

    Returns:
        Shape (M N², C (SN)²); for valid padding the image has S (N - 1) + k pixels a side.

    Raises:
        ValueError: a kernel of another shape, an even k, a stride below 1, SN below k, or another
            padding.

    Source: Achour et al. 2022, the layer's transform matrix.

    Example:
        >>> conv_matrix(torch.tensor([[[[2.0]]]]), 2).diagonal()
        tensor([2., 2., 2., 2.])
    """
    check_size(size, stride, check_kernel(kernel, stride)[2])
    check_padding(padding_mode)
    return responses(kernel[None], size, stride, padding_mode)[0]


def frequency_blocks(kernel: Tensor, size: int, stride: int) -> tuple[Tensor, Tensor]:
    r"""Blocks (f, M, C S²) that the Fourier transform makes of the matrix; how often each counts.

    A stride folds S² input frequencies onto each output frequency. The kernel is real, so a
    frequency and its negative have the same singular values; only half of them are computed.
    """
    m, c = kernel.shape[:2]
    n, s = size, stride
    full = torch.fft.fft2(kernel, s=(n * s, n * s)).reshape(m, c, s, n, s, n)
    blocks = full[..., : n // 2 + 1].permute(3, 5, 0, 1, 2, 4).reshape(-1, m, c * s * s) / s
    counts = torch.full((n // 2 + 1,), 2, device=kernel.device)
    counts[0] = 1
    if n % 2 == 0:
        counts[-1] = 1
    return blocks, counts.repeat(n)


def singular_values(kernel: Tensor, size: int, stride: int = 1) -> Tensor:
    r"""Singular values of a circular convolution, without its matrix.

    N² small singular value problems of size M x C S², one for each frequency.

    Args:
        kernel: shape (M, C, k, k), k odd.
        size: N, height and width of the output.
        stride: S, at least 1.

    Returns:
        Shape (min(M, C S²) N²,), descending.

    Raises:
        ValueError: a kernel of another shape, an even k, a stride below 1, or SN below k.

    Source: Sedghi et al. 2019 for stride 1; Achour et al. 2022, appendix, for other strides.

    Example:
        >>> singular_values(torch.tensor([[[[3.0]], [[4.0]]]]), 2)
        tensor([5., 5., 5., 5.])
    """
    check_size(size, stride, check_kernel(kernel, stride)[2])
    blocks, counts = frequency_blocks(kernel, size, stride)
    values: Tensor = torch.linalg.svdvals(blocks)
    # Negative frequencies repeat their partners; those that are their own partner stand once.
    return values.repeat_interleave(counts, 0).flatten().sort(descending=True).values
