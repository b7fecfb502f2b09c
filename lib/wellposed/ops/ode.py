r"""An adaptive Runge-Kutta solver that shows its own error and stiffness estimates.

Tsitouras' pair of orders 5 and 4 with a PI controller. Everything is made of plain tensor
operations, so automatic differentiation runs through the accepted steps (the discrete adjoint),
the estimates included; step sizes and decisions are constants for it.

:func:`odeint` takes one step size for the whole tensor, :func:`odeint_rows` one for each row of
the first axis, so that unrelated problems can be solved side by side without coupling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ODESolution", "Stepper", "check_interval", "odeint", "odeint_rows", "row_norm"]

# Tsitouras, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
# assumption", 2011: nodes and rows of stages 2 to 7; the last row is the solution itself.
NODES = (0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0)
STAGES = (
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (
        5.86145544294642,
        -12.92096931784711,
        8.159367898576159,
        -0.071584973281401,
        -0.028269050394068383,
    ),
    (
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
    ),
)
ERROR = (
    -0.00178001105222577714,
    -0.0008164344596567469,
    0.007880878010261995,
    -0.1447110071732629,
    0.5823571654525552,
    -0.45808210592918697,
    1 / 66,
)
SAFETY, BETA_1, BETA_2, SHRINK, GROW = 0.9, 7 / 50, 2 / 25, 0.2, 10.0
FIRST_ERROR = 1e-4  # what the controller remembers before the first step
ERROR_FLOOR = 1e-10  # an error estimate of zero must not give an infinite step
ROUNDING = 100  # in units of rounding: below it, a difference of two stages is noise


@dataclass(frozen=True)
class ODESolution:
    """End state and what the solver learned on the way, one entry a tried step.

    From :func:`odeint` only accepted steps are listed, `(steps,)`, and counts are integers. From
    the solvers of rows all tried steps are, `(steps, r)`, with zeros where a row's step was
    rejected or the row was at its end; counts have shape `(r,)`.
    """

    y: Tensor  # like y0
    error: Tensor  # scaled error estimate; a step is accepted up to 1
    stiffness: Tensor  # estimate of the largest eigenvalue of the Jacobian, in modulus
    step_sizes: Tensor  # without gradient; they add up to the interval
    nfe: int | Tensor  # calls of func, the choice of the first step included
    num_accepted: int | Tensor
    num_rejected: int | Tensor


def check_interval(rtol: float, atol: float, max_steps: int) -> None:
    """Reject tolerances that are not positive and a limit below one step."""
    if not (0 < rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"rtol and atol must be positive and finite, got {rtol} and {atol}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")


def _check(y0: Tensor, first_step: float | None) -> None:
    if not y0.is_floating_point() or y0.numel() == 0:
        raise ValueError(f"y0 must be a float tensor that is not empty, got {y0.dtype}")
    if first_step is not None and not 0 < first_step < math.inf:
        raise ValueError(f"first_step must be positive, got {first_step}")


def row_norm(x: Tensor, rows: bool) -> Tensor:
    """Root mean square of a tensor, or of each row of its first axis.

    Raises:
        ValueError: an empty tensor.

    Example:
        >>> row_norm(torch.tensor([[3.0, 3.0], [1.0, 7.0]]), rows=True)
        tensor([3., 5.])
    """
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    flat = x.reshape(len(x), -1) if rows else x.reshape(-1)
    norm: Tensor = torch.linalg.vector_norm(flat, dim=-1)
    return norm / math.sqrt(flat.shape[-1])


def _over(h: float | Tensor, y: Tensor) -> float | Tensor:
    """A step size for each row, shaped to multiply the state."""
    return h.view(-1, *[1] * (y.ndim - 1)) if isinstance(h, Tensor) else h


def _combine(
    y: Tensor, h: float | Tensor, ks: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """`y + h * sum(weights * ks)`; a float and a tensor of step sizes have each a fused sum."""
    if isinstance(h, Tensor):
        total = ks[0] * weights[0]
        for k, weight in zip(ks[1:], weights[1:]):
            total = total.add(k, alpha=weight)
        return torch.addcmul(y, h, total)
    for k, weight in zip(ks, weights):
        y = y.add(k, alpha=h * weight)
    return y


Func = Callable[..., Tensor]
"""`func(t, y)`; `t` is a float, or `(r,)` in the solvers of rows."""


@dataclass(frozen=True)
class Stepper:
    """One step of the pair with its two estimates."""

    func: Func
    rtol: float
    atol: float
    rows: bool

    def scale(self, y: Tensor, z: Tensor) -> Tensor:
        """Error that is tolerated in each entry."""
        return torch.maximum(y.abs(), z.abs()).mul(self.rtol).add(self.atol)

    def step(
        self, t: float | Tensor, h: float | Tensor, y: Tensor, k1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Next state, its derivative, scaled error and stiffness."""
        ks, wide, z, before = [k1], _over(h, y), y, y
        for node, weights in zip(NODES, STAGES):
            before, z = z, _combine(y, wide, ks, weights)
            ks.append(self.func(t + node * h, z))
        residual = ks[0] * ERROR[0]
        for k, weight in zip(ks[1:], ERROR[1:]):
            residual = residual.add(k, alpha=weight)
        error = row_norm(residual * wide / self.scale(y, z), self.rows)
        # The last two stages stand at one time, so their difference is the Jacobian at work.
        length = row_norm(z - before, self.rows)
        floor = ROUNDING * torch.finfo(y.dtype).eps * row_norm(z.detach(), self.rows)
        floor = floor + torch.finfo(y.dtype).tiny
        slope = row_norm(ks[6] - ks[5], self.rows) / torch.maximum(length, floor)
        stiffness = torch.where(length > floor, slope, torch.zeros_like(slope))
        return z, ks[6], error, stiffness

    @torch.no_grad()
    def first(self, t: float | Tensor, y: Tensor, k1: Tensor) -> Tensor:
        """Step size of the first step, from two evaluations (Hairer, Norsett, Wanner II.4)."""
        scale, small = self.scale(y, y), 1e-5
        size, slope = row_norm(y / scale, self.rows), row_norm(k1 / scale, self.rows)
        safe = (size >= small) & (slope >= small)
        h = torch.where(safe, 0.01 * size / slope.clamp_min(small), torch.full_like(size, 1e-6))
        later = self.func(t + (h if self.rows else float(h)), y + _over(h, y) * k1)
        bend = row_norm((later - k1) / scale, self.rows) / h
        top = torch.maximum(slope, bend)
        guess = (0.01 / top.clamp_min(1e-15)) ** 0.2
        guess = torch.where(top <= 1e-15, torch.maximum(h * 1e-3, torch.full_like(h, 1e-6)), guess)
        return torch.minimum(100 * h, guess)


