"""Multilayer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Sequential):
    """A fully connected network that flattens its input.

    Args:
        sizes: widths of all layers, input and output included, for example (784, 256, 10).
        bias: whether the layers have biases.
        activation: makes the module between two layers.

    Raises:
        ValueError: fewer than two sizes, or one below 1.

    Example:
        >>> sum(p.numel() for p in MLP((4, 3, 2)).parameters())
        23
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        bias: bool = True,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes must be at least two positive widths, got {list(sizes)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
        super().__init__(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs of shape (b, ...) to outputs of shape (b, sizes[-1])."""
        out: Tensor = super().forward(x)
        return out
