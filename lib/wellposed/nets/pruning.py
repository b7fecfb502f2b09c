"""Which weights of a network survive pruning."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["magnitude_mask", "random_mask"]


@torch.no_grad()
def magnitude_mask(module: nn.Module, sparsity: float) -> dict[str, Tensor]:
    r"""Which weights survive when the globally smallest are pruned.

    Args:
        module: any network; all parameters with two axes or more take part, biases do not.
        sparsity: share to prune, in [0, 1).

    Returns:
        Boolean masks by name of parameter: False for the ``floor(sparsity * N)`` smallest
        magnitudes among all ``N`` weights.

    Raises:
        ValueError: ``sparsity`` out of range, or no such parameter.

    Source: F. Sarnthein et al., "Random Teachers are Good Teachers", arXiv:2302.12091,
        Section 6 (global magnitude pruning).

    Example:
        >>> net = nn.Linear(4, 1)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
        >>> magnitude_mask(net, 0.5)["weight"].tolist()
        [[True, False, False, True]]
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    if not weights:
        raise ValueError("module must have at least one parameter with two axes or more")
    size = torch.cat([w.abs().flatten() for w in weights.values()])
    keep = torch.ones_like(size, dtype=torch.bool)
    keep[size.argsort(stable=True)[: math.floor(sparsity * len(size))]] = False
    parts = keep.split([w.numel() for w in weights.values()])
    return {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts)}


def random_mask(
    module: nn.Module, sparsity: float, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks with as many survivors a layer as :func:`magnitude_mask`, at random places.

    Args:
        module: any network.
        sparsity: share to prune, in [0, 1).
        generator: source of the places; it must live on the CPU.

    Returns:
        Boolean masks by name of parameter.

    Raises:
        ValueError: as in :func:`magnitude_mask`.

    Source: ours; J. Frankle, M. Carbin, arXiv:1803.03635, reinitialize instead.

    Example:
        >>> net = nn.Linear(4, 1)
        >>> random_mask(net, 0.5, generator=torch.Generator())["weight"].sum().item()
        2
    """

    def shuffled(mask: Tensor) -> Tensor:
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        return mask.flatten()[order].view_as(mask)

    return {name: shuffled(mask) for name, mask in magnitude_mask(module, sparsity).items()}