def odeint(
    func: Callable[[float, Tensor], Tensor],
    y0: Tensor,
    t_span: tuple[float, float] = (0.0, 1.0),
    *,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    first_step: float | None = None,
    max_steps: int = 10_000,
) -> ODESolution:
    r"""Solve $\dot y=f(t,y)$ with one adaptive step size for the whole tensor.

    $$q_j=\mathrm{RMS}\Big(\frac{h_j\sum_i\tilde b_ik_i}{atol+rtol\max(|y_j|,|y_{j+1}|)}\Big),
    \qquad S_j=\frac{\|k_7-k_6\|}{\|y_{j+1}-g_6\|},$$

    where $k_i$ are the stages, $g_6$ is the argument of the sixth; a step is accepted if
    $q_j\le1$.

    Args:
        func: $f$; maps a float and a tensor like `y0` to a tensor like `y0`.
        y0: state at the start, any shape, float32 or float64.
        t_span: start and end, the end later.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        first_step: length of the first step; by default two evaluations choose it.
        max_steps: most steps, rejected ones included.

    Returns:
        Solution whose `error` $q_j$ and `stiffness` $S_j$ are differentiable.

    Raises:
        ValueError: tolerances, `first_step` or `max_steps` not positive, an interval without
            length, `y0` empty or not floating.
        RuntimeError: more than `max_steps` steps, or a state that is not finite.

    Source: Tsitouras 2011; Hairer, Norsett and Wanner, "Solving ODEs I", II.4, for the first step
        and "II", IV.2, for the controller and the stiffness.

    Example:
        >>> solution = odeint(lambda t, y: -3 * y, torch.ones(1, dtype=torch.float64))
        >>> round(float(solution.y) / math.exp(-3), 5), round(float(solution.stiffness[0]), 6)
        (1.0, 3.0)
    """
    check_interval(rtol, atol, max_steps)
    _check(y0, first_step)
    t, end = float(t_span[0]), float(t_span[1])
    if not t < end < math.inf:
        raise ValueError(f"t_span must be an interval (start, end) with start < end, got {t_span}")
    stepper = Stepper(func, rtol, atol, rows=False)
    y, k1 = y0, func(t, y0)
    h = first_step if first_step is not None else float(stepper.first(t, y, k1))
    errors, stiffnesses, sizes = [], [], []
    tried, before, least = 0, FIRST_ERROR, 1e-14 * max(abs(t), abs(end), end - t)
    while t < end:
        if tried == max_steps:
            raise RuntimeError(f"odeint reached t = {t:.6g} of {end:g} after {max_steps} steps")
        if not h > least:
            raise RuntimeError(f"odeint: the state is not finite, or too stiff, at t = {t:.6g}")
        last = t + h >= end - least
        h = end - t if last else h
        tried += 1
        z, k7, error, stiffness = stepper.step(t, h, y, k1)
        q = float(error.detach())
        if not q <= 1.0:
            h *= max(SHRINK, SAFETY * q**-0.2) if math.isfinite(q) else SHRINK
            continue
        errors.append(error)
        stiffnesses.append(stiffness)
        sizes.append(h)
        y, k1, t = z, k7, end if last else t + h
        q = max(q, ERROR_FLOOR)
        h *= min(GROW, max(SHRINK, SAFETY * q**-BETA_1 * before**BETA_2))
        before = max(q, FIRST_ERROR)
    return ODESolution(
        y,
        torch.stack(errors),
        torch.stack(stiffnesses),
        y0.new_tensor(sizes),
        nfe=(1 if first_step is not None else 2) + 6 * tried,
        num_accepted=len(sizes),
        num_rejected=tried - len(sizes),
    )


