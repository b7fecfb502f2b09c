r"""Quantization to b bits, true and simulated by noise.

A quantizer maps real numbers to :math:`2^b` levels. Rounding has no useful gradient, so backward it
counts as the identity (straight-through). Tensors of several networks may stand side by side: bits
and steps are then tensors that broadcast against ``x``.

Sources: Esser et al. 2020 (learned step size, LSQ), Cai et al. 2017 (half-wave Gaussian
quantization, HWGQ), Défossez et al. 2022 (pseudo-quantization noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HWGQ_STEPS",
    "KINDS",
    "Bits",
    "check_bits",
    "hwgq_quantize",
    "hwgq_step",
    "lsq_initial_step",
    "lsq_quantize",
    "minmax_quantize",
    "mixed_noise",
    "quantization_noise",
]

Bits = int | Tensor
"""A number of bits, or a tensor of them that broadcasts against the input."""

HWGQ_STEPS = {1: 1.0576463, 2: 0.6356367, 3: 0.3720646, 4: 0.2130561, 8: 0.0203006}
"""Steps that suit the positive half of a standard normal variable, by bits."""

KINDS = ("gaussian", "uniform")


def _check_bits(bits: Bits, least: int = 1) -> None:
    if isinstance(bits, Tensor):
        return  # built by code that has checked its bits; a look would wait for the device
    if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= 32:
        raise ValueError(f"bits must be a whole number from {least} to 32, got {bits!r}")


def check_bits(bits: Sequence[int]) -> None:
    """Refuse lists of bits that are empty or hold anything but whole numbers from 1 to 32.

    Raises:
        ValueError: such a list.

    Example:
        >>> check_bits([4, 8])
    """
    if len(bits) == 0:
        raise ValueError("bits must hold at least one number")
    for b in bits:
        _check_bits(b)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be 'gaussian' or 'uniform', got {kind!r}")


def _range(x: Tensor, dim: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        raise ValueError("x must not be empty")
    if dim is None:
        low, high = torch.aminmax(x)
        return low, high
    return x.amin(tuple(dim), keepdim=True), x.amax(tuple(dim), keepdim=True)


def _draw(x: Tensor, kind: str, generator: torch.Generator | None) -> tuple[Tensor, float]:
    """Noise of the shape of ``x``, and the factor that makes it suit steps of length one."""
    if kind == "gaussian":
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).normal_(
            generator=generator
        ), 0.5
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).uniform_(
        -0.5, 0.5, generator=generator
    ), 1.0


def quantization_noise(
    x: Tensor,
    bits: int,
    kind: str = "gaussian",
    generator: torch.Generator | None = None,
    *,
    dim: Sequence[int] | None = None,
) -> Tensor:
    r"""Noise of the size of a rounding error, in place of quantization.

    :math:`x+\Delta\epsilon`, :math:`\Delta=(\max x-\min x)/(2^b-1)`, with
    :math:`\epsilon\sim\mathcal N(0,\tfrac14)` or :math:`\mathcal U[-\tfrac12,\tfrac12]`. Rounding
    errors are nearly uniform; the gaussian has three times their variance.

    Args:
        x: floating tensor; the gradient passes unchanged, the range counts as a constant.
        bits: b, from 1 to 32.
        kind: ``"gaussian"`` or ``"uniform"``.
        generator: source of the noise, on the device of ``x``.
        dim: axes over which the range is taken, one range for each slice; all of them if None.

    Returns:
        Tensor of the shape of ``x``; a constant ``x`` comes back as it is.

    Raises:
        ValueError: an unknown kind, bits out of range, an empty ``x``.

    Source: Shvetsov et al. 2024, quantization noise; Défossez et al. 2022.

    Example:
        >>> x = torch.tensor([0.0, 3.0])  # two bits: steps of length one
        >>> noise = quantization_noise(x, 2, "uniform", torch.Generator().manual_seed(0)) - x
        >>> bool((noise.abs() <= 0.5).all())
        True
    """
    _check_bits(bits)
    _check_kind(kind)
    with torch.no_grad():
        low, high = _range(x, dim)
        noise, factor = _draw(x, kind, generator)
        noise.mul_((high - low) * (factor / (2.0**bits - 1.0)))
    return x + noise


def mixed_noise(
    x: Tensor,
    shares: Tensor,
    bits: Sequence[int],
    width: Tensor,
    kind: str = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Add the noises of several numbers of bits: :math:`x+\sum_b p_b\Delta_b\epsilon_b`.

    Args:
        x: floating tensor.
        shares: :math:`p_b`, ``(..., len(bits))`` with axes in front that broadcast against ``x``;
            differentiable.
        bits: the numbers of bits.
        width: :math:`\max x-\min x`, broadcastable to ``x``; a constant.
        kind: ``"gaussian"`` or ``"uniform"``.
        generator: source of the noises, independent for each number of bits.

    Returns:
        Tensor of the shape of ``x``.

    Raises:
        ValueError: an unknown kind.

    Source: Shvetsov et al. 2024, mixture over bits.

    Example:
        >>> x = torch.ones(3)
        >>> mixed_noise(x, torch.tensor([0.5, 0.5]), [4, 8], torch.tensor(0.0)).tolist()
        [1.0, 1.0, 1.0]
    """
    _check_kind(kind)
    for share, b in zip(shares.unbind(-1), bits):
        with torch.no_grad():
            noise, factor = _draw(x, kind, generator)
        x = torch.addcmul(x, noise, share * (width * (factor / (2.0**b - 1.0))))
    return x


