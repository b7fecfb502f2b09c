"""A small residual network for images."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

__all__ = ["ResNet"]


class _Block(nn.Module):
    """Two 3 x 3 convolutions with batch normalization, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(x)).relu()
        return cast(Tensor, (self.norm2(self.conv2(hidden)) + self.shortcut(x)).relu())


class ResNet(nn.Module):
    """A residual network in the style of those for CIFAR: stages that halve the image.

    Args:
        channels: of the input images, at least 1.
        classes: width of the output, at least 1.
        width: channels of the first stage, at least 1; each later stage has twice as many.
        blocks: residual blocks in each stage; (2, 2, 2) has 14 layers.
        dropout: rate before the last layer, in [0, 1).

    Raises:
        ValueError: a number out of range, or no stage.

    Example:
        >>> import torch
        >>> ResNet(1, 10, width=4, blocks=(1, 1))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        width: int = 16,
        blocks: tuple[int, ...] = (2, 2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(channels, classes, width, *blocks, len(blocks)) < 1 or not 0.0 <= dropout < 1.0:
            raise ValueError(
                "channels, classes, width and blocks must be at least 1, dropout in [0, 1), got "
                f"{channels}, {classes}, {width}, {blocks}, {dropout}"
            )
        stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        stages, inputs = [], width
        for i, count in enumerate(blocks):
            outputs = width * 2**i
            strides = [1 if i == 0 else 2] + [1] * (count - 1)
            widths = [inputs] + [outputs] * (count - 1)
            stages.append(nn.Sequential(*[_Block(w, outputs, s) for w, s in zip(widths, strides)]))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape (b, channels, h, w) to outputs of shape (b, classes)."""
        return cast(Tensor, self.head(self.stages(self.stem(x)).mean((2, 3))))
