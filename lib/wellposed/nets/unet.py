"""Small U-Nets that remove noise, with and without additive constants, alone or side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BiasFreeUNet", "StackedUNets", "UNet"]

LAST = 0.1
"""Factor on the first weights of the last layer: training starts near the identity."""


def _layers(channels: int, depth: int, in_channels: int) -> list[tuple[str, int, int]]:
    """Kind, outputs and inputs of each layer, in the order in which they run."""
    widths = [channels * 2**k for k in range(depth)]
    found = []
    for k, wide in enumerate(widths):
        found += [("conv", wide, widths[k - 1] if k else in_channels), ("conv", wide, wide)]
    for k in range(depth - 2, -1, -1):
        wide = widths[k]
        found += [("up", wide, widths[k + 1]), ("conv", wide, 2 * wide)]
        found.append(("conv", wide if k else in_channels, wide))
    return found


def _narrow_conv(x: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """A grouped convolution 3 x 3 with one output a network: taps first, then shifted sums.

    Grouped convolutions with so few outputs are several times slower on a CPU.
    """
    taps = weight.flatten(2).mT.flip(1)  # (size, 9, in): the fold shifts the other way
    maps = taps @ x.flatten(2).unflatten(1, (size, -1))
    out = F.fold(maps.flatten(1, 2), x.shape[-2:], 3, padding=1)
    return out if bias is None else out + bias[:, None, None]


def _residual(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], size: int) -> Tensor:
    """Run the layers of `size` networks whose channels stand one after the other.

    Weights are ``(size * out, in, 3, 3)``, on the way up ``(size * in, out, 2, 2)``.
    """
    constants = iter(biases)
    layers: Iterator[tuple[Tensor, Tensor | None]] = ((w, next(constants, None)) for w in weights)
    depth = (len(weights) + 3) // 5

    def conv(v: Tensor) -> Tensor:
        weight, bias = next(layers)
        if len(weight) == size > 1:
            return _narrow_conv(v, weight, bias, size)
        return F.conv2d(v, weight, bias, padding=1, groups=size)

    kept = []
    for k in range(depth):
        x = F.avg_pool2d(x, 2) if k else x
        x = conv(conv(x).relu()).relu()
        kept.append(x)
    for k in range(depth - 2, -1, -1):
        weight, bias = next(layers)
        x = F.conv_transpose2d(x, weight, bias, stride=2, groups=size)
        pair = [v.unflatten(1, (size, -1)) for v in (x, kept[k])]
        x = conv(conv(torch.cat(pair, dim=2).flatten(1, 2)).relu())
        x = x.relu() if k else x
    return x


def _check(y: Tensor, ndim: int, depth: int) -> None:
    step = 2 ** (depth - 1)
    if y.ndim != ndim or 0 in y.shape or y.shape[-1] % step or y.shape[-2] % step:
        raise ValueError(
            f"y must hold images, {ndim} axes in all, whose sides are multiples of {step}, got "
            f"shape {tuple(y.shape)}"
        )


class UNet(nn.Module):
    r"""A denoiser :math:`\hat x(y)=y-u(y)`, where :math:`u` is a U-Net without normalization.

    Each resolution has two convolutions 3 x 3 with ReLU; the number of channels doubles where the
    resolution is halved.

    Args:
        channels: at full resolution, at least 1.
        depth: number of resolutions, at least 2.
        in_channels: of the images, at least 1.
        biases: whether each layer adds a constant to its outputs.

    Raises:
        ValueError: a number out of range; in a call, images that cannot be halved often enough.

    Source: Kadkhodaie et al. 2024, U-Net; theirs has four resolutions and 64 channels, and divides
        by running standard deviations.

    Example:
        >>> UNet(4, 2)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self, channels: int = 16, depth: int = 2, in_channels: int = 1, *, biases: bool = True
    ) -> None:
        super().__init__()
        if min(channels, in_channels) < 1 or depth < 2:
            raise ValueError(
                "channels and in_channels must be at least 1 and depth at least 2, got "
                f"{channels}, {in_channels} and {depth}"
            )
        self.depth = depth
        weights, constants = [], []
        for kind, outputs, inputs in _layers(channels, depth, in_channels):
            if kind == "conv":
                start = torch.randn(outputs, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
            else:
                start = torch.randn(inputs, outputs, 2, 2) * inputs**-0.5
            weights.append(start)
            constants.append(torch.zeros(outputs))
        weights[-1] = LAST * weights[-1]
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(constants if biases else [])

    def forward(self, y: Tensor) -> Tensor:
        """Denoise images ``(n, in_channels, h, w)``."""
        _check(y, 4, self.depth)
        return y - _residual(y, list(self.weights), list(self.biases), 1)


class BiasFreeUNet(UNet):
    r"""A :class:`UNet` without additive constants: :math:`\hat x(cy)=c\,\hat x(y)` for :math:`c>0`.

    By Euler's theorem :math:`\hat x(y)=J(y)\,y` with the Jacobian :math:`J`.

    Args:
        channels: at full resolution, at least 1.
        depth: number of resolutions, at least 2.
        in_channels: of the images, at least 1.

    Raises:
        ValueError: a number out of range; in a call, images that cannot be halved often enough.

    Source: Kadkhodaie et al. 2024, after Mohan et al. 2020 (bias-free denoisers).

    Example:
        >>> net, y = BiasFreeUNet(4, 2), torch.randn(1, 1, 8, 8)
        >>> torch.allclose(net(4 * y), 4 * net(y))
        True
    """

    def __init__(self, channels: int = 16, depth: int = 2, in_channels: int = 1) -> None:
        super().__init__(channels, depth, in_channels, biases=False)


class StackedUNets(nn.Module):
    """U-Nets of one shape side by side: a grouped convolution serves all of them.

    Parameters are those of the networks, stacked on a first axis.

    Args:
        networks: at least one, all of one shape; they are copied.

    Raises:
        ValueError: no network, or shapes that differ; in a call, inputs of a wrong shape.

    Source: ours.

    Example:
        >>> nets = [BiasFreeUNet(4, 2) for _ in range(3)]
        >>> y = torch.randn(3, 5, 1, 8, 8)
        >>> torch.allclose(StackedUNets(nets)(y)[1], nets[1](y[1]), atol=1e-5)
        True
    """

    def __init__(self, networks: Sequence[UNet]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("networks must hold at least one network")
        shapes = [[tuple(p.shape) for p in net.parameters()] for net in networks]
        if any(other != shapes[0] for other in shapes):
            raise ValueError("networks must all have the same shape")
        self.size, self.depth = len(networks), networks[0].depth

        def stacked(lists: list[nn.ParameterList]) -> nn.ParameterList:
            columns = zip(*lists, strict=True)
            return nn.ParameterList([torch.stack([p.detach() for p in col]) for col in columns])

        self.weights = stacked([net.weights for net in networks])
        self.biases = stacked([net.biases for net in networks])

    def forward(self, y: Tensor) -> Tensor:
        """Denoise ``(size, b, channels, h, w)``, images of its own for each network."""
        _check(y, 5, self.depth)
        if len(y) != self.size:
            raise ValueError(f"y must have {self.size} slices, one a network, got {len(y)}")
        weights = [w.flatten(0, 1) for w in self.weights]
        biases = [b.flatten(0, 1) for b in self.biases]
        x = y.transpose(0, 1).flatten(1, 2)
        out = _residual(x, weights, biases, self.size)
        denoised: Tensor = y - out.unflatten(1, (self.size, -1)).transpose(0, 1)
        return denoised

    @torch.no_grad()
    def networks(self) -> list[UNet]:
        """Copies of the networks as they are now, each by itself."""
        wide, colors = self.weights[0].shape[1:3]
        kind = [UNet(wide, self.depth, colors, biases=bool(self.biases)) for _ in range(self.size)]
        for i, net in enumerate(kind):
            net.to(self.weights[0])
            for mine, theirs in zip(net.parameters(), self.parameters(), strict=True):
                mine.copy_(theirs[i])
        return kind
