"""A plain convolutional network, and the same network with fewer filters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["ConvNet", "prune_filters"]


class ConvNet(nn.Module):
    """Convolutions 3 x 3 with batch normalization and ReLU, a mean over space, a linear layer.

    Args:
        in_channels: of the images, at least 1.
        widths: filters of each layer.
        classes: width of the output.
        strides: of each layer.

    Raises:
        ValueError: lists of different lengths or empty ones, or a number below 1.

    Source: ours, a small VGG.

    Example:
        >>> ConvNet(1, [4, 6], 3, strides=[2, 1]).layers(8, 8)
        [(1, 4, 3, 4, 4), (4, 6, 3, 4, 4)]
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], classes: int, *, strides: Sequence[int]
    ) -> None:
        super().__init__()
        if len(widths) != len(strides) or min([in_channels, classes, *widths, *strides, 1]) < 1:
            raise ValueError(f"widths and strides must match and be >= 1, got {widths}, {strides}")
        if not widths:
            raise ValueError("widths must not be empty")
        sizes = list(pairwise([in_channels, *widths]))
        convs = [nn.Conv2d(a, b, 3, s, 1, bias=False) for (a, b), s in zip(sizes, strides)]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in widths])
        self.classifier = nn.Linear(widths[-1], classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """Outputs ``(n, c_l, h_l, w_l)`` of all layers."""
        outs = []
        for conv, norm in zip(self.convs, self.norms):
            x = norm(conv(x)).relu()
            outs.append(x)
        return outs

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(n, in_channels, h, w)`` to class scores ``(n, classes)``."""
        out: Tensor = self.classifier(self.features(x)[-1].mean((2, 3)))
        return out

    def layers(self, height: int, width: int) -> list[tuple[int, int, int, int, int]]:
        """The table of convolutions for images of this size, one row a layer."""
        table: list[tuple[int, int, int, int, int]] = []
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            height, width = (-(-size // conv.stride[0]) for size in (height, width))
            table.append((conv.in_channels, conv.out_channels, 3, height, width))
        return table


@torch.no_grad()
def prune_filters(net: ConvNet, keep: Sequence[Tensor]) -> ConvNet:
    """A thinner network that consists of some of a network's filters.

    In evaluation mode it computes what ``net`` computes with the other filters' outputs at zero.

    Args:
        net: the network; it is not changed.
        keep: for each layer, int64 indices of the filters to keep, at least one.

    Returns:
        A network with parameters of its own, in the mode of ``net``.

    Raises:
        ValueError: not one list of indices a layer, or an empty one.

    Example:
        >>> thin = prune_filters(ConvNet(1, [4, 6], 3, strides=[2, 1]), [torch.tensor([0, 2])] * 2)
        >>> thin.layers(8, 8)
        [(1, 2, 3, 4, 4), (2, 2, 3, 4, 4)]
    """
    if len(keep) != len(net.convs) or min(len(k) for k in keep) < 1:
        raise ValueError(f"keep must name at least one filter for each of {len(net.convs)} layers")
    table = [conv.stride[0] for conv in net.convs if isinstance(conv, nn.Conv2d)]
    inputs, classes = net.layers(1, 1)[0][0], net.classifier.out_features
    thin = ConvNet(inputs, [len(k) for k in keep], classes, strides=table)
    thin.to(net.classifier.weight).train(net.training)
    before = torch.arange(inputs, device=keep[0].device)
    for old, new, norm, thin_norm, kept in zip(
        net.convs, thin.convs, net.norms, thin.norms, keep, strict=True
    ):
        new.get_parameter("weight").copy_(old.get_parameter("weight")[kept][:, before])
        state = {name: v[kept] if v.ndim else v for name, v in norm.state_dict().items()}
        thin_norm.load_state_dict(state)
        before = kept
    thin.classifier.weight.copy_(net.classifier.weight[:, before])
    thin.classifier.bias.copy_(net.classifier.bias)
    return thin
