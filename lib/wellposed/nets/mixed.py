"""A convolution that is a mixture of operations and of numbers of bits, for a search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wellposed.nets.superres import (
    INPUT_AXES,
    WEIGHT_AXES,
    Block,
    convolve,
    kernel_start,
    parse_op,
)
from wellposed.ops.quantize import (
    check_bits,
    hwgq_quantize,
    hwgq_step,
    lsq_initial_step,
    lsq_quantize,
    mixed_noise,
)

__all__ = ["SURROGATES", "MixedConv2d"]

SURROGATES = ("noise", "official", "direct")


class MixedConv2d(nn.Module):
    r"""ReLU and the weighted sum of all operations, at a mixture of all bits.

    Three stand-ins for quantization. ``"noise"`` adds a mixture of noises to weights and inputs
    (:func:`wellposed.ops.quantize.mixed_noise`). ``"official"`` is what the authors' code does: a
    share :math:`f=1/(|B|+1)` of the tensor itself plus detached noisy copies with shares
    :math:`p_b/(\sum_bp_b+f)`; these shares do not add up to one, and weights learn through the
    first part alone. ``"direct"`` mixes true quantizers, LSQ on weights and HWGQ on inputs.

    Args:
        block: channels and operations.
        bits: the numbers of bits.
        generators: one for each network, for the first weights.
        surrogate: ``"noise"``, ``"official"`` or ``"direct"``.
        kind: of the noise.

    Raises:
        ValueError: an unknown surrogate, bits out of range, inputs of another shape.

    Source: Shvetsov et al. 2024, search space and quantization noise; the authors' code.

    Example:
        >>> conv = MixedConv2d(Block(2, 3, ("1x1", "3x3")), [4, 8], [torch.Generator()])
        >>> conv(torch.rand(5, 1, 2, 6, 6), torch.full((1, 4), 0.25)).shape
        torch.Size([5, 1, 3, 6, 6])
    """

    def __init__(
        self,
        block: Block,
        bits: Sequence[int],
        generators: Sequence[torch.Generator],
        surrogate: str = "noise",
        kind: str = "gaussian",
    ) -> None:
        super().__init__()
        check_bits(bits)
        if surrogate not in SURROGATES:
            raise ValueError(f"surrogate must be one of {SURROGATES}, got {surrogate!r}")
        self.block, self.bits, self.surrogate, self.kind = block, list(bits), surrogate, kind
        self.size = len(generators)
        self.weights, self.steps = nn.ParameterList(), nn.ParameterList()
        for kernel, groups in map(parse_op, block.ops):
            shape = (block.outputs, block.inputs // groups, kernel, kernel)
            weight = torch.stack([kernel_start(shape, g) for g in generators])
            self.weights.append(nn.Parameter(weight))
            if surrogate == "direct":
                for b in self.bits:
                    hwgq_step(b)
                rows = [
                    [lsq_initial_step(w, b, per_channel=True) for b in self.bits] for w in weight
                ]
                self.steps.append(nn.Parameter(torch.stack([torch.stack(r) for r in rows])))
        self.register_buffer("depth", torch.tensor(self.bits).view(-1, 1, 1, 1, 1))

    def forward(self, x: Tensor, probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map ``(b, size, in, h, w)`` and probabilities ``(size, choices)`` to outputs."""
        choices = len(self.block.ops) * len(self.bits)
        if probs.shape != (self.size, choices):
            raise ValueError(f"probs must be ({self.size}, {choices}), got {tuple(probs.shape)}")
        if x.ndim != 5 or 0 in x.shape:
            raise ValueError(f"x must be (b, size, in, h, w), not empty, got {tuple(x.shape)}")
        x = x.relu()
        per_op = probs.view(self.size, len(self.block.ops), len(self.bits))
        direct, official = self.surrogate == "direct", self.surrogate == "official"
        ready = [hwgq_quantize(x, b) for b in self.bits] if direct else []
        width = x.new_zeros(()) if direct else _width(x, INPUT_AXES)
        total: Tensor | None = None
        for o, weight in enumerate(self.weights):
            p = per_op[:, o]
            share = p.sum(1)
            free = 1.0 / (len(self.bits) + 1) if official else torch.finfo(p.dtype).tiny
            shares = p / (share + free).unsqueeze(1)
            if direct:
                a, w = self._quantized(o, ready, weight, shares)
            else:
                a, w = x, weight
                if official:
                    rest = shares.sum(1).view(-1, 1, 1, 1)
                    a = free * x + rest * x.detach()
                    w = free * weight + rest.unsqueeze(1) * weight.detach()
                args = (self.kind, generator)
                a = mixed_noise(a, _tail(shares, 3), self.bits, width, *args)
                reach = _width(weight, WEIGHT_AXES)
                w = mixed_noise(w, _tail(shares, 4), self.bits, reach, *args)
            # the share of the operation goes to the weights, which are fewer than the outputs
            term = _grouped(a, w * share.view(-1, 1, 1, 1, 1), self.block)
            total = term if total is None else total + term
        assert total is not None
        return total

    def _quantized(
        self, o: int, ready: list[Tensor], weight: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        copies = weight.unsqueeze(1).expand(-1, len(self.bits), -1, -1, -1, -1)
        depth, numel = self.get_buffer("depth"), weight[0].numel()
        copies = lsq_quantize(copies, self.steps[o], depth, numel=numel)
        w = (copies * shares.view(*shares.shape, 1, 1, 1, 1)).sum(1)
        a = torch.zeros_like(ready[0])
        for share, quantized in zip(shares.unbind(1), ready):
            a = torch.addcmul(a, quantized, share.view(-1, 1, 1, 1))
        return a, w


def _tail(shares: Tensor, axes: int) -> Tensor:
    """``(size, bits)`` to ``(size, 1, ..., 1, bits)``."""
    return shares.view(len(shares), *[1] * axes, -1)


@torch.no_grad()
def _width(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Largest minus smallest entry of each network."""
    if axes == INPUT_AXES:  # one pass over memory in order, then a small one
        low, high = x.flatten(2).aminmax(dim=2)
        return (high.amax(0) - low.amin(0)).view(-1, 1, 1, 1)
    low, high = x.flatten(1).aminmax(dim=1)
    return (high - low).view(-1, 1, 1, 1, 1)


def _grouped(x: Tensor, weight: Tensor, block: Block) -> Tensor:
    """Convolve; an operation with groups counts them as networks of fewer channels."""
    groups = block.inputs // weight.shape[2]
    if groups == 1:
        return convolve(x, weight)
    b, size, _, h, w = x.shape
    parts = x.reshape(b, size * groups, -1, h, w)
    kernels = weight.reshape(size * groups, -1, *weight.shape[2:])
    return convolve(parts, kernels).reshape(b, size, -1, h, w)
