r"""Networks that are exact proximal operators, and the regularizer that they have learned.

Z. Fang, S. Buchanan, J. Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems",
ICLR 2024, arXiv:2310.14344.

Claim: the gradient :math:`f=\nabla\psi` of a convex network is the proximal operator of some
regularizer :math:`R`, which need not be convex; training it by proximal matching,

.. math:: L_\gamma = \mathbb E\,\bigl[1-\exp(-\|f(x+\sigma\varepsilon)-x\|_2^2/\gamma^2)\bigr],

makes :math:`R` approach :math:`-\sigma^2\log p` as :math:`\gamma\to0`. It can be read off:
:math:`R(x)=\langle y,x\rangle-\tfrac12\|x\|^2-\psi(y)` where :math:`f(y)=x`.

Glossary: potential :math:`\psi`, images as rows of length :math:`d`, noise :math:`\sigma`
(``sigma``), strong convexity :math:`\alpha` (``alpha``), sharpness :math:`\beta` of the softplus
(``beta``). The networks themselves stand in :mod:`wellposed.nets.convex`.

Departures from the paper: :math:`\alpha` adds :math:`\frac\alpha2\|y\|^2` to the potential, as in
the paper's formula (the authors' code adds twice that); the potential has no constant, which is
free; the gradient of the fully connected network is written out instead of traced; inversion by
L-BFGS, where the authors use conjugate gradients.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from wellposed.nets.convex import LPN, ConvLPN, StackedLPN
from wellposed.ops.lbfgs import minimize_lbfgs
from wellposed.ops.numerics import warn_of_nan
from wellposed.ops.proximal import ProxDefects, prox_defects
from wellposed.train import StackedAdam

__all__ = [
    "LPN",
    "ConvLPN",
    "PnPResult",
    "ProxDefects",
    "StackedLPN",
    "Stage",
    "absolute_loss",
    "invert_prox",
    "matching_stages",
    "pnp_admm",
    "prior_value",
    "prox_defects",
    "proximal_matching_loss",
    "squared_loss",
    "train_denoisers",
]

Denoiser = Callable[[Tensor], Tensor]
Potential = Callable[[Tensor], Tensor]
Loss = Callable[..., Tensor]
Reduction = Literal["mean", "none"]


@dataclass(frozen=True)
class PnPResult:
    """Restored images and the way there.

    Attributes:
        x: the last :math:`z`, shape ``(b, d)``: an output of the denoiser.
        residuals: :math:`\\|z^{k+1}-z^k\\|`, shape ``(num_iters, b)``.
    """

    x: Tensor
    residuals: Tensor

    def converged(self, tol: float = 1e-4) -> Tensor:
        """Whether the last change was at most ``tol`` a pixel (root mean square), ``(b,)``."""
        return self.residuals[-1] <= tol * math.sqrt(self.x.shape[-1])


@dataclass(frozen=True)
class Stage:
    """A part of the training: ``steps`` at learning rate ``lr`` on ``loss``.

    The loss has the signature of :func:`squared_loss`.
    """

    steps: int
    lr: float
    loss: Loss


# --- losses and training ---------------------------------------------------------------------


def _reduced(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    return values.mean() if reduction == "mean" else values


def _difference(input: Tensor, target: Tensor) -> Tensor:
    if input.shape != target.shape or input.ndim < 2 or 0 in input.shape:
        raise ValueError(
            "input and target must not be empty and have one shape (b, ...), got "
            f"{tuple(input.shape)} and {tuple(target.shape)}"
        )
    return (input - target).flatten(1)


def proximal_matching_loss(
    input: Tensor, target: Tensor, gamma: float, reduction: Reduction = "mean"
) -> Tensor:
    r"""Proximal matching, :math:`1-\exp(-\|f-x\|_2^2/\gamma^2)`, the norm over a whole example.

    As :math:`\gamma\to0` it counts the predictions that miss their target, so the best prediction
    is the mode of the posterior, not its mean.

    Args:
        input: predictions, shape ``(b, ...)``.
        target: clean examples, of the same shape.
        gamma: width :math:`\gamma>0` of the target.
        reduction: ``"mean"``, or ``"none"`` for one value an example.

    Returns:
        Scalar, or shape ``(b,)``; values in [0, 1].

    Raises:
        ValueError: ``gamma`` not positive, shapes that differ or are empty, an unknown reduction.

    Source: Section 3, proximal matching; the constant before the exponential is dropped, as in
        the authors' code.

    Example:
        >>> x = torch.tensor([[0.0, 0.0]])
        >>> round(proximal_matching_loss(x + 1.0, x, math.sqrt(2.0)).item(), 4)  # 1 - 1 / e
        0.6321
    """
    if not 0.0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    squared = _difference(input, target).square().sum(1)
    return _reduced(-torch.expm1(-squared / gamma**2), reduction)


def squared_loss(input: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Mean squared error of each example; its best prediction is the posterior mean.

    Args:
        input: predictions, shape ``(b, ...)``.
        target: clean examples, of the same shape.
        reduction: ``"mean"``, or ``"none"`` for one value an example.

    Returns:
        Scalar, or shape ``(b,)``.

    Raises:
        ValueError: shapes that differ or are empty, an unknown reduction.

    Source: Section 3, one of the two losses that the paper compares with.

    Example:
        >>> squared_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)).item()
        5.0
    """
    return _reduced(_difference(input, target).square().mean(1), reduction)


