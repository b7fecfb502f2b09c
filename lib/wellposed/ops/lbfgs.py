r"""L-BFGS for many problems side by side, with a line search that also works on kinks.

Each problem has its own curvature pairs, its own step length and its own end; one call of the
objective serves all of them. The line search is bisection for the weak Wolfe conditions: unlike
the interpolating searches of smooth optimization it needs no second derivative, which makes the
method usable on convex functions with kinks (where it descends, but may stop short of the minimum).

Source: Nocedal and Wright, "Numerical Optimization", algorithm 7.4; line search: Lewis and Overton,
"Nonsmooth optimization via quasi-Newton methods", Mathematical Programming 2013, algorithm 2.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LBFGSResult", "minimize_lbfgs"]

ARMIJO, CURVATURE = 1e-4, 0.9
MAX_TRIALS = 30  # points tried on one line
PATIENCE = 5  # iterations in a row with little gain before the end

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LBFGSResult:
    """The best points found; `b` problems of `d` variables, `t` iterations of the longest."""

    x: Tensor  # (b, d)
    value: Tensor  # (b,)
    grad: Tensor  # (b, d)
    num_iters: Tensor  # (b,)
    num_evals: Tensor  # (b,), calls of the objective
    values: Tensor  # (t + 1, b), value after each iteration, constant after a problem's end
    evals: Tensor  # (t + 1, b), calls of the objective until then
    converged: Tensor  # (b,), ended before `max_iter`


class _Memory:
    """Curvature pairs of all problems, the newest last; a pair with `rho = 0` has no effect."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scale: Tensor | None = None  # (b, 1), 0 where there is no pair yet

    def add(self, s: Tensor, y: Tensor) -> None:
        """Remember a step and the change of the gradient, where they show positive curvature."""
        sy, yy = (s * y).sum(-1, keepdim=True), (y * y).sum(-1, keepdim=True)
        eps = torch.finfo(s.dtype).eps
        good = sy > eps * (yy * (s * s).sum(-1, keepdim=True)).sqrt()
        rho = torch.where(good, 1 / sy, 0.0)
        scale = torch.where(good, sy / yy, 0.0)
        old = torch.zeros_like(scale) if self.scale is None else self.scale
        self.scale = torch.where(good, scale, old)
        self.pairs = [*self.pairs, (s, y, rho)][-self.size :]

    def forget(self, which: Tensor) -> None:
        """Drop the pairs of some problems, `(b,)`."""
        keep = ~which[:, None]
        self.pairs = [(s, y, rho * keep) for s, y, rho in self.pairs]
        if self.scale is not None:
            self.scale = self.scale * keep

    def direction(self, grad: Tensor) -> Tensor:
        """Two-loop recursion; without pairs the gradient, scaled to a largest entry of one."""
        q, weights = -grad, []
        for s, y, rho in reversed(self.pairs):
            weight = rho * (s * q).sum(-1, keepdim=True)
            q = torch.addcmul(q, weight, y, value=-1)
            weights.append(weight)
        first = 1 / grad.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
        scale = first if self.scale is None else torch.where(self.scale > 0, self.scale, first)
        q = q * scale
        for (s, y, rho), weight in zip(self.pairs, reversed(weights), strict=True):
            q = torch.addcmul(q, weight - rho * (y * q).sum(-1, keepdim=True), s)
        return q


@dataclass
class _Line:
    """The point that each problem takes on its line, and what it cost."""

    x: Tensor
    value: Tensor
    grad: Tensor
    found: Tensor  # (b,), whether the value fell enough
    evals: Tensor  # (b,)