def minmax_quantize(x: Tensor, bits: Bits, *, dim: Sequence[int] | None = None) -> Tensor:
    r"""Round to the nearest of :math:`2^b` equidistant levels from the least to the largest value.

    Args:
        x: floating tensor; the gradient passes unchanged.
        bits: b.
        dim: axes over which the range is taken; all of them if None.

    Returns:
        Tensor of the shape of ``x``; a constant ``x`` comes back as it is.

    Raises:
        ValueError: bits out of range, an empty ``x``.

    Source: uniform affine quantization.

    Example:
        >>> minmax_quantize(torch.tensor([0.0, 0.4, 1.6, 3.0]), 2).tolist()
        [0.0, 0.0, 2.0, 3.0]
    """
    _check_bits(bits)
    with torch.no_grad():
        low, high = _range(x, dim)
        step = (high - low) / (2.0**bits - 1.0)
        step = torch.where(step > 0, step, torch.ones_like(step))
        error = ((x - low) / step).round_().mul_(step).add_(low).sub_(x)
    return x + error


def _levels(bits: Bits, signed: bool) -> tuple[float | Tensor, float | Tensor]:
    """Lowest and highest level, in steps."""
    if signed:
        half = 2.0 ** (bits - 1)
        return -half, half - 1.0
    return 0.0 * bits, 2.0**bits - 1.0


def lsq_quantize(
    x: Tensor, step: Tensor, bits: Bits, signed: bool = True, *, numel: int | Tensor | None = None
) -> Tensor:
    r"""Quantization with a step length that is learned.

    :math:`s\cdot\mathrm{round}(\mathrm{clamp}(x/s,Q_n,Q_p))`, levels :math:`-2^{b-1}..2^{b-1}-1` or
    :math:`0..2^b-1`. The gradient in s takes rounding as the identity in x/s, and is multiplied by
    :math:`1/\sqrt{Q_p\cdot\mathrm{numel}}`.

    Args:
        x: floating tensor.
        step: s > 0, broadcastable to ``x``; 0 counts as the smallest normal number.
        bits: b; at least 2 if signed, because one bit leaves no level above zero.
        signed: which levels.
        numel: in the scale of the gradient; the number of entries of ``x`` if None.

    Returns:
        Tensor of the shape of ``x``.

    Raises:
        ValueError: bits out of range, or a step that does not broadcast.

    Source: Esser et al. 2020, equations 1 to 3.

    Example:
        >>> x, s = torch.tensor([-3.0, 0.3, 0.6, 9.0]), torch.tensor(1.0)
        >>> lsq_quantize(x, s, 2).tolist()
        [-2.0, 0.0, 1.0, 1.0]
    """
    _check_bits(bits, 2 if signed else 1)
    pairs = zip(reversed(step.shape), reversed(x.shape))
    if step.ndim > x.ndim or any(s not in (1, n) for s, n in pairs):
        raise ValueError(f"step must broadcast to x, got {tuple(step.shape)}, {tuple(x.shape)}")
    low, high = _levels(bits, signed)
    scale = (high * (max(x.numel(), 1) if numel is None else numel)) ** -0.5
    slow = step * scale  # the value is that of step, the gradient is scaled
    with torch.no_grad():
        fast = torch.where(step == 0, torch.finfo(step.dtype).tiny, step) - slow
    step = slow + fast
    v = x / step
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        v = v.clamp(low.to(x.dtype), high.to(x.dtype))
    else:
        v = v.clamp(float(low), float(high))
    return (v + (v.round() - v).detach()) * step


