"""Training and testing of super-resolution networks side by side.

Networks map ``(b, size, colors, h, w)`` to images ``scale`` times as large; the second axis counts
networks, as in :mod:`wellposed.nets.superres`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wellposed.ops.super_resolution import psnr, random_pairs
from wellposed.train.optim import PerNetwork, StackedAdam


@dataclass(frozen=True)
class Crops:
    """Where a stack of networks gets its crops.

    Networks with the same source see the same crops: arms of a comparison share a seed.

    Attributes:
        small: small images ``(n, c, h, w)``.
        large: their large ones.
        generators: one for each source.
        source: for each network, which generator draws its crops.
        crop: side of the small crops.
        batch_size: crops a step.
    """

    small: Tensor
    large: Tensor
    generators: Sequence[torch.Generator]
    source: Sequence[int]
    crop: int = 12
    batch_size: int = 8

    def stream(self, steps: int, chunk: int = 50) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield small and large crops ``(b, size, c, h, w)``, drawn for ``chunk`` steps at a time.

        Example:
            >>> g = [torch.Generator().manual_seed(s) for s in range(2)]
            >>> images = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 16, 16)
            >>> x, y = next(Crops(*images, g, [0, 1, 0], crop=4, batch_size=5).stream(3))
            >>> x.shape, bool((x[:, 0] == x[:, 2]).all()), bool((x[:, 0] == x[:, 1]).all())
            (torch.Size([5, 3, 1, 4, 4]), True, False)
        """
        which = torch.tensor(list(self.source), device=self.small.device)
        for start in range(0, steps, chunk):
            count = min(chunk, steps - start) * self.batch_size
            draws = [
                random_pairs(self.small, self.large, generator=g, crop=self.crop, count=count)
                for g in self.generators
            ]
            small, large = (torch.stack(part, 1).split(self.batch_size) for part in zip(*draws))
            for x, y in zip(small, large):
                yield x[:, which], y[:, which]


