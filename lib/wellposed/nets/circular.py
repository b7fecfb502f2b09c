"""Convolutional networks with circular padding, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CircularConv", "CircularNet"]


class CircularConv(nn.Module):
    """A convolution with circular padding in each of several networks, without bias.

    The kernels are kept as matrices ``(networks, out, in * k * k)``, so that
    ``torch.nn.utils.parametrize`` acts on the reshaped kernel.

    Args:
        networks: how many, at least 1.
        in_channels: channels of the input, at least 1.
        out_channels: channels of the output, at least 1.
        kernel_size: odd, at least 1.
        stride: at least 1; it must divide the input's height and width.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> CircularConv(2, 3, 4, 5, 1).kernel.shape
        torch.Size([2, 4, 3, 5, 5])
    """

    def __init__(
        self, networks: int, in_channels: int, out_channels: int, kernel_size: int, stride: int
    ) -> None:
        super().__init__()
        if min(networks, in_channels, out_channels, stride) < 1:
            raise ValueError("networks, channels and stride must be at least 1")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.shape = (networks, out_channels, in_channels, kernel_size, kernel_size)
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(*self.shape[:2], in_channels * kernel_size**2))
        nn.init.trunc_normal_(self.weight, std=self.weight.shape[-1] ** -0.5)

    @property
    def kernel(self) -> Tensor:
        """The kernels ``(networks, out, in, k, k)``."""
        return self.weight.view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, networks * in, h, w)`` to ``(n, networks * out, h / stride, w / stride)``."""
        networks, half = self.shape[0], self.shape[-1] // 2
        if half:
            x = F.pad(x, (half, half, half, half), mode="circular")
        return F.conv2d(x, self.kernel.flatten(0, 1), stride=self.stride, groups=networks)


class CircularNet(nn.Module):
    """Circular convolutions with ReLU and a linear layer, in several networks side by side.

    The linear layer is a 1 x 1 convolution of the flattened features. There are no biases, no
    pooling and no normalization: the network is a product of its layers' matrices and of ReLUs,
    and its Lipschitz constant is at most the product of their largest singular values.

    Args:
        networks: how many, at least 1.
        in_channels: of the images.
        size: height and width of the images.
        classes: width of the output.
        widths: filters of each convolution.
        kernel_sizes: odd, one a convolution.
        strides: one a convolution; their product divides ``size``.

    Raises:
        ValueError: lists of different lengths, or strides that do not divide the size.

    Example:
        >>> net = CircularNet(2, 1, 8, 10, widths=[4], kernel_sizes=[3], strides=[2])
        >>> net(torch.zeros(2, 5, 1, 8, 8)).shape, net.sizes
        (torch.Size([2, 5, 10]), [4, 1])
    """

    def __init__(
        self,
        networks: int,
        in_channels: int,
        size: int,
        classes: int,
        *,
        widths: Sequence[int],
        kernel_sizes: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        super().__init__()
        if not len(widths) == len(kernel_sizes) == len(strides) > 0:
            raise ValueError("widths, kernel_sizes and strides must match and not be empty")
        layers, channels = [], in_channels
        self.sizes = []  # of the outputs
        for width, kernel_size, stride in zip(widths, kernel_sizes, strides, strict=True):
            if size % stride or size < kernel_size:
                raise ValueError(f"a layer of stride {stride} and size {kernel_size} gets {size}")
            layers.append(CircularConv(networks, channels, width, kernel_size, stride))
            channels, size = width, size // stride
            self.sizes.append(size)
        layers.append(CircularConv(networks, channels * size**2, classes, 1, 1))
        self.sizes.append(1)
        self.layers = nn.ModuleList(layers)

    def convolutions(self) -> list[CircularConv]:
        """All layers, the linear one included."""
        return [layer for layer in self.layers if isinstance(layer, CircularConv)]

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(networks, n, c, h, w)`` to logits ``(networks, n, classes)``.

        Raises:
            ValueError: another shape, or no images.
        """
        *convs, last = self.convolutions()
        networks, side = last.shape[0], self.sizes[0] * convs[0].stride
        shape = (networks, x.shape[1] if x.ndim > 1 else 0, convs[0].shape[2], side, side)
        if x.shape != shape or x.numel() == 0:
            raise ValueError(f"x must have shape {shape} with images, got {tuple(x.shape)}")
        n = shape[1]
        x = x.transpose(0, 1).flatten(1, 2)
        for conv in convs:
            x = conv(x).relu()
        x = last(x.reshape(n, -1, 1, 1))
        return x.view(n, networks, -1).transpose(0, 1)
