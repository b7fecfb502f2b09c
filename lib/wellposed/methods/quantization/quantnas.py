r"""Search for operations and bits of a network, with noise in the place of quantization.

E. Shvetsov, D. Osin, A. Zaytsev, I. Koryakovskiy, V. Buchnev, I. Trofimov, E. Burnaev. QuantNAS for
super resolution: searching for efficient quantization-friendly architectures against quantization
noise. IEEE Access 2024, arXiv:2208.14839.

Claim: a differentiable search over pairs of operation and bits finds good quantized networks if
weights and activations get noise of the size of the rounding error, if the entropy of the choice is
driven to zero, and if residual blocks normalize without losing an image's contrast.

.. math:: \sum_o\Bigl(\sum_b p_{ob}\Bigr)\,\mathrm{conv}(\tilde A_o,\tilde W_o),\qquad
    \tilde W=\sum_b\bar p_b\,(W+\Delta_b\epsilon_b),\qquad
    \Delta_b=\frac{\max W-\min W}{2^b-1}

Networks are searched and trained side by side; the first axis of every parameter counts them.

Departures from the paper: each block of each cell has its own choice (in the authors' code the
cells share theirs); no factorized convolutions; the hardware loss counts the square of the bits
also during the search (the code: the first power); its normalization takes the paper's five types
of blocks whatever the space, because with fewer than four it would turn its sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from wellposed.nets.mixed import MixedConv2d
from wellposed.nets.superres import (
    Choice,
    PlainResidual,
    Skeleton,
    Space,
)
from wellposed.ops.quantize import (
    check_bits,
    lsq_initial_step,
    lsq_quantize,
    mixed_noise,
    quantization_noise,
)
from wellposed.train.optim import PerNetwork, StackedAdam
from wellposed.train.superres import Crops, absolute_error, clip_each

__all__ = [
    "AdaptiveDeviation",
    "MixedConv2d",
    "SearchNet",
    "SearchResult",
    "alpha_entropy",
    "discretize",
    "entropy_coefficient",
    "expected_bitops",
    "lsq_initial_step",
    "lsq_quantize",
    "noisy_mixture",
    "quantization_noise",
    "search",
]

COST_SPREAD = 5 / 4  # the initial cost divided and multiplied by it is 0 and 1 (authors' code)
ALPHA_BETAS = (0.5, 0.999)
CLIP = 5.0


@dataclass(frozen=True)
class SearchResult:
    """The course of a search, recorded before the first epoch and after each.

    Attributes:
        probabilities: for each block, ``(epochs + 1, networks, choices)``.
        entropy: total entropy of the choices in nats, ``(epochs + 1, networks)``.
        cost: expected BitOps per input pixel, ``(epochs + 1, networks)``.
        loss: mean absolute error on the held-out crops, averaged over each epoch,
            ``(epochs, networks)``.
    """

    probabilities: list[Tensor]
    entropy: Tensor
    cost: Tensor
    loss: Tensor


def noisy_mixture(
    x: Tensor,
    probs: Tensor,
    bits: Sequence[int],
    kind: str = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Average of noisy copies of a tensor, one for each number of bits.

    :math:`\sum_b\bar p_b\,(x+\Delta_b\epsilon_b)=x+\sum_b\bar p_b\Delta_b\epsilon_b`, with
    independent noises and :math:`\bar p=p/\sum p`. One convolution then serves all bits.

    Args:
        x: floating tensor; its gradient passes unchanged.
        probs: p >= 0, ``(len(bits),)``; no noise if all are zero; differentiable.
        bits: the numbers of bits.
        kind: ``"gaussian"`` or ``"uniform"``.
        generator: source of the noise.

    Returns:
        Tensor of the shape of ``x``.

    Raises:
        ValueError: shapes that do not match, an unknown kind, bits out of range.

    Source: Shvetsov et al. 2024, search against quantization noise.

    Example:
        >>> noisy_mixture(torch.ones(3), torch.tensor([0.2, 0.3]), [4, 8]).tolist()  # no range
        [1.0, 1.0, 1.0]
    """
    check_bits(bits)
    if probs.shape != (len(bits),):
        raise ValueError(f"probs must have shape ({len(bits)},), got {tuple(probs.shape)}")
    if x.numel() == 0:
        raise ValueError("x must not be empty")
    low, high = torch.aminmax(x.detach())
    probs = probs / probs.sum().clamp_min(torch.finfo(probs.dtype).tiny)
    return mixed_noise(x, probs, bits, high - low, kind, generator)