def absolute_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of each network, ``(size,)``."""
    return (output - target).abs().mean((0, 2, 3, 4))


def clip_each(params: Iterable[Tensor], max_norm: PerNetwork) -> None:
    """Scale each network's gradient down to a norm of at most ``max_norm``.

    Args:
        params: parameters whose first axis counts networks, or one with all networks' channels
            there, one after the other; those without a gradient are left out.
        max_norm: positive, one number or one for each network; infinity clips nothing.

    Raises:
        ValueError: ``max_norm`` is not positive.

    Example:
        >>> w = torch.zeros(2, 2, requires_grad=True)
        >>> w.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> clip_each([w], 1.0); [[round(v, 3) for v in row] for row in w.grad.tolist()]
        [[0.6, 0.8], [0.3, 0.4]]
    """
    bounds = [max_norm] if isinstance(max_norm, int | float) else list(max_norm)
    if not all(bound > 0 for bound in bounds):
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    grads = [p.grad for p in params if p.grad is not None]
    size = min((len(g) for g in grads), default=1)
    if len(bounds) not in (1, size):
        raise ValueError(f"max_norm must be one number, or one for each of {size} networks")
    rows = [g.view(size, -1) for g in grads]
    total = torch.stack([row.square().sum(1) for row in rows]).sum(0).sqrt()
    factor = (total.new_tensor(bounds) / (total + 1e-6)).clamp_max(1.0).unsqueeze(1)
    for row in rows:
        row.mul_(factor)


def _adams(params: list[nn.Parameter], lr: PerNetwork, size: int) -> list[StackedAdam]:
    """One optimizer for each length of the first axis, which may count channels of networks."""
    if isinstance(lr, int | float):
        return [StackedAdam(params, lr=lr)]
    if len(lr) != size:
        raise ValueError(f"lr must be one number, or one for each of {size} networks")
    found = []
    for length in sorted({len(p) for p in params}):
        rates = [rate for rate in lr for _ in range(length // size)]
        found.append(StackedAdam([p for p in params if len(p) == length], lr=rates))
    return found


def fit_crops(
    net: nn.Module,
    crops: Crops,
    *,
    steps: int,
    lr: PerNetwork = 1e-3,
    clip: PerNetwork = math.inf,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Train networks on the mean absolute error, with Adam and a cosine schedule.

    Args:
        net: networks side by side; trained in place and left in evaluation mode.
        crops: the training data.
        steps: at least 1.
        lr: learning rate, or one for each network.
        clip: largest norm of a network's gradient, or one for each network.
        precision: reduced precision for the forward pass (autocast), none by default.

    Returns:
        Error of each network at each step, ``(steps, size)``.

    Raises:
        ValueError: fewer than one step, or rates that do not match the networks.

    Example:
        >>> from wellposed.nets.superres import QuantNet, Space
        >>> g = torch.Generator().manual_seed(0)
        >>> net = QuantNet(Space(cells=1), [[("3x3", 8)]], [g])
        >>> images = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 16, 16)
        >>> fit_crops(net, Crops(*images, [g], [0], crop=6), steps=2).shape
        torch.Size([2, 1])
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    params = list(net.parameters())
    adams = _adams(params, lr, len(crops.source))
    net.train()
    losses = []
    for step, (x, y) in enumerate(crops.stream(steps)):
        with torch.autocast(x.device.type, dtype=precision, enabled=precision is not None):
            loss = absolute_error(net(x), y)
        loss.sum().backward()
        if clip != math.inf:
            clip_each(params, clip)
        for adam in adams:
            adam.step(0.5 * (1.0 + math.cos(math.pi * step / steps)))
        losses.append(loss.detach())
    net.eval()
    return torch.stack(losses)


@torch.no_grad()
def refresh_statistics(
    net: nn.Module, forward: Callable[[Tensor], Tensor], crops: Crops, *, batches: int = 20
) -> None:
    """Let batch normalizations see what they will normalize, such as after a change of the network.

    Args:
        net: its running statistics are renewed; it is left in evaluation mode.
        forward: runs the network as it will be used.
        crops: training data.
        batches: how many; their statistics count equally.

    Raises:
        ValueError: fewer than one batch.

    Example:
        >>> from wellposed.nets.superres import BatchNormResidual
        >>> g, block = torch.Generator().manual_seed(0), BatchNormResidual(1)
        >>> crops = Crops(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 16, 16), [g], [0], crop=4)
        >>> refresh_statistics(block, lambda x: block(x, lambda u: u), crops)
        >>> float(block.norm.running_mean)
        1.0
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    rates = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an even average
    net.train()
    for x, _ in crops.stream(batches):
        forward(x)
    for norm, rate in zip(norms, rates):
        norm.momentum = rate
    net.eval()


@torch.no_grad()
def mean_psnr(
    forward: Callable[[Tensor], Tensor],
    small: Tensor,
    large: Tensor,
    labels: Tensor,
    *,
    size: int = 1,
    batch_size: int = 16,
    shave: int = 2,
) -> Tensor:
    """PSNR of each photograph, averaged over photographs.

    Args:
        forward: maps ``(b, size, c, h, w)`` to enlarged images.
        small: small images ``(n, c, h, w)``.
        large: their large ones.
        labels: int64 ``(n,)``, which photograph each is from; the squared errors of a photograph's
            images are averaged before the logarithm.
        size: number of networks.
        batch_size: images at a time.
        shave: pixels left out at each border.

    Returns:
        Decibels, ``(size,)``.

    Example:
        >>> from wellposed.ops.super_resolution import enlarge
        >>> flat = torch.full((2, 1, 8, 8), 0.5), torch.full((2, 1, 16, 16), 0.6)
        >>> bicubic = lambda x: enlarge(x[:, 0], 2).unsqueeze(1)
        >>> [round(v, 3) for v in mean_psnr(bicubic, *flat, torch.tensor([0, 1])).tolist()]
        [20.0]
    """
    errors = []
    inside = slice(shave, -shave if shave else None)
    for a, b in zip(small.split(batch_size), large.split(batch_size)):
        out = forward(a.unsqueeze(1).expand(-1, size, -1, -1, -1)).clamp(0.0, 1.0)
        wrong = (out - b.unsqueeze(1)).square()[..., inside, inside]
        errors.append(wrong.mean((2, 3, 4)))
    error = torch.cat(errors)
    kinds = labels.unique().tolist()
    each = torch.stack([error[labels == kind].mean(0) for kind in kinds])
    return psnr(each).mean(0)
