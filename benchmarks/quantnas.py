"""A step of the architecture search in three ways, and the learned quantizer beside torch's.

A step is one mixed block, forward and backward: with noise in the place of quantization, with real
quantizers on shared weights, or with one convolution for each number of bits. Torch's quantizer has
the same values and gradients, but for entries just beyond the outer levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contest import OURS, Contender, contest
from wellposed.methods.quantization.quantnas import MixedConv2d, lsq_quantize
from wellposed.nets.superres import Block

OPS, BITS = ("1x1", "3x3", "5x5"), [4, 8]


@contest(OURS, "shared quantizers", "one convolution per bit", goal=0.0, paper=True)
def test_search_step(small: bool) -> dict[str, Contender]:
    """A mixed block of 36 channels on 24 x 24 pixels (ours: noise)."""
    channels, side = (4, 6) if small else (36, 24)
    torch.manual_seed(0)
    block = Block(channels, channels, OPS)
    x = torch.randn(4, 1, channels, side, side)

    def step(mode: str, groups: list[list[int]]) -> Callable[[], Tensor]:
        nets = [MixedConv2d(block, bits, [torch.Generator()], mode) for bits in groups]

        def call() -> Tensor:
            share = 1.0 / (len(OPS) * len(BITS))
            parts = [net(x, torch.full((1, len(OPS) * len(net.bits)), share)) for net in nets]
            loss = torch.stack(parts).sum(0).square().mean()
            loss.backward()
            return loss.detach()

        return call

    def error(loss: Tensor) -> float:
        return 0.0 if loss.isfinite() else torch.inf  # three different losses: no common answer

    return {
        OURS: Contender(step("noise", [BITS]), error),
        "shared quantizers": Contender(step("direct", [BITS]), error),
        "one convolution per bit": Contender(step("direct", [[b] for b in BITS]), error),
    }


@contest(OURS, "torch", goal=1e-6)
def test_quantizer(small: bool) -> dict[str, Contender]:
    """Quantizing 64 x 576 weights to 4 bits, a learned step for each row, with gradients."""
    rows = 4 if small else 64
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 9 * rows, generator=g, requires_grad=True)
    step = torch.full((rows,), 0.1, requires_grad=True)
    zero, factor = torch.zeros(rows), (7 * x.numel()) ** -0.5

    def both(quantize: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            value = quantize()
            value.sum().backward()
            return value.detach()

        return call

    fake = torch._fake_quantize_learnable_per_channel_affine
    truth = fake(x, step, zero, 0, -8, 7, factor).detach()

    def error(value: Tensor) -> float:
        return float((value - truth).abs().max())

    return {
        OURS: Contender(both(lambda: lsq_quantize(x, step.unsqueeze(1), 4)), error),
        "torch": Contender(both(lambda: fake(x, step, zero, 0, -8, 7, factor)), error),
    }
