"""A head whose outputs are cosines, encoders, and students near their teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.nets.columns import columns

__all__ = ["L2BottleneckHead", "interpolate_init", "mlp_encoder", "vgg_encoder"]

HEAD_STD = 0.02  # of the truncated normal that fills the head (Appendix E.1)


class L2BottleneckHead(nn.Module):
    r"""Projection head whose outputs are cosines: an MLP, a normalized bottleneck, unit rows.

    .. math:: z = W\, \mathrm{mlp}(x) + b, \qquad
              f(x)_i = \Bigl\langle \frac{v_i}{\|v_i\|}, \frac{z}{\|z\|} \Bigr\rangle \in [-1, 1]

    Weights are truncated normal with deviation 0.02, biases zero. The hidden layers are ``mlp``,
    the map to :math:`z` is ``bottleneck``, and row ``i`` of ``last.weight`` is :math:`v_i`.

    Args:
        in_dim: size of the embeddings.
        hidden_dims: widths of the hidden layers, each followed by GELU.
        bottleneck_dim: size of :math:`z`.
        out_dim: number of outputs.

    Raises:
        ValueError: a width below 1.

    Source: Appendix A and E.1.

    Example:
        >>> head = L2BottleneckHead(3, hidden_dims=(4,), bottleneck_dim=2, out_dim=5)
        >>> with torch.no_grad():  # the first row along the bottleneck of this input
        ...     x = torch.ones(1, 3)
        ...     _ = head.last.weight[0].copy_(7 * head.bottleneck(head.mlp(x))[0])
        >>> round(head(x)[0, 0].item(), 4)
        1.0
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dims: tuple[int, ...] = (2048, 2048),
        bottleneck_dim: int = 256,
        out_dim: int = 65536,
    ) -> None:
        super().__init__()
        sizes = [in_dim, *hidden_dims, bottleneck_dim, out_dim]
        if min(sizes) < 1:
            raise ValueError(f"all widths of the head must be at least 1, got {sizes}")
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, hidden_dims):
            layers += [nn.Linear(inputs, outputs), nn.GELU()]
        self.mlp = nn.Sequential(*layers)
        self.bottleneck = nn.Linear(sizes[-3], bottleneck_dim)
        self.last = nn.Linear(bottleneck_dim, out_dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=HEAD_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map embeddings (b, in_dim) to cosines (b, out_dim)."""
        z = F.normalize(self.bottleneck(self.mlp(x)), dim=-1)
        return F.linear(z, F.normalize(self.last.weight, dim=-1))

    def columns(self, own: Mapping[str, Tensor], x: Tensor, prefix: str) -> Tensor:
        """The same for networks side by side; see :func:`wellposed.nets.columns.columns`."""
        x = columns(self.mlp, own, x, f"{prefix}mlp.")
        z = F.normalize(columns(self.bottleneck, own, x, f"{prefix}bottleneck."), dim=1)
        return F.normalize(own[f"{prefix}last.weight"], dim=-1) @ z


def _kaiming(module: nn.Module) -> nn.Module:
    """Draw all weights again, Kaiming normal for ReLU, with zero biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            if isinstance(layer, nn.Conv2d):  # as in torchvision's VGG and ResNet
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def mlp_encoder(
    in_features: int, *, width: int = 64, depth: int = 12, batch_norm: bool = False
) -> nn.Module:
    """Deep narrow encoder: ``depth`` times linear, batch normalization if wanted, ReLU.

    Args:
        in_features: number of inputs, flattened.
        width: size of every layer and of the embedding.
        depth: number of layers, at least 1.
        batch_norm: whether each linear map is followed by batch normalization.

    Returns:
        A module from ``(b, ...)`` to ``(b, width)``; weights are Kaiming normal.

    Raises:
        ValueError: a size below 1.

    Source: our stand-in for the paper's VGG11 and ResNet18 on one core.

    Example:
        >>> sum(p.numel() for p in mlp_encoder(4, width=3, depth=2).parameters())
        27
    """
    if min(in_features, width, depth) < 1:
        raise ValueError(
            f"in_features, width and depth must be at least 1, got {in_features}, {width}, {depth}"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for size in [in_features, *[width] * (depth - 1)]:
        layers.append(nn.Linear(size, width))
        layers += [nn.BatchNorm1d(width)] if batch_norm else []
        layers.append(nn.ReLU())
    return _kaiming(nn.Sequential(*layers))


def vgg_encoder(in_channels: int, *, width: int = 64, batch_norm: bool = False) -> nn.Module:
    """The eight convolutions of VGG11 for images of up to 32 by 32 pixels, without classifier.

    Args:
        in_channels: channels of the image.
        width: channels of the first convolution, 64 in VGG11; the embedding is 8 times as wide.
        batch_norm: whether each convolution is followed by batch normalization.

    Returns:
        A module from ``(b, in_channels, h, w)`` to ``(b, 8 * width)``, Kaiming normal (fan-out).

    Raises:
        ValueError: a size below 1.

    Source: Appendix E.1 (VGG11 without classifier).

    Example:
        >>> vgg_encoder(1, width=2)(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 16])
    """
    if min(in_channels, width) < 1:
        raise ValueError(f"in_channels and width must be at least 1, got {in_channels}, {width}")
    layers: list[nn.Module] = []
    channels = in_channels
    for stage in [(1,), (2,), (4, 4), (8, 8), (8, 8)]:
        for factor in stage:
            layers.append(nn.Conv2d(channels, factor * width, 3, padding=1))
            layers += [nn.BatchNorm2d(factor * width)] if batch_norm else []
            layers.append(nn.ReLU())
            channels = factor * width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return _kaiming(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


@torch.no_grad()
def interpolate_init(teacher: nn.Module, other: nn.Module, alpha: float) -> nn.Module:
    r"""A student between the teacher and an independent draw, with the variance kept.

    .. math:: \theta_S(\alpha) = \frac{(1 - \alpha)\, \theta_T + \alpha\, \tilde\theta}
                                      {\sqrt{(1 - \alpha)^2 + \alpha^2}}

    Args:
        teacher: network with :math:`\theta_T`.
        other: network of the same architecture with :math:`\tilde\theta`.
        alpha: 0 gives the teacher, 1 the other network; in [0, 1].

    Returns:
        A new module; all parameters (biases and scales too) are mixed, buffers are the teacher's.

    Raises:
        ValueError: ``alpha`` out of range, or architectures that differ.

    Source: Section 4, "Local Initialization".

    Example:
        >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = nn.init.constant_(a.weight, 3.0), nn.init.constant_(b.weight, 4.0)
        >>> round(interpolate_init(a, b, 0.5).weight.item(), 4)  # (3 + 4) / sqrt(2)
        4.9497
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    student, theirs = copy.deepcopy(teacher), dict(other.named_parameters())
    own = dict(student.named_parameters())
    if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in theirs.items()}:
        raise ValueError("teacher and other must have the same architecture")
    delta = math.hypot(1.0 - alpha, alpha)
    for name, parameter in own.items():
        parameter.copy_(((1.0 - alpha) * parameter + alpha * theirs[name]) / delta)
    return student
