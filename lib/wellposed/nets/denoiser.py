"""Plain residual denoisers on rows of pixels, and several denoisers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from wellposed.nets.columns import stacked_forward
from wellposed.nets.mlp import MLP
from wellposed.nets.stacked import Stacked

__all__ = ["Residual", "SideBySide", "StackedDenoisers", "residual_cnn"]


class Residual(nn.Module):
    """A plain denoiser, :math:`y+b(y)`: the rival, which nothing makes a proximal operator.

    Args:
        body: maps rows to rows of the same length.

    Source: the residual form of DnCNN, Zhang et al. 2017.

    Example:
        >>> Residual(nn.Identity())(torch.ones(1, 2)).tolist()
        [[2.0, 2.0]]
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, y: Tensor) -> Tensor:
        """Denoise rows, ``(b, d)`` to ``(b, d)``."""
        out: Tensor = y + self.body(y)
        return out


def residual_cnn(shape: tuple[int, int, int], channels: int, num_layers: int) -> Residual:
    """A convolutional residual denoiser on rows of pixels, without normalization.

    Args:
        shape: channels, height and width of an image.
        channels: of the hidden layers, at least 1.
        num_layers: convolutions, at least 2.

    Returns:
        A :class:`Residual`.

    Raises:
        ValueError: a number out of range.

    Source: after DnCNN, Zhang et al. 2017.

    Example:
        >>> residual_cnn((1, 4, 4), 2, 3)(torch.zeros(5, 16)).shape
        torch.Size([5, 16])
    """
    if num_layers < 2 or min(*shape, channels) < 1:
        raise ValueError(
            "num_layers must be at least 2, channels and shape positive, got "
            f"{num_layers}, {channels} and {shape}"
        )
    widths = [shape[0], *[channels] * (num_layers - 1), shape[0]]
    layers: list[nn.Module] = [nn.Unflatten(1, shape)]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return Residual(nn.Sequential(*layers[:-1], nn.Flatten()))


class StackedDenoisers(nn.Module):
    """Fully connected denoisers of one shape side by side, some of them residual.

    Args:
        bodies: at least one :class:`wellposed.nets.MLP`, all of one shape; copied.
        residual: for each, whether its input is added to its output.

    Raises:
        ValueError: numbers of both that differ, no network, shapes that differ.

    Source: ours.

    Example:
        >>> bodies = [MLP((2, 2)), MLP((2, 2))]
        >>> y = torch.ones(2, 3, 2)
        >>> out = StackedDenoisers(bodies, [False, True])(y)
        >>> torch.allclose(out[1], y[1] + bodies[1](y[1]))
        True
    """

    skip: Tensor

    def __init__(self, bodies: Sequence[MLP], residual: Sequence[bool]) -> None:
        super().__init__()
        if len(bodies) != len(residual):
            raise ValueError(f"residual must hold {len(bodies)} values, got {len(residual)}")
        self.stack = Stacked(bodies)
        self.register_buffer("skip", torch.tensor(residual).float().view(-1, 1, 1))

    def forward(self, y: Tensor) -> Tensor:
        """Map ``(s, b, d)`` to ``(s, b, d)``."""
        return stacked_forward(self.stack, y) + self.skip * y

    def networks(self) -> list[nn.Module]:
        """Copies of the networks, each by itself."""
        pairs = zip(self.stack.networks(), self.skip.flatten().tolist(), strict=True)
        return [Residual(body) if residual else body for body, residual in pairs]


class SideBySide(nn.Module):
    """Networks of any kind, each on its own rows, one after the other.

    Args:
        networks: at least one module, each mapping ``(b, d)`` to ``(b, d)``; not copied.

    Raises:
        ValueError: no network; in a call, an input whose first axis does not count the networks.

    Source: ours.

    Example:
        >>> SideBySide([Residual(nn.Identity())] * 2)(torch.ones(2, 1, 1)).flatten().tolist()
        [2.0, 2.0]
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("networks must hold at least one module")
        self.members = nn.ModuleList(networks)
        self.size = len(networks)

    def forward(self, y: Tensor) -> Tensor:
        """Map ``(s, b, d)`` to ``(s, b, d)``."""
        if len(y) != self.size:
            raise ValueError(f"y must have shape ({self.size}, b, d), got {tuple(y.shape)}")
        return torch.stack([net(rows) for net, rows in zip(self.members, y, strict=True)])

    def clamp_weights(self) -> None:
        """Clamp the members that can be clamped."""
        for net in self.members:
            clamp = getattr(net, "clamp_weights", None)
            if callable(clamp):
                clamp()

    def networks(self) -> list[nn.Module]:
        """The networks."""
        return list(self.members)
