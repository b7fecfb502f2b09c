"""Masks over the channels of convolutions: what they cost, and controls to compare them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "Layer",
    "MaskStatistics",
    "check_lists",
    "conv_macs",
    "flops_reduction",
    "mask_statistics",
    "match_widths",
    "shuffle_masks",
]

Layer = tuple[int, int, int, int, int]
"""A convolution: channels in, channels out, kernel size, height and width of the output."""


@dataclass(frozen=True)
class MaskStatistics:
    """How good and how dynamic masks are; scalar tensors in [0, 1].

    Attributes:
        accuracy: share of mask entries that equal the target.
        majority: the same for a mask that is, for each filter, the target's more frequent value.
        dynamic_share: share of filters that are active on 2 to 98 % of the inputs.
    """

    accuracy: Tensor
    majority: Tensor
    dynamic_share: Tensor


def check_lists(a: str, b: str, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Raise ValueError unless two lists of tensors have the same shapes; ``a``, ``b`` name them."""
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (first, second)]
    if not shapes[0] or shapes[0] != shapes[1]:
        raise ValueError(f"{a} and {b} must be lists of equal shapes, got {shapes[0]}, {shapes[1]}")


def conv_macs(masks: Sequence[Tensor], layers: Sequence[Layer]) -> Tensor:
    r"""Multiply-adds of each sample: :math:`\sum_l h_l w_l k_l^2\, a_{l-1} a_l`.

    Here :math:`a_l` counts what the mask of layer :math:`l` keeps; :math:`a_0` are all channels of
    the input. Both sides of a layer count.

    Args:
        masks: zeros and ones ``(n, c_l)``, one for each layer.
        layers: ``(in_channels, out_channels, kernel_size, out_height, out_width)`` of each.

    Returns:
        Counts ``(n,)``, in the dtype of the masks.

    Raises:
        ValueError: lists or widths that do not match.

    Source: Elkerdawy et al. 2022, the authors' code (convolutions only).

    Example:
        >>> layers = [(1, 2, 3, 4, 4), (2, 2, 1, 4, 4)]
        >>> conv_macs([torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)], layers).item()
        176.0
    """
    widths = [layer[1] for layer in layers]
    fits = bool(layers) and all(m.ndim == 2 for m in masks) and len({len(m) for m in masks}) == 1
    if not fits or [m.shape[1] for m in masks] != widths:
        raise ValueError(
            f"masks must be one (n, c) tensor a layer, n the same, with c = {widths}, got "
            f"{[tuple(m.shape) for m in masks]}"
        )
    active = [masks[0].new_full((len(masks[0]),), layers[0][0]), *[m.sum(1) for m in masks]]
    costs = [k * k * height * width for _, _, k, height, width in layers]
    return torch.stack([c * a * b for c, (a, b) in zip(costs, pairwise(active))]).sum(0)


def flops_reduction(masks: Sequence[Tensor], layers: Sequence[Layer]) -> Tensor:
    """One minus the ratio of a sample's multiply-adds to those of the dense network.

    Args:
        masks: zeros and ones ``(n, c_l)``, one for each layer.
        layers: as in :func:`conv_macs`.

    Returns:
        Shares ``(n,)`` in [0, 1].

    Raises:
        ValueError: lists or widths that do not match.

    Source: Elkerdawy et al. 2022, the authors' code.

    Example:
        >>> flops_reduction([torch.tensor([[1.0, 0.0]])], [(1, 2, 3, 4, 4)]).item()
        0.5
    """
    dense = sum(i * o * k * k * height * width for i, o, k, height, width in layers)
    return 1.0 - conv_macs(masks, layers) / dense


def mask_statistics(masks: Sequence[Tensor], targets: Sequence[Tensor]) -> MaskStatistics:
    """Compare masks with their targets, and with the best masks that ignore the input.

    Args:
        masks: zeros and ones ``(n, c_l)``, one for each layer.
        targets: the same shapes.

    Returns:
        The three shares, over all filters of all layers.

    Raises:
        ValueError: no layer, no sample, or shapes that differ.

    Source: ours.

    Example:
        >>> g = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        >>> s = mask_statistics([g], [g])
        >>> s.accuracy.item(), s.majority.item(), s.dynamic_share.item()
        (1.0, 0.75, 0.5)
    """
    check_lists("masks", "targets", masks, targets)
    if any(m.ndim != 2 or len(m) == 0 for m in masks):
        raise ValueError(f"masks must be (n, c), n >= 1, got {[tuple(m.shape) for m in masks]}")
    mask, target = torch.cat(list(masks), 1), torch.cat(list(targets), 1)
    rate, often = mask.mean(0), target.mean(0)
    return MaskStatistics(
        (mask == target).to(mask.dtype).mean(),
        torch.maximum(often, 1.0 - often).mean(),
        ((rate >= 0.02) & (rate <= 0.98)).to(mask.dtype).mean(),
    )


def shuffle_masks(masks: Sequence[Tensor], *, generator: torch.Generator) -> list[Tensor]:
    """Random masks that keep as many channels of each sample and layer: a control.

    Args:
        masks: zeros and ones ``(n, c_l)``.
        generator: source of the permutations.

    Returns:
        Masks of the same shapes and row sums.

    Raises:
        ValueError: a mask that has not two axes.

    Source: ours.

    Example:
        >>> m = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> shuffle_masks([m], generator=torch.Generator())[0].sum(1).tolist()
        [2.0, 1.0]
    """
    if any(m.ndim != 2 for m in masks):
        raise ValueError(f"masks must have shape (n, c), got {[tuple(m.shape) for m in masks]}")
    noise = [torch.rand(m.shape, generator=generator, device=generator.device) for m in masks]
    return [m.gather(1, u.argsort(1).to(m.device)) for m, u in zip(masks, noise)]


def match_widths(masks: Sequence[Tensor], layers: Sequence[Layer]) -> list[int]:
    """Widths of a static network that costs at least what the masks cost on average.

    Start from the mean number of channels that each layer keeps. Then add or remove single
    channels where the rounding is worst, until no removal is possible without falling short.

    Args:
        masks: zeros and ones ``(n, c_l)``, one for each layer.
        layers: as in :func:`conv_macs`.

    Returns:
        One width in [1, c_l] a layer.

    Raises:
        ValueError: lists or widths that do not match, no sample.

    Source: ours, for the static baseline.

    Example:
        >>> masks = [torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])]
        >>> match_widths(masks, [(1, 3, 3, 4, 4)])
        [2]
    """
    if any(len(m) == 0 for m in masks):
        raise ValueError("masks must hold at least one sample")
    goal = float(conv_macs(masks, layers).mean())
    mean = [float(m.sum(1).mean()) for m in masks]
    full = [layer[1] for layer in layers]
    widths = [min(max(round(k), 1), c) for k, c in zip(mean, full)]

    def cost(sizes: Sequence[int]) -> int:
        pairs = pairwise([layers[0][0], *sizes])
        return sum(a * b * k * k * h * w for (a, b), (_, _, k, h, w) in zip(pairs, layers))

    def bump(step: int) -> list[list[int]]:
        order = sorted(range(len(full)), key=lambda j: step * (widths[j] - mean[j]))
        near = [[w + step * (i == j) for i, w in enumerate(widths)] for j in order]
        return [s for s in near if all(1 <= w <= c for w, c in zip(s, full))]

    while cost(widths) < goal and (wider := bump(1)):
        widths = wider[0]
    while thinner := [s for s in bump(-1) if cost(s) >= goal]:
        widths = thinner[0]
    return widths
