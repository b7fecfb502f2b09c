"""Small super-resolution networks side by side, each with kernels and bits of its own.

Inputs are ``(b, size, colors, h, w)``: every network has images of its own. Inside, the networks'
channels stand one after the other, and a grouped convolution serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.ops.quantize import hwgq_quantize, hwgq_step, lsq_initial_step, lsq_quantize
from wellposed.ops.super_resolution import enlarge

__all__ = [
    "FULL_PRECISION",
    "INPUT_AXES",
    "WEIGHT_AXES",
    "BatchNormResidual",
    "Block",
    "Choice",
    "Perturb",
    "PlainResidual",
    "QuantConv2d",
    "QuantNet",
    "Skeleton",
    "Space",
    "convolve",
    "kernel_start",
    "parse_op",
    "random_architecture",
]

FULL_PRECISION = 32
"""Bits that stand for: do not quantize."""

Choice = tuple[str, int]
"""An operation, such as ``"3x3"`` or ``"3x3/4"`` (four groups), and its bits."""

Perturb = Callable[[Tensor, tuple[int, ...]], Tensor]
"""Changes a tensor; the axes are those over which one network's entries lie."""

WEIGHT_AXES, INPUT_AXES = (1, 2, 3, 4), (0, 2, 3, 4)


def parse_op(op: str) -> tuple[int, int]:
    """Kernel size and groups of an operation.

    Raises:
        ValueError: not of the form ``"3x3"`` or ``"3x3/4"``, or an even kernel.

    Example:
        >>> parse_op("5x5/3")
        (5, 3)
    """
    kernel, _, groups = str(op).partition("/")
    sides = kernel.split("x")
    if len(sides) != 2 or sides[0] != sides[1] or not (sides[0] + (groups or "1")).isdigit():
        raise ValueError(f"op must look like '3x3' or '3x3/4', got {op!r}")
    k, g = int(sides[0]), int(groups or 1)
    if k % 2 == 0 or g < 1:
        raise ValueError(f"op must have an odd kernel and at least one group, got {op!r}")
    return k, g


@dataclass(frozen=True)
class Block:
    """One convolution: its channels, the operations to choose from, its pixels per input pixel."""

    inputs: int
    outputs: int
    ops: tuple[str, ...]
    area: int = 1

    def __post_init__(self) -> None:
        for op in self.ops:
            groups = parse_op(op)[1]
            if self.inputs % groups or self.outputs % groups:
                raise ValueError(f"ops: {op} does not divide {self.inputs}, {self.outputs}")

    def macs(self, op: str, pixels: int = 1) -> int:
        """Multiply-adds of an operation for an input image of so many pixels."""
        kernel, groups = parse_op(op)
        return pixels * self.area * self.inputs * self.outputs * kernel**2 // groups


@dataclass(frozen=True)
class Space:
    """Which convolutions a network has, and which operations each may be.

    ``head`` and ``tail`` hold one tuple of operations for each convolution before and after the
    cells; ``body`` those of one cell, and ``skip`` the operations of a convolution beside it.
    Where ``head`` or ``upsample`` is empty, a plain 3 x 3 convolution stands in its place that
    takes no part in search or quantization.
    """

    colors: int = 1
    channels: int = 8
    scale: int = 2
    cells: int = 3
    body: tuple[tuple[str, ...], ...] = (("1x1", "3x3", "5x5"),)
    skip: tuple[str, ...] = ()
    head: tuple[tuple[str, ...], ...] = ()
    upsample: tuple[str, ...] = ()
    tail: tuple[tuple[str, ...], ...] = ()

    def blocks(self) -> list[Block]:
        """All convolutions that are searched or quantized, in the order in which they run."""
        wide, fine = self.channels, self.scale**2
        first = [self.colors] + [wide] * len(self.head)
        found = [Block(first[i], wide, ops) for i, ops in enumerate(self.head)]
        for _ in range(self.cells):
            found += [Block(wide, wide, ops) for ops in self.body]
            found += [Block(wide, wide, self.skip)] if self.skip else []
        if self.upsample:
            found.append(Block(wide, self.colors * fine, self.upsample))
        return found + [Block(self.colors, self.colors, ops, fine) for ops in self.tail]

    def bitops(self, choices: Sequence[Choice], pixels: int) -> int:
        """Multiply-adds times the square of the bits, for an input of so many pixels.

        Example:
            >>> Space(channels=8, cells=1).bitops([("3x3", 4)], pixels=1)  # 8 * 8 * 9 * 16
            9216
        """
        blocks = self.blocks()
        if len(choices) != len(blocks):
            raise ValueError(f"choices must be {len(blocks)}, one a block, got {len(choices)}")
        return sum(b.macs(op, pixels) * bits**2 for b, (op, bits) in zip(blocks, choices))