def alpha_entropy(logits: Iterable[Tensor]) -> Tensor:
    r"""Total entropy of the choices, :math:`-\sum_i\sum_j p_{ij}\log p_{ij}`, p the softmax.

    Args:
        logits: one tensor for each block, ``(choices,)``, or ``(networks, choices)``.

    Returns:
        Entropy in nats: a scalar, or ``(networks,)``.

    Raises:
        ValueError: no tensor.

    Source: Shvetsov et al. 2024, entropy regularization.

    Example:
        >>> round(alpha_entropy([torch.zeros(2), torch.zeros(3)]).item(), 4)  # log 2 + log 3
        1.7918
    """
    parts = []
    for row in logits:
        log_p = row.log_softmax(-1)
        parts.append(-(log_p.exp() * log_p).sum(-1))
    if not parts:
        raise ValueError("logits must hold at least one tensor")
    return torch.stack(parts).sum(0)


def entropy_coefficient(epoch: int, epochs: int, coefficient: float) -> float:
    r"""Strength of the entropy: zero for the first quarter, then rising to ``coefficient``.

    :math:`\mu_0w_1w_2`, :math:`w_1=t/(T-1)`, and :math:`w_2=\log_{T-T_w+1}(t-T_w+2)` from
    :math:`T_w=\lfloor T/4\rfloor` on, zero before.

    Args:
        epoch: t, from 0 to T - 1.
        epochs: T, at least 2.
        coefficient: :math:`\mu_0`.

    Returns:
        The strength; it equals the coefficient in the last epoch.

    Raises:
        ValueError: epoch out of range.

    Source: Shvetsov et al. 2024, schedule of the entropy.

    Example:
        >>> entropy_coefficient(4, 20, 1.0), entropy_coefficient(19, 20, 1.0)
        (0.0, 1.0)
    """
    if epochs < 2 or not 0 <= epoch < epochs:
        raise ValueError(f"epoch must be from 0 to epochs - 1, epochs >= 2; got {epoch}, {epochs}")
    warm = epochs // 4
    if epoch < warm:
        return 0.0
    rise = math.log(epoch - warm + 2) / math.log(epochs - warm + 1)
    return coefficient * epoch / (epochs - 1) * rise


def expected_bitops(logits: Tensor, macs: Tensor, bits: Sequence[int]) -> Tensor:
    r"""Expected cost of a block, :math:`\sum_{o,b}p_{ob}\,\mathrm{MAC}_o\,b^2`, p the softmax.

    Args:
        logits: ``(ops * len(bits),)``, all bits of the first operation first; or with further axes
            in front.
        macs: multiply-adds of each operation, ``(ops,)``.
        bits: the numbers of bits.

    Returns:
        Scalar, or the axes in front; differentiable in ``logits``.

    Raises:
        ValueError: numbers that do not match.

    Source: Shvetsov et al. 2024, hardware loss; the square of the bits as in its final report.

    Example:
        >>> expected_bitops(torch.zeros(2), torch.tensor([10.0]), [2, 4]).item()  # 10 (4 + 16) / 2
        100.0
    """
    check_bits(bits)
    if logits.shape[-1] != len(macs) * len(bits):
        raise ValueError(
            f"logits must have {len(macs)} x {len(bits)} entries, got {logits.shape[-1]}"
        )
    squares = logits.new_tensor([float(b) ** 2 for b in bits])
    return logits.softmax(-1) @ torch.outer(macs.to(logits), squares).flatten()