def absolute_loss(input: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Mean absolute error of each example; its best prediction is the posterior median.

    Args:
        input: predictions, shape ``(b, ...)``.
        target: clean examples, of the same shape.
        reduction: ``"mean"``, or ``"none"`` for one value an example.

    Returns:
        Scalar, or shape ``(b,)``.

    Raises:
        ValueError: shapes that differ or are empty, an unknown reduction.

    Source: Section 3, the other loss, which also opens proximal matching.

    Example:
        >>> absolute_loss(torch.tensor([[1.0, -3.0]]), torch.zeros(1, 2)).item()
        2.0
    """
    return _reduced(_difference(input, target).abs().mean(1), reduction)


def matching_stages(
    steps: int,
    *,
    gammas: Sequence[float] = (0.5, 0.4, 0.3, 0.2, 0.1),
    rates: Sequence[float] = (1e-3, 1e-3, 5e-4, 3e-4, 1e-4),
    warmup_rate: float = 3e-3,
    warmup_share: float = 0.4,
) -> list[Stage]:
    r"""Absolute loss first, then proximal matching with smaller and smaller :math:`\gamma`.

    The absolute loss has a gradient however far the target is; proximal matching has none beyond
    a few :math:`\gamma`.

    Args:
        steps: in all; at least one for each stage.
        gammas: of the stages after the first, positive.
        rates: their learning rates.
        warmup_rate: learning rate of the first stage.
        warmup_share: share of the steps in the first stage, in (0, 1).

    Returns:
        One :class:`Stage` for the absolute loss and one for each of ``gammas``.

    Raises:
        ValueError: lists of different lengths, a number out of range, too few steps.

    Source: Section 3 and the authors' training scripts; steps and rates shortened by us.

    Example:
        >>> [(s.steps, s.lr) for s in matching_stages(100, gammas=[1.0], rates=[0.01])]
        [(40, 0.003), (60, 0.01)]
    """
    if len(gammas) != len(rates) or not gammas or min(gammas) <= 0:
        raise ValueError(f"gammas must be positive, one for each rate, got {gammas} and {rates}")
    if not 0.0 < warmup_share < 1.0:
        raise ValueError(f"warmup_share must lie in (0, 1), got {warmup_share}")
    first = round(warmup_share * steps)
    each, left = divmod(steps - first, len(gammas))
    if first < 1 or each < 1:
        raise ValueError(f"steps must give each of {len(gammas) + 1} stages one, got {steps}")
    counts = [each] * (len(gammas) - 1) + [each + left]
    stages = [Stage(first, warmup_rate, absolute_loss)]
    for count, rate, gamma in zip(counts, rates, gammas, strict=True):
        stages.append(Stage(count, rate, partial(proximal_matching_loss, gamma=gamma)))
    return stages


def _groups(losses: Sequence[Loss]) -> list[tuple[slice, Loss]]:
    """Runs of networks that share a loss object."""
    found, start = [], 0
    for _, run in groupby(losses, key=id):
        size = len(list(run))
        found.append((slice(start, start + size), losses[start]))
        start += size
    return found


def train_denoisers(
    model: nn.Module,
    schedules: Sequence[Sequence[Stage]],
    sample: Callable[[], Tensor],
    *,
    sigma: float,
    generator: torch.Generator,
    factors: float | Sequence[float] = 1.0,
) -> Tensor:
    r"""Train denoisers side by side with Adam, and clamp the weights that must not be negative.

    Each step draws clean examples :math:`x`, adds noise :math:`\sigma\varepsilon`, and lowers each
    network's own loss.

    Args:
        model: maps ``(s, b, d)`` to ``(s, b, d)``, network by network, such as
            :class:`StackedLPN`; trained in place. Its ``clamp_weights`` is called if it has one.
        schedules: the stages of each network; steps and rates are the same for all.
        sample: draws the next batch of clean examples, ``(s, b, d)``.
        sigma: noise :math:`\sigma>0`.
        generator: of the noise, on the device of the examples.
        factors: of the rates of all networks, or of each; the latter for stacked parameters only.

    Returns:
        The losses before each step, shape ``(steps, s)``; a warning tells if one is NaN.

    Raises:
        ValueError: ``sigma`` not positive; no schedule, or schedules that differ in steps or rates;
            examples that are empty or of another shape.

    Source: Section 3 and the authors' training loop, which also clamps after each step.

    Example:
        >>> net, x = StackedLPN([LPN(1, 4, 1)]), torch.ones(1, 8, 1)
        >>> stages = [Stage(3, 1e-2, squared_loss)]
        >>> g = torch.Generator().manual_seed(0)
        >>> train_denoisers(net, [stages], lambda: x, sigma=0.1, generator=g).shape
        torch.Size([3, 1])
    """
    if not 0.0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
    plans = [[(stage.steps, stage.lr) for stage in stages] for stages in schedules]
    if not plans or any(plan != plans[0] for plan in plans):
        raise ValueError("schedules must hold one list a network, with the same steps and rates")
    clamp: Callable[[], None] = getattr(model, "clamp_weights", lambda: None)
    adam, history = StackedAdam(model.parameters(), lr=factors), []
    for stages in zip(*schedules, strict=True):
        groups = _groups([stage.loss for stage in stages])
        for _ in range(stages[0].steps):
            x = sample()
            if x.ndim != 3 or 0 in x.shape:
                raise ValueError(f"sample must draw (s, b, d), got {tuple(x.shape)}")
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            f, b = model(x + sigma * noise), x.shape[1]
            values = [
                loss(f[rows].flatten(0, 1), x[rows].flatten(0, 1), reduction="none").view(-1, b)
                for rows, loss in groups
            ]
            losses = torch.cat(values).mean(1)
            losses.sum().backward()
            adam.step(stages[0].lr)
            clamp()
            history.append(losses.detach())
    seen = torch.stack(history)
    warn_of_nan("train_denoisers", seen)
    return seen


# --- what the network has learned ------------------------------------------------------------


def _values_and_gradients(potential: Potential, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        value = potential(y)
        (gradient,) = torch.autograd.grad(value.sum(), y)
    return value.detach(), gradient


def invert_prox(
    potential: Potential, x: Tensor, *, tol: float = 1e-6, max_iter: int = 500
) -> Tensor:
    r"""The input that a proximal operator maps to ``x``.

    .. math:: y=\arg\min_y\psi(y)-\langle x,y\rangle

    The problem is convex, and its gradient is :math:`f(y)-x`. A target outside the range of
    :math:`f` has no preimage, and a warning says that rows were left. Use float64 for residuals
    below about 1e-3.

    Args:
        potential: :math:`\psi`, convex, maps ``(b, d)`` to ``(b,)``, row by row.
        x: targets, shape ``(b, d)``.
        tol: largest residual :math:`\|f(y)-x\|`, positive.
        max_iter: iterations of L-BFGS, at least 1.

    Returns:
        :math:`y`, shape ``(b, d)``.

    Raises:
        ValueError: ``x`` of another shape or not finite, ``tol`` or ``max_iter`` out of range.

    Source: Section 3, on evaluating the regularizer (the authors use conjugate gradients).

    Example:
        >>> bowl = lambda y: y.square().sum(-1)  # gradient 2 y
        >>> invert_prox(bowl, torch.tensor([[3.0]])).item()
        1.5
    """
    if x.ndim != 2 or 0 in x.shape or not x.isfinite().all():
        raise ValueError(f"x must be finite, of shape (b, d) and not empty, got {tuple(x.shape)}")
    if not 0.0 < tol < math.inf or max_iter < 1:
        raise ValueError(f"tol must be positive and max_iter at least 1, got {tol} and {max_iter}")

    def objective(y: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = _values_and_gradients(potential, y)
        return value - (x * y).sum(-1), gradient - x

    found = minimize_lbfgs(objective, x.detach(), max_iter=max_iter, tol=0.0, grad_tol=tol)
    residual = found.grad.norm(dim=-1)
    rounding = math.sqrt(torch.finfo(x.dtype).eps) * (1 + x.norm(dim=-1))
    left = int((residual > rounding.clamp(min=tol)).sum())
    if left:
        warnings.warn(
            f"{left} of {len(x)} rows have no preimage within {tol:g}: the largest residual is "
            f"{float(residual.max()):.2g}",
            stacklevel=2,
        )
    return found.x


def prior_value(
    potential: Potential,
    x: Tensor,
    *,
    tol: float = 1e-6,
    max_iter: int = 500,
    y: Tensor | None = None,
) -> Tensor:
    r"""The regularizer whose proximal operator the gradient of the potential is.

    .. math:: R(x)=\langle y,x\rangle-\tfrac12\|x\|^2-\psi(y)\quad\text{where }\nabla\psi(y)=x

    It is known up to a constant: compare differences.

    Args:
        potential: :math:`\psi`, convex, maps ``(b, d)`` to ``(b,)``, row by row.
        x: where to evaluate, shape ``(b, d)``, in the range of :math:`\nabla\psi`.
        tol: largest residual of the inversion, positive; see :func:`invert_prox`.
        max_iter: iterations of the inversion, at least 1.
        y: the preimages, shape ``(b, d)``, where they are known; by default they are looked for.

    Returns:
        Shape ``(b,)``.

    Raises:
        ValueError: as :func:`invert_prox`; ``y`` of another shape than ``x``.

    Source: Section 3, on evaluating the regularizer.

    Example:
        >>> bowl = lambda y: y.square().sum(-1) / 4  # gradient y / 2: the prox of |x|^2 / 2
        >>> prior_value(bowl, torch.tensor([[2.0]])).item()
        2.0
    """
    y = invert_prox(potential, x, tol=tol, max_iter=max_iter) if y is None else y
    if y.shape != x.shape:
        raise ValueError(f"y must have shape {tuple(x.shape)}, got {tuple(y.shape)}")
    with torch.no_grad():
        return (y * x).sum(-1) - x.square().sum(-1) / 2 - potential(y)


# --- inverse problems ------------------------------------------------------------------------


def _ridge_inverse(operator: Tensor, rho: float) -> Tensor:
    r"""Inverse of :math:`A^\top A+\rho I`, by singular values where rounding eats the ridge."""
    d = operator.shape[1]
    eye = torch.eye(d, dtype=operator.dtype, device=operator.device)
    factor, info = torch.linalg.cholesky_ex(operator.mT @ operator + rho * eye)
    if not info:
        return torch.cholesky_inverse(factor)
    _, s, vh = torch.linalg.svd(operator)
    inverse: Tensor = (vh.mT / (nn.functional.pad(s.square(), (0, d - len(s))) + rho)) @ vh
    return inverse


@torch.no_grad()
def pnp_admm(
    denoiser: Denoiser,
    operator: Tensor,
    measurement: Tensor,
    *,
    rho: float,
    num_iters: int = 100,
    init: Tensor | None = None,
) -> PnPResult:
    r"""Plug-and-play ADMM for :math:`\min_x\frac12\|Ax-b\|^2+\rho R(x)`.

    .. math:: x^{k+1}&=\arg\min_x\tfrac12\|Ax-b\|^2+\tfrac\rho2\|x-z^k+u^k\|^2 \\
              u^{k+1}&=u^k+x^{k+1}-z^k \\
              z^{k+1}&=f(x^{k+1}+u^{k+1})

    The matrix of the first line is inverted once. For the gradient of a strongly convex network
    with :math:`\alpha<1` the iteration converges where :math:`\rho>\|A^\top A\|`.

    Args:
        denoiser: :math:`f`, the proximal operator of :math:`R`; maps ``(b, d)`` to ``(b, d)``.
        operator: :math:`A`, shape ``(m, d)``.
        measurement: :math:`b`, one a row, shape ``(b, m)``.
        rho: weight of the regularizer and step of the method, positive.
        num_iters: iterations, at least 1.
        init: first :math:`z`, shape ``(b, d)``; by default :math:`A^\top b`. :math:`u` starts at 0.

    Returns:
        A :class:`PnPResult`; a warning tells if the iteration diverged.

    Raises:
        ValueError: shapes that do not fit, ``rho`` or ``num_iters`` out of range.

    Source: Section 4, Algorithm 1 and Theorem 4.1; order of the updates as in the authors' code
        for deblurring. The numbering is from memory.

    Example:
        >>> one = torch.ones(1, 1)
        >>> shrink = lambda v: v / 2  # the prox of x^2 / 2, so x = b / (1 + rho)
        >>> round(pnp_admm(shrink, one, 3 * one, rho=2.0).x.item(), 4)
        1.0
    """
    if operator.ndim != 2 or 0 in operator.shape:
        raise ValueError(f"operator must have shape (m, d), got {tuple(operator.shape)}")
    if measurement.ndim != 2 or measurement.shape[1] != len(operator):
        raise ValueError(
            f"measurement must have shape (b, {len(operator)}), got {tuple(measurement.shape)}"
        )
    if not 0.0 < rho < math.inf or num_iters < 1:
        raise ValueError(f"rho must be positive, num_iters at least 1, got {rho} and {num_iters}")
    back = measurement @ operator
    z = back if init is None else init
    if z.shape != back.shape:
        raise ValueError(f"init must have shape {tuple(back.shape)}, got {tuple(z.shape)}")
    u = torch.zeros_like(z)
    inverse = _ridge_inverse(operator, rho)
    residuals = []
    for _ in range(num_iters):
        x = (back + rho * (z - u)) @ inverse
        u = u + x - z
        new = denoiser(x + u)
        residuals.append((new - z).norm(dim=1))
        z = new
    warn_of_nan("pnp_admm", z, *residuals)
    return PnPResult(z, torch.stack(residuals))