def odeint_rows(
    func: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    t_span: tuple[float, float | Tensor] = (0.0, 1.0),
    *,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    first_step: float | None = None,
    max_steps: int = 10_000,
) -> ODESolution:
    r"""Solve several problems side by side, each row of the first axis with steps of its own.

    The numbers of a row are those of :func:`odeint` on that row alone, up to rounding. A row that
    is at its end waits for the others, and its evaluations are no longer counted.

    Args:
        func: maps times `(r,)` and states `(r, ...)` to derivatives `(r, ...)`, row by row.
        y0: states at the start, `(r, ...)`.
        t_span: start, and end as a number or one for each row, `(r,)`.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        first_step: length of the first step; by default two evaluations choose it.
        max_steps: most rounds of steps.

    Returns:
        Solution with one column a row.

    Raises:
        ValueError: as :func:`odeint`, or `y0` without a second axis.
        RuntimeError: as :func:`odeint`.

    Source: ours; step sizes for each sample as in torchode (Lienen and Guennemann 2022).

    Example:
        >>> rate = torch.tensor([[-1.0], [-30.0]], dtype=torch.float64)
        >>> slow_fast = odeint_rows(lambda t, y: rate * y, torch.ones_like(rate))
        >>> bool(slow_fast.nfe[1] > 2 * slow_fast.nfe[0])
        True
    """
    check_interval(rtol, atol, max_steps)
    _check(y0, first_step)
    if y0.ndim < 2:
        raise ValueError(f"y0 must be (rows, ...), got {tuple(y0.shape)}")
    t = y0.new_full((len(y0),), float(t_span[0]), requires_grad=False)
    end = torch.as_tensor(t_span[1], dtype=y0.dtype, device=y0.device).detach().expand_as(t)
    if not bool(((t < end) & end.isfinite()).all()):
        raise ValueError(f"t_span must be an interval (start, end) with start < end, got {t_span}")
    stepper = Stepper(func, rtol, atol, rows=True)
    y, k1 = y0, func(t, y0)
    h = torch.full_like(t, first_step) if first_step is not None else stepper.first(t, y, k1)
    active, before = torch.ones_like(t, dtype=torch.bool), torch.full_like(t, FIRST_ERROR)
    least = 4 * torch.finfo(y0.dtype).eps * torch.maximum(t.abs(), end.abs())
    tried, accepted = torch.zeros_like(t, dtype=torch.int64), torch.zeros_like(t).long()
    errors, stiffnesses, sizes = [], [], []
    for _ in range(max_steps):
        last = t + h >= end - least
        h = torch.where(last, end - t, h)
        z, k7, error, stiffness = stepper.step(t, h, y, k1)
        q = error.detach()
        good = active & (q <= 1.0)
        tried, accepted = tried + active, accepted + good
        errors.append(torch.where(good, error, torch.zeros_like(q)))
        stiffnesses.append(torch.where(good, stiffness, torch.zeros_like(q)))
        sizes.append(torch.where(good, h, torch.zeros_like(h)))
        t = torch.where(good, torch.where(last, end, t + h), t)
        safe = q.clamp_min(ERROR_FLOOR)
        up = (SAFETY * safe.pow(-BETA_1) * before.pow(BETA_2)).clamp(SHRINK, GROW)
        down = (SAFETY * safe.pow(-0.2)).nan_to_num(SHRINK, SHRINK, SHRINK).clamp_min(SHRINK)
        failed = active & ~good
        before = torch.where(good, safe.clamp_min(FIRST_ERROR), before)
        active = t < end
        h = torch.where(active, h * torch.where(good, up, down), torch.zeros_like(h))
        # One look at the device a round; a row at its end took a step of length 0.
        done, some_failed, lost = torch.stack(
            [~active.any(), failed.any(), (failed & ~(h > least)).any()]
        ).tolist()
        if lost:
            raise RuntimeError("odeint_rows: a state is not finite, or a row is too stiff")
        if some_failed:
            keep = _over(failed, y)
            assert isinstance(keep, Tensor)
            y, k1 = torch.where(keep, y, z), torch.where(keep, k1, k7)
        else:
            y, k1 = z, k7
        if done:
            break
    else:
        raise RuntimeError(f"odeint_rows did not reach the end within {max_steps} steps")
    return ODESolution(
        y,
        torch.stack(errors),
        torch.stack(stiffnesses),
        torch.stack(sizes),
        nfe=(1 if first_step is not None else 2) + 6 * tried,
        num_accepted=accepted,
        num_rejected=tried - accepted,
    )