def random_architecture(
    space: Space,
    bits: Sequence[int],
    generator: torch.Generator,
    *,
    budget: float = float("inf"),
    draws: int = 64,
) -> list[Choice]:
    """Operations and bits drawn at random, the strong baseline of every architecture search.

    Args:
        space: blocks and operations.
        bits: the numbers of bits.
        generator: on the CPU.
        budget: BitOps per input pixel; without one the first draw counts.
        draws: with a budget, of so many draws the most expensive one within it.

    Raises:
        ValueError: no draw within the budget.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> space = Space(cells=1)
        >>> space.bitops(random_architecture(space, [4, 8], g, budget=2000), 1) <= 2000
        True
    """
    blocks, best = space.blocks(), None
    for _ in range(draws):
        drawn = []
        for block in blocks:
            op, b = (
                int(torch.randint(n, (), generator=generator)) for n in (len(block.ops), len(bits))
            )
            drawn.append((block.ops[op], bits[b]))
        if budget == float("inf"):
            return drawn
        if space.bitops(drawn, 1) <= budget and (
            best is None or space.bitops(drawn, 1) > space.bitops(best, 1)
        ):
            best = drawn
    if best is None:
        raise ValueError(f"budget {budget} is below that of all {draws} draws")
    return best


def kernel_start(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Weights ``(out, in, k, k)``, uniform with the bound that ``nn.Conv2d`` uses."""
    bound = (shape[1] * shape[2] * shape[3]) ** -0.5
    return torch.rand(tuple(shape), generator=generator).mul_(2.0 * bound).sub_(bound)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve ``(b, size, in, h, w)`` with ``(size, out, in, k, k)``, network by network.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 5 or weight.ndim != 5 or x.shape[1:3] != weight.shape[::2][:2]:
        raise ValueError(
            "x must be (b, size, in, h, w) and weight (size, out, in, k, k), got "
            f"{tuple(x.shape)}, {tuple(weight.shape)}"
        )
    b, size, _, h, w = x.shape
    if weight.shape[-1] == 1:  # a grouped convolution is slow here, a matrix product is not
        return (weight[..., 0, 0] @ x.flatten(3)).view(b, size, weight.shape[1], h, w)
    out = F.conv2d(x.flatten(1, 2), weight.flatten(0, 1), padding="same", groups=size)
    return out.view(b, size, weight.shape[1], h, w)


class PlainResidual(nn.Module):
    """A residual block without normalization, ``F(x) + x``."""

    def __init__(self, channels: int, size: int = 1) -> None:
        super().__init__()

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Add the branch."""
        return x + branch(x)


class BatchNormResidual(nn.Module):
    """A residual block with batch normalization in front, ``F(BN(x)) + x``."""

    def __init__(self, channels: int, size: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels * size)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Normalize ``(b, size, channels, h, w)``, apply the branch and add ``x``."""
        return x + branch(self.norm(x.flatten(1, 2)).view_as(x))


class Skeleton(nn.Module):
    """What all networks of a space share: order of the blocks, residual connections, upsampling.

    Args:
        space: the convolutions.
        generators: one for each network, for the first weights.
        residual: makes the module around a cell's body from channels and number of networks.
        global_skip: add the bicubic enlargement to the output and start the convolution before the
            enlargement at zero, unless it is searched: training then starts at the bicubic image.

    Raises:
        ValueError: images that are empty or of another shape.
    """

    def __init__(
        self,
        space: Space,
        generators: Sequence[torch.Generator],
        *,
        residual: Callable[[int, int], nn.Module] = PlainResidual,
        global_skip: bool = True,
    ) -> None:
        super().__init__()
        self.space, self.size, self.global_skip = space, len(generators), global_skip
        wide, fine = space.channels, space.colors * space.scale**2

        def fixed(outputs: int, inputs: int, start: float) -> nn.Parameter:
            draws = [kernel_start((outputs, inputs, 3, 3), g) for g in generators]
            return nn.Parameter(start * torch.stack(draws))

        if not space.head:
            self.stem = fixed(wide, space.colors, 1.0)
        if not space.upsample:
            self.last = fixed(fine, wide, 0.0 if global_skip else 1.0)
        makes = [residual(wide, self.size) for _ in range(space.cells)]
        self.cells = nn.ModuleList(makes)
        if space.head:
            self.around = residual(wide, self.size)
        if space.tail:
            self.end = residual(space.colors, self.size)

    def forward(self, x: Tensor, block: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Run the blocks: ``block(i, x)`` is the i-th convolution."""
        space = self.space
        head, each = len(space.head), len(space.body) + bool(space.skip)
        after = head + space.cells * each

        def chain(start: int, stop: int, u: Tensor) -> Tensor:
            for i in range(start, stop):
                u = block(i, u)
            return u

        def cell(start: int, u: Tensor) -> Tensor:
            stop = start + len(space.body)
            out = chain(start, stop, u)
            return out + block(stop, u) if space.skip else out

        def cells(u: Tensor) -> Tensor:
            for n, around in enumerate(self.cells):
                u = around(u, partial(cell, head + n * each))
            return u

        u = chain(0, head, x) if space.head else convolve(x, self.stem)
        u = self.around(u, cells) if space.head else cells(u)
        u = block(after, u) if space.upsample else convolve(u, self.last)
        u = F.pixel_shuffle(u, space.scale)
        if space.tail:
            tail = after + bool(space.upsample)
            u = self.end(u, partial(chain, tail, tail + len(space.tail)))
        if self.global_skip:
            u = u + enlarge(x.flatten(0, 1), space.scale).view_as(u)
        return u


class QuantConv2d(nn.Module):
    """ReLU and a convolution with quantized weights and inputs, for networks side by side.

    Weights are quantized with learned steps for each output channel (LSQ), inputs with fixed steps
    (HWGQ). Each network has a kernel and bits of its own; smaller kernels are padded with zeros.

    Args:
        block: the channels.
        choices: operation and bits of each network; 32 bits, for all of them, are full precision.
        generators: one for each network, for the first weights.

    Raises:
        ValueError: full precision for some networks only, bits without an HWGQ step.
    """

    def __init__(
        self, block: Block, choices: Sequence[Choice], generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__()
        self.bits = [bits for _, bits in choices]
        self.quantized = FULL_PRECISION not in self.bits
        if not self.quantized and len(set(self.bits)) > 1:
            raise ValueError("choices must be of full precision for all networks or for none")
        for bits in self.bits if self.quantized else []:
            hwgq_step(bits)
        side = max(parse_op(op)[0] for op, _ in choices)
        full = (len(choices), block.outputs, block.inputs, side, side)
        weight, mask = torch.zeros(full), torch.zeros(full)
        step = torch.ones(len(choices), block.outputs, 1, 1, 1)
        for n, ((op, bits), g) in enumerate(zip(choices, generators)):
            kernel, groups = parse_op(op)
            start = kernel_start((block.outputs, block.inputs // groups, kernel, kernel), g)
            if self.quantized:
                step[n] = lsq_initial_step(start, bits, per_channel=True)
            inside = slice((side - kernel) // 2, (side + kernel) // 2)
            rows = zip(torch.arange(block.outputs).chunk(groups), start.chunk(groups))
            columns = torch.arange(block.inputs).chunk(groups)
            for (row, part), column in zip(rows, columns):
                place = (row[:, None], column[None, :], inside, inside)
                weight[n][place], mask[n][place] = part, 1.0
        self.weight = nn.Parameter(weight)
        self.padded = bool((mask == 0).any())
        self.register_buffer("mask", mask)
        if self.quantized:
            self.step = nn.Parameter(step)
            depth = torch.tensor(self.bits).view(-1, 1, 1, 1, 1)
            self.register_buffer("depth", depth)
            self.register_buffer("entries", mask.sum((1, 2, 3, 4)).view(-1, 1, 1, 1, 1))

    def forward(self, x: Tensor, perturb: Perturb | None = None) -> Tensor:
        """Map ``(b, size, in, h, w)`` to ``(b, size, out, h, w)``."""
        mask = self.get_buffer("mask")
        weight: Tensor = self.weight
        if self.padded:
            weight = weight * mask
        if self.quantized:
            depth, numel = self.get_buffer("depth"), self.get_buffer("entries")
            weight = lsq_quantize(weight, self.step, depth, numel=numel)
            x = hwgq_quantize(x, self.bits, dim=1)  # this clamps at zero: it is the ReLU
        else:
            x = x.relu()
        if perturb is not None:
            x, weight = perturb(x, INPUT_AXES), perturb(weight, WEIGHT_AXES) * mask
        return convolve(x, weight)


class QuantNet(nn.Module):
    """Quantized networks of fixed architectures, side by side.

    Args:
        space: the convolutions; which operations may be chosen plays no part.
        architectures: for each network, operation and bits of each block.
        generators: one for each network, for the first weights.
        residual: makes the module around a cell's body.
        global_skip: see :class:`Skeleton`.

    Raises:
        ValueError: no network, or not one choice a block; images that are empty or do not fit.

    Example:
        >>> g = [torch.Generator().manual_seed(s) for s in range(2)]
        >>> net = QuantNet(Space(cells=1), [[("3x3", 4)], [("5x5", 8)]], g)
        >>> net(torch.rand(3, 2, 1, 6, 6)).shape  # as large as the bicubic image
        torch.Size([3, 2, 1, 12, 12])
    """

    def __init__(
        self,
        space: Space,
        architectures: Sequence[Sequence[Choice]],
        generators: Sequence[torch.Generator],
        *,
        residual: Callable[[int, int], nn.Module] = PlainResidual,
        global_skip: bool = True,
    ) -> None:
        super().__init__()
        if not architectures or len(architectures) != len(generators):
            raise ValueError(
                f"architectures must be one for each of at least one generator, "
                f"got {len(architectures)} and {len(generators)}"
            )
        for choices in architectures:
            space.bitops(choices, 1)
        self.size = len(architectures)
        rows = zip(space.blocks(), zip(*architectures))
        self.blocks = nn.ModuleList(QuantConv2d(block, row, generators) for block, row in rows)
        self.skeleton = Skeleton(space, generators, residual=residual, global_skip=global_skip)

    def forward(self, x: Tensor, perturb: Perturb | None = None) -> Tensor:
        """Map ``(b, size, colors, h, w)`` to images ``scale`` times as large.

        ``perturb`` changes the inputs and weights of all blocks, such as by noise.
        """
        out: Tensor = self.skeleton(x, lambda i, u: self.blocks[i](u, perturb))
        return out
