"""Four images in one, of which only one belongs to the label."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compose_quadrants"]


def compose_quadrants(x: Tensor, y: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four images in one, of which only the top left one belongs to the label.

    The three others are drawn at random from the same images, with replacement: they look the same
    and say nothing. So the informative part of the large image is known.

    Args:
        x: images, shape ``(n, channels, h, w)``.
        y: labels, shape ``(n,)``.
        generator: source of the distractors, on the CPU.

    Returns:
        Images of shape ``(n, channels, 2 h, 2 w)``, and ``y`` itself.

    Raises:
        ValueError: images that are not 4-D, or another number of labels.

    Source: ours, a task with a known answer.

    Example:
        >>> x, y = torch.tensor([3.0]).view(1, 1, 1, 1), torch.tensor([1])
        >>> compose_quadrants(x, y, generator=torch.Generator())[0].tolist()
        [[[[3.0, 3.0], [3.0, 3.0]]]]
    """
    if x.ndim != 4 or len(x) == 0 or y.shape != x.shape[:1]:
        raise ValueError(
            "x must have shape (n, channels, h, w) and y (n,), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    right, low, corner = torch.randint(len(x), (3, len(x)), generator=generator).to(x.device)
    top = torch.cat([x, x[right]], dim=-1)
    return torch.cat([top, torch.cat([x[low], x[corner]], dim=-1)], dim=-2), y