class AdaptiveDeviation(nn.Module):
    r"""Residual block with batch normalization that keeps each image's contrast (ADQ).

    :math:`F(\mathrm{BN}(x))\,(w\,\mathrm{std}(x)+c)+x`, the deviation over one image's channels
    and pixels. Batch normalization gives all images one scale, which suits a quantizer with fixed
    steps; the factor returns what it took away.

    Args:
        channels: of x.
        size: networks side by side; x is then ``(b, size, channels, h, w)``.

    Attributes:
        norm: the batch normalization.
        scale: w, starts at 1.5.
        offset: c, starts at 0.

    Raises:
        ValueError: sizes below 1, an input of another shape.

    Source: Shvetsov et al. 2024, adaptive deviation for quantization; first values from the code.

    Example:
        >>> block = AdaptiveDeviation(1).eval()  # the running deviation is 1
        >>> x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)  # its deviation is the root of 2
        >>> [round(v, 3) for v in block(x, lambda u: u).flatten().tolist()]
        [-3.121, 3.121]
    """

    def __init__(self, channels: int, size: int = 1) -> None:
        super().__init__()
        if min(channels, size) < 1:
            raise ValueError(f"channels and size must be at least 1, got {channels}, {size}")
        self.channels, self.size = channels, size
        self.norm = nn.BatchNorm2d(channels * size)
        self.scale = nn.Parameter(torch.full((size, 1, 1, 1), 1.5))
        self.offset = nn.Parameter(torch.zeros(size, 1, 1, 1))

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply the branch to the normalized ``x`` and add ``x``."""
        wide = x if x.ndim == 5 else x.unsqueeze(1)
        if wide.ndim != 5 or wide.shape[1:3] != (self.size, self.channels):
            raise ValueError(
                f"x must be (b, {self.channels}, h, w) or (b, {self.size}, {self.channels}, h, w), "
                f"got {tuple(x.shape)}"
            )
        deviation = wide.flatten(2).std(2).view(*wide.shape[:2], 1, 1, 1) * self.scale + self.offset
        normal = self.norm(wide.flatten(1, 2)).view_as(x)
        return x + branch(normal) * deviation.view(*x.shape[: x.ndim - 3], 1, 1, 1)


class SearchNet(nn.Module):
    """Networks whose every block is a mixture of operations and bits, side by side.

    Args:
        space: the convolutions and their operations.
        bits: the numbers of bits.
        generators: one for each network, for the first weights.
        surrogate: see :class:`MixedConv2d`.
        kind: of the noise.
        residual: makes the module around a cell's body from channels and number of networks.
        global_skip: add the bicubic image, and start there.

    Attributes:
        alphas: for each block, logits ``(networks, ops * len(bits))``, all bits of the first
            operation first; they start at zero.

    Raises:
        ValueError: unknown surrogate, bits out of range, no generator.

    Source: Shvetsov et al. 2024, supernet.

    Example:
        >>> net = SearchNet(Space(channels=4), [4, 8], [torch.Generator()])
        >>> len(net.alphas), net(torch.rand(2, 1, 1, 6, 6)).shape
        (3, torch.Size([2, 1, 1, 12, 12]))
    """

    def __init__(
        self,
        space: Space,
        bits: Sequence[int],
        generators: Sequence[torch.Generator],
        *,
        surrogate: str = "noise",
        kind: str = "gaussian",
        residual: Callable[[int, int], nn.Module] = PlainResidual,
        global_skip: bool = True,
    ) -> None:
        super().__init__()
        if not generators:
            raise ValueError("generators must hold at least one")
        self.space, self.bits, self.size = space, list(bits), len(generators)
        blocks = space.blocks()
        self.blocks = nn.ModuleList(
            MixedConv2d(block, bits, generators, surrogate, kind) for block in blocks
        )
        starts = [torch.zeros(self.size, len(block.ops) * len(self.bits)) for block in blocks]
        self.alphas = nn.ParameterList(map(nn.Parameter, starts))
        self.skeleton = Skeleton(space, generators, residual=residual, global_skip=global_skip)
        self.macs = [torch.tensor([float(b.macs(op)) for op in b.ops]) for b in blocks]

    def weights(self) -> list[nn.Parameter]:
        """All parameters but the logits."""
        return [*self.blocks.parameters(), *self.skeleton.parameters()]

    def probabilities(self) -> list[Tensor]:
        """Softmax of the logits, block by block."""
        return [alpha.softmax(-1) for alpha in self.alphas]

    def one_hot(self) -> list[Tensor]:
        """All probability on the largest logit."""
        return [torch.eye(a.shape[1]).to(a)[a.argmax(1)] for a in self.alphas]

    def cost(self) -> Tensor:
        """Expected BitOps per pixel of the input, ``(networks,)``."""
        rows = zip(self.alphas, self.macs)
        return torch.stack([expected_bitops(a, macs, self.bits) for a, macs in rows]).sum(0)

    def forward(
        self,
        x: Tensor,
        probs: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Map ``(b, size, colors, h, w)`` to images ``scale`` times as large.

        ``probs`` replaces the softmax of the logits; ``generator`` draws the noise.
        """
        probs = self.probabilities() if probs is None else probs
        out: Tensor = self.skeleton(x, lambda i, u: self.blocks[i](u, probs[i], generator))
        return out


def discretize(search_net: SearchNet, *, index: int = 0) -> list[Choice]:
    """The operation and bits of the largest logit, block by block.

    Args:
        search_net: after a search.
        index: which of the networks side by side.

    Returns:
        One pair a block, such as ``("3x3", 4)``.

    Raises:
        ValueError: there is no such network.

    Source: Shvetsov et al. 2024; the authors' code errs where all logits of a block are negative.

    Example:
        >>> net = SearchNet(Space(cells=1), [4, 8], [torch.Generator()])
        >>> net.alphas[0].data[0, 3] = 1.0  # 1x1 at 4 and 8 bits, 3x3 at 4 and 8 bits ...
        >>> discretize(net)
        [('3x3', 8)]
    """
    size = min(len(alpha) for alpha in search_net.alphas)
    if not 0 <= index < size:
        raise ValueError(f"index must be from 0 to {size - 1}, got {index}")
    found = []
    for block, alpha in zip(search_net.space.blocks(), search_net.alphas):
        op, bit = divmod(int(alpha[index].argmax()), len(search_net.bits))
        found.append((block.ops[op], search_net.bits[bit]))
    return found