def _search(
    objective: Objective, x: Tensor, value: Tensor, grad: Tensor, step: Tensor, active: Tensor
) -> _Line:
    """Bisection for the weak Wolfe conditions; without success, the last point that fell enough."""
    slope = (grad * step).sum(-1)
    low, high = torch.zeros_like(value), torch.full_like(value, torch.inf)
    length, open_ = torch.ones_like(value), active & (slope < 0)
    line = _Line(
        x, value, grad, torch.zeros_like(active), torch.zeros_like(value, dtype=torch.int64)
    )
    for _ in range(MAX_TRIALS):
        new_x = torch.where(open_[:, None], x + length[:, None] * step, line.x)
        new_value, new_grad = objective(new_x)
        falls = open_ & (new_value <= value + ARMIJO * length * slope)
        line.evals = line.evals + open_
        line.x = torch.where(falls[:, None], new_x, line.x)
        line.grad = torch.where(falls[:, None], new_grad, line.grad)
        line.value = torch.where(falls, new_value, line.value)
        line.found = line.found | falls
        done = falls & ((new_grad * step).sum(-1) >= CURVATURE * slope)
        low, high = torch.where(falls, length, low), torch.where(falls, high, length)
        open_ = open_ & ~done
        if not open_.any():
            break
        length = torch.where(high.isinf(), 2 * low, (low + high) / 2)
    return line


@torch.no_grad()
def minimize_lbfgs(
    objective: Objective,
    x: Tensor,
    *,
    max_iter: int = 500,
    tol: float = 1e-10,
    grad_tol: float = 0.0,
    memory: int = 10,
) -> LBFGSResult:
    r"""Minimize `b` functions of `d` variables side by side.

    A problem ends when its gradient is at most `grad_tol` in L1 norm, when five iterations in a row
    each lower the value by at most `tol` of its size, or when no step along the gradient
    lowers it. Where the function has kinks, the last two need not be at the minimum.

    Args:
        objective: maps points `(b, d)` to values `(b,)` and gradients `(b, d)`.
        x: where to start, `(b, d)`.
        max_iter: largest number of iterations, at least 0.
        tol: smallest relative gain of an iteration, at least 0.
        grad_tol: L1 norm of a gradient that counts as zero, at least 0.
        memory: number of curvature pairs, at least 1.

    Returns:
        An :class:`LBFGSResult`.

    Raises:
        ValueError: `x` is not `(b, d)`, a number out of range, values that are not finite at `x`.

    Example:
        >>> bowl = lambda x: (0.5 * (x - 3).square().sum(-1), x - 3)
        >>> minimize_lbfgs(bowl, torch.zeros(1, 2)).x.tolist()
        [[3.0, 3.0]]
    """
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (b, d), not empty, got {tuple(x.shape)}")
    for name, number, least in (
        ("max_iter", max_iter, 0),
        ("tol", tol, 0),
        ("grad_tol", grad_tol, 0),
        ("memory", memory, 1),
    ):
        if not number >= least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    value, grad = objective(x)
    if not value.isfinite().all():
        raise ValueError("objective must be finite at x")
    pairs, tiny = _Memory(memory), torch.finfo(x.dtype).tiny
    evals = torch.ones_like(value, dtype=torch.int64)
    iters, idle = torch.zeros_like(evals), torch.zeros_like(evals)
    fresh = torch.ones_like(value, dtype=torch.bool)  # no curvature yet: a failure is final
    active = grad.abs().sum(-1) > grad_tol
    values, counts = [value], [evals]
    for _ in range(max_iter):
        if not active.any():
            break
        line = _search(objective, x, value, grad, pairs.direction(grad), active)
        pairs.add(line.x - x, line.grad - grad)
        gain = value - line.value
        idle = torch.where(gain > tol * value.abs().clamp(min=tiny), 0, idle + active)
        failed = active & ~line.found
        pairs.forget(failed)
        x, value, grad, evals = line.x, line.value, line.grad, evals + line.evals
        iters = iters + active
        stuck = (failed & fresh) | (idle >= PATIENCE)
        fresh = failed
        active = active & ~stuck & (grad.abs().sum(-1) > grad_tol)
        values.append(value)
        counts.append(evals)
    return LBFGSResult(
        x, value, grad, iters, evals, torch.stack(values), torch.stack(counts), ~active
    )