def lsq_initial_step(
    x: Tensor, bits: Bits, signed: bool = True, per_channel: bool = False
) -> Tensor:
    r"""Where the learned step starts: :math:`2\,\overline{|x|}/\sqrt{Q_p}`.

    Args:
        x: the tensor to quantize.
        bits: b, at least 2 if signed.
        signed: which levels.
        per_channel: one step for each slice along the first axis, with the other axes kept.

    Returns:
        Positive tensor: a scalar, or of shape ``(channels, 1, ...)``. Where all of ``x`` is zero,
        the smallest positive normal number.

    Raises:
        ValueError: bits out of range, an empty ``x``, or a scalar with ``per_channel``.

    Source: Esser et al. 2020, section 2.1.

    Example:
        >>> float(lsq_initial_step(torch.tensor([-2.0, 2.0]), 2))  # the highest level is one step
        4.0
    """
    _check_bits(bits, 2 if signed else 1)
    if x.numel() == 0 or (per_channel and x.ndim == 0):
        raise ValueError(f"x must hold values (and channels), got shape {tuple(x.shape)}")
    size = x.detach().abs()
    if per_channel:
        size = size.mean(tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else size
    else:
        size = size.mean()
    step = 2.0 * size * _levels(bits, signed)[1] ** -0.5
    return step.clamp_min(torch.finfo(x.dtype).tiny)


def hwgq_step(bits: int) -> float:
    """The fixed step of :func:`hwgq_quantize`.

    Raises:
        ValueError: bits for which no step is known.

    Example:
        >>> round(hwgq_step(2), 3)
        0.636
    """
    if bits not in HWGQ_STEPS:
        raise ValueError(f"bits must be one of {', '.join(map(str, HWGQ_STEPS))}, got {bits!r}")
    return HWGQ_STEPS[bits]


def hwgq_quantize(x: Tensor, bits: int | Sequence[int], *, dim: int = 0) -> Tensor:
    r"""Quantize activations after a ReLU with a fixed step that depends on the bits only.

    :math:`s\cdot\mathrm{round}(\mathrm{clamp}(x,0,s(2^b-1))/s)`. The gradient passes where x is not
    clamped. The steps suit activations whose positive part is that of a standard normal variable.

    Args:
        x: floating tensor.
        bits: b, one of 1, 2, 3, 4, 8; or one for each slice along ``dim``.
        dim: the axis along which ``bits`` counts.

    Returns:
        Tensor of the shape of ``x``.

    Raises:
        ValueError: bits for which no step is known, or not one for each slice.

    Source: Cai et al. 2017; the steps of the authors' code.

    Example:
        >>> [round(v, 3) for v in hwgq_quantize(torch.tensor([-1.0, 0.5, 9.0]), 2).tolist()]
        [0.0, 0.636, 1.907]
    """
    many = [bits] if isinstance(bits, int) else list(bits)
    steps = [hwgq_step(b) for b in many]
    if len(set(many)) == 1:  # numbers are faster than tensors
        out: Tensor = _HalfWave.apply(x, steps[0], steps[0] * (2.0 ** many[0] - 1.0))
        return out
    if len(many) != x.shape[dim]:
        raise ValueError(f"bits must be one for each of {x.shape[dim]} slices, got {len(many)}")
    shape = [1] * x.ndim
    shape[dim] = -1
    step = x.new_tensor(steps).view(shape)
    top = x.new_tensor([s * (2.0**b - 1.0) for s, b in zip(steps, many)]).view(shape)
    out = _HalfWave.apply(x, step, top)
    return out


class _HalfWave(torch.autograd.Function):
    """Rounding of what is clamped to 0 .. top; one node of the graph instead of eight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float | Tensor, top: float | Tensor) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < top))
        out = x.clamp_min(0.0)
        if isinstance(top, Tensor):
            out = torch.minimum(out, top)
        else:
            out.clamp_max_(top)
        return out.div_(step).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None