def _alpha_step(
    net: SearchNet,
    pair: tuple[Tensor, Tensor],
    adam: StackedAdam,
    strength: Tensor,
    penalty: Tensor,
    middle: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """One step of the logits; returns the mean absolute error of each network."""
    x, y = pair
    error = absolute_error(net(x, generator=generator), y)
    least, most = middle / COST_SPREAD, middle * COST_SPREAD
    cost = penalty * (net.cost() - least) / (most - least)
    (error + strength * alpha_entropy(net.alphas) + cost).sum().backward()
    adam.step()
    return error.detach()


def search(
    net: SearchNet,
    train: Crops,
    held_out: Crops,
    *,
    epochs: int = 20,
    steps: int,
    lr: float = 1e-3,
    alpha_lr: float = 3e-4,
    entropy: PerNetwork = 1e-3,
    penalty: PerNetwork = 0.0,
    generator: torch.Generator | None = None,
) -> SearchResult:
    r"""Search in turns: a step of the logits on held-out crops, one of the weights on others.

    The logits descend :math:`L_1+\mu(t)H+\eta\,(c-c_{min})/(c_{max}-c_{min})`, the weights
    :math:`L_1`, with a cosine schedule and clipped gradients.

    Args:
        net: the networks; changed in place.
        train: crops for the weights.
        held_out: crops for the logits.
        epochs: at least 2; the entropy's strength changes between them.
        steps: in all, divided evenly over the epochs.
        lr: Adam's learning rate for the weights.
        alpha_lr: and for the logits.
        entropy: :math:`\mu_0`, one or one for each network.
        penalty: :math:`\eta`, one or one for each network.
        generator: source of the noise, on the device of the network.

    Returns:
        The course of the search; see :class:`SearchResult`.

    Raises:
        ValueError: fewer steps than epochs, or numbers that do not match the networks.

    Source: Shvetsov et al. 2024, search procedure; values of the authors' configuration.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> crops = Crops(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 16, 16), [g], [0], crop=6)
        >>> net = SearchNet(Space(cells=1), [4, 8], [g])
        >>> found = search(net, crops, crops, epochs=2, steps=4, generator=g)
        >>> [tuple(p.shape) for p in found.probabilities]
        [(3, 1, 6)]
        >>> round(float(found.entropy[0]), 3)  # log 6
        1.792
    """
    if epochs < 2 or steps < epochs:
        raise ValueError(f"steps must be at least epochs >= 2, got {steps} and {epochs}")
    like = net.alphas[0]
    each = [
        _per_network(n, v, net.size, like) for n, v in (("entropy", entropy), ("penalty", penalty))
    ]
    weights = net.weights()
    adam, alpha_adam = (
        StackedAdam(weights, lr=lr),
        StackedAdam(net.alphas, lr=alpha_lr, betas=ALPHA_BETAS),
    )
    middle = net.cost().detach()
    course: list[list[Tensor]] = [[p.detach() for p in net.probabilities()]]
    entropies, costs, losses = [alpha_entropy(net.alphas).detach()], [middle], []
    net.train()
    ends = [steps * epoch // epochs for epoch in range(epochs + 1)]
    pairs = zip(held_out.stream(steps), train.stream(steps))
    for epoch in range(epochs):
        rate = 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
        strength = each[0] * entropy_coefficient(epoch, epochs, 1.0)
        seen = []
        for held_pair, (x, y) in islice(pairs, ends[epoch + 1] - ends[epoch]):
            for p in weights:
                p.requires_grad_(False)
            seen.append(
                _alpha_step(net, held_pair, alpha_adam, strength, each[1], middle, generator)
            )
            for p in weights:
                p.requires_grad_(True)
            still = [p.detach() for p in net.probabilities()]
            absolute_error(net(x, still, generator), y).sum().backward()
            clip_each(weights, CLIP)
            adam.step(rate)
        course.append([p.detach() for p in net.probabilities()])
        entropies.append(alpha_entropy(net.alphas).detach())
        costs.append(net.cost().detach())
        losses.append(torch.stack(seen).mean(0))
    net.eval()
    return SearchResult(
        [torch.stack(block) for block in zip(*course)],
        torch.stack(entropies),
        torch.stack(costs),
        torch.stack(losses),
    )


def _per_network(name: str, value: PerNetwork, size: int, like: Tensor) -> Tensor:
    values = [value] * size if isinstance(value, int | float) else list(value)
    if len(values) != size or not all(0.0 <= v < math.inf for v in values):
        raise ValueError(
            f"{name} must be >= 0, one or one for each of {size} networks; got {value}"
        )
    return like.new_tensor(values)
