r"""An adaptive solver of stochastic differential equations that shows its estimates.

Roessler's scheme for diagonal noise with the coefficients SOSRI2 of Rackauckas and Nie, strong
order 1.5. As in :mod:`wellposed.ops.ode`, automatic differentiation runs through the accepted
steps, error and stiffness estimates included.

The Brownian path is drawn first, on a grid, with the integrals that the scheme needs. Steps are
whole numbers of cells. A rejected step then needs no bridge: the path is there already, and a
second solver can be given the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.ops.ode import ROUNDING, ODESolution, check_interval, row_norm

__all__ = ["BrownianPath", "brownian_path", "sdeint_rows"]

# Coefficients SOSRI2 as in StochasticDiffEq.jl: drift stages, diffusion stages, solution, error.
A0 = (
    (0.13804532298278663,),
    (0.5818361298250374, 0.4181638701749618),
    (0.4670018408674211, 0.8046204792187386, -0.27162232008616016),
)
B0 = (
    (0.08852381537667678,),
    (1.0317752458971061, 0.4563552922077882),
    (1.73078280444124, -0.46089678470929774, -0.9637509618944188),
)
A1 = (
    (0.45605532163856893,),
    (0.7555807846451692, 0.24441921535482677),
    (0.6981181143266059, 0.3453277086024727, -0.04344582292908241),
)
B1 = (
    (0.6753186815412179,),
    (-0.07452812525785148, -0.49783736486149366),
    (-0.5591906709928903, 0.022696571806569924, -0.8984927888368557),
)
C0 = (0.0, 0.13804532298278663, 1.0, 1.0)
C1 = (0.0, 0.45605532163856893, 1.0, 1.0)
ALPHA = (-0.15036858140642623, 0.7545275856696072, 0.686995463807979, -0.2911544680711602)
BETA = (
    (-0.45315689727309133, 0.8330937231303951, 0.3792843195533544, 0.24077885458934192),
    (-0.4994383733810986, 0.9181786186154077, -0.25613778661003145, -0.16260245862427797),
    (1.4531568972730915, -0.8330937231303933, -0.3792843195533583, -0.24077885458934023),
    (-0.4976090683622265, 0.9148155835648892, -1.4102107084476505, 0.9930041932449877),
)
SAFETY, POWER_1, POWER_2, SHRINK, GROW = 0.9, 7 / 15, 4 / 15, 0.2, 1.125
FIRST_ERROR = 1e-4


@dataclass(frozen=True)
class BrownianPath:
    """A path and its time integral at the ends of equal cells, `(cells + 1, paths, ...)`."""

    values: Tensor
    integral: Tensor
    cell: float  # length of a cell

    def between(self, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """Increment, and integral of the path above its start, for cells `start` to `stop`."""
        own = torch.arange(len(start), device=start.device) % self.values.shape[1]
        w0, w1 = self.values[start, own], self.values[stop, own]
        h = ((stop - start) * self.cell).to(w0.dtype).view(-1, *[1] * (w0.ndim - 1))
        return w1 - w0, self.integral[stop, own] - self.integral[start, own] - h * w0


def brownian_path(
    shape: tuple[int, ...],
    *,
    generator: torch.Generator | Sequence[torch.Generator],
    length: float = 1.0,
    cells: int = 128,
    like: Tensor | None = None,
) -> BrownianPath:
    r"""Draw Brownian motions and their time integrals on a grid, exactly.

    On a cell of length $\delta$ the increment is $\Delta W$, and the integral of what the path
    gains is $\tfrac\delta2(\Delta W+\Delta Z/\sqrt3)$ with an independent $\Delta Z$ of equal law.

    Args:
        shape: `(paths, ...)`, one motion an entry.
        generator: source of the numbers, or one for each path.
        length: of the time interval, positive.
        cells: number of cells, at least 1.
        like: gives dtype and device; without it float32 and the device of the generator.

    Returns:
        The path, zero at the start.

    Raises:
        ValueError: `length` or `cells` out of range, an empty shape, or as many generators as there
            are not paths.

    Source: Kloeden and Platen, "Numerical Solution of Stochastic Differential Equations", 10.4.

    Example:
        >>> path = brownian_path((1, 3), generator=torch.Generator().manual_seed(0), cells=4)
        >>> tuple(path.values.shape), path.values[0].tolist()
        ((5, 1, 3), [[0.0, 0.0, 0.0]])
    """
    if not 0 < length < math.inf or cells < 1 or len(shape) == 0 or 0 in shape:
        raise ValueError(
            f"length must be positive, cells at least 1 and shape not empty, got {length}, {cells} "
            f"and {tuple(shape)}"
        )
    sources = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if len(sources) not in (1, shape[0]):
        raise ValueError(f"generator must be one, or one for each of {shape[0]} paths")
    cell, size = length / cells, (2, cells, shape[0] // len(sources), *shape[1:])
    dtype = torch.float32 if like is None else like.dtype
    device = sources[0].device if like is None else like.device
    drawn = [torch.randn(size, generator=g, dtype=dtype, device=g.device) for g in sources]
    dw, dz = torch.cat(drawn, 2).to(device).mul_(math.sqrt(cell))
    w, integral = dw.new_zeros(2, cells + 1, *shape)
    torch.cumsum(dw, 0, out=w[1:])
    inside = dz.div_(math.sqrt(3.0)).add_(dw).div_(2).add_(w[:-1]).mul_(cell)
    torch.cumsum(inside, 0, out=integral[1:])
    return BrownianPath(w, integral, cell)


Func = Callable[[Tensor, Tensor], Tensor]


def _mix(ks: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    total = ks[0] * weights[0]
    for k, weight in zip(ks[1:], weights[1:]):
        total = total.add(k, alpha=weight)
    return total


def _mixes(ks: list[Tensor], rows: tuple[tuple[float, ...], ...]) -> Tensor:
    """Several mixtures of the same stages in one product."""
    stages = torch.stack(ks)
    return (stages.new_tensor(rows) @ stages.flatten(1)).view(len(rows), *ks[0].shape)


def _step(
    drift: Func,
    diffusion: Func,
    t: Tensor,
    h: Tensor,
    y: Tensor,
    noise: tuple[Tensor, Tensor],
    tolerances: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Next state, scaled error and stiffness of one step; a step of length zero changes nothing."""
    wide = h.view(-1, *[1] * (y.ndim - 1))
    safe = torch.where(wide > 0, wide, torch.ones_like(wide))
    root, (dw, area) = wide.sqrt(), noise
    chi_1 = (dw.square() - wide) / (2 * safe.sqrt())
    chi_2 = area / safe
    chi_3 = (dw.pow(3) - 3 * dw * wide) / (6 * safe)
    ks, gs, places = [drift(t, y)], [diffusion(t, y)], [y]
    for i in range(3):
        place = y.addcmul(wide, _mix(ks, A0[i])).addcmul(chi_2, _mix(gs, B0[i]))
        other = y.addcmul(wide, _mix(ks, A1[i])).addcmul(root, _mix(gs, B1[i]))
        ks.append(drift(t + C0[i + 1] * h, place))
        gs.append(diffusion(t + C1[i + 1] * h, other))
        places.append(place)
    ends = _mixes(gs, BETA)
    flow, whole = _mixes(ks, (ALPHA, (1.0,) * 4))
    second = (chi_2 * ends[2]).addcmul(chi_3, ends[3])
    z = y.addcmul(wide, flow).addcmul(dw, ends[0]).addcmul(chi_1, ends[1]) + second
    rtol, atol = tolerances
    scale = torch.maximum(y.abs(), z.abs()).mul(rtol).add(atol)
    error = row_norm(second.addcmul(wide, whole) / scale, True)
    # The last two drift stages stand at one time: their difference is the Jacobian at work.
    length = row_norm(places[3] - places[2], True)
    floor = ROUNDING * torch.finfo(y.dtype).eps * row_norm(z.detach(), True)
    floor = floor + torch.finfo(y.dtype).tiny
    slope = row_norm(ks[3] - ks[2], True) / torch.maximum(length, floor)
    return z, error, torch.where(length > floor, slope, torch.zeros_like(slope))


def sdeint_rows(
    drift: Func,
    diffusion: Func,
    y0: Tensor,
    path: BrownianPath,
    *,
    rtol: float = 0.1,
    atol: float = 0.1,
    max_steps: int = 10_000,
) -> ODESolution:
    r"""Solve $dy=f(t,y)\,dt+g(t,y)\,dW$ (Ito, diagonal noise), each row with steps of its own.

    $$q_j=\mathrm{RMS}\Big(\frac{h_j\sum_ik_i+E_2}{atol+rtol\max(|y_j|,|y_{j+1}|)}\Big),\qquad
    S_j=\frac{\|k_4-k_3\|}{\|H_4-H_3\|}$$

    with the drift stages $k_i=f(H_i)$ and the part $E_2$ of the step that only the higher order
    has. A step of one cell is accepted whatever its error: make the cells small enough.

    Args:
        drift: $f$; maps times `(r,)` and states `(r, ...)` to a tensor like the states.
        diffusion: $g$, one number an entry of the state.
        y0: states at time zero, `(r, ...)`.
        path: Brownian motions over the interval; row `i` uses path `i` modulo their number.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        max_steps: most rounds of steps.

    Returns:
        Solution with one column a row; `nfe` counts calls of `drift`, those of `diffusion` are one
        fewer.

    Raises:
        ValueError: tolerances not positive, or a path whose shape does not fit.
        RuntimeError: more than `max_steps` rounds, or a state that is not finite.

    Source: Roessler 2010; Rackauckas and Nie, "Stability-optimized high order methods and
        stiffness detection for pathwise stiff stochastic differential equations", 2020.

    Example:
        >>> path = brownian_path((1, 2), generator=torch.Generator().manual_seed(0), cells=512)
        >>> noise = lambda t, y: torch.ones_like(y)
        >>> run = sdeint_rows(lambda t, y: 0 * y, noise, torch.zeros(1, 2), path)
        >>> torch.allclose(run.y, path.values[-1], atol=1e-5)
        True
    """
    check_interval(rtol, atol, max_steps)
    cells, paths = len(path.values) - 1, path.values.shape[1]
    if y0.ndim < 2 or len(y0) % paths or y0.shape[1:] != path.values.shape[2:]:
        raise ValueError(
            f"path must have shape (cells + 1, paths, ...) for a state (rows, ...) with rows a "
            f"multiple of paths, got {tuple(path.values.shape)} and {tuple(y0.shape)}"
        )
    y, place = y0, torch.zeros(len(y0), dtype=torch.int64, device=y0.device)
    with torch.no_grad():  # the first term of the error is about four times the drift
        start = drift(y0.new_zeros(len(y0)), y0)
        guess = SAFETY / row_norm(4 * start / (atol + rtol * y0.abs()), True).clamp_min(1e-12)
    h, before = guess.to(y0.dtype), torch.full_like(guess, FIRST_ERROR)
    active, tried, accepted = place >= 0, place.clone(), place.clone()
    errors, stiffnesses, sizes = [], [], []
    for _ in range(max_steps):
        many = (h / path.cell).nan_to_num(1.0).clamp(1, cells).long()
        stop = torch.where(active, torch.minimum(place + many, torch.full_like(many, cells)), place)
        size = (stop - place).to(y.dtype) * path.cell
        time = place.to(y.dtype) * path.cell
        noise = path.between(place, stop)
        z, error, stiffness = _step(drift, diffusion, time, size, y, noise, (rtol, atol))
        q = error.detach()
        good = active & ((q <= 1.0) | (stop - place == 1))
        tried, accepted = tried + active, accepted + good
        errors.append(torch.where(good, error, torch.zeros_like(q)))
        stiffnesses.append(torch.where(good, stiffness, torch.zeros_like(q)))
        sizes.append(torch.where(good, size, torch.zeros_like(size)))
        safe = q.clamp_min(1e-10)
        up = (SAFETY * safe.pow(-POWER_1) * before.pow(POWER_2)).clamp(SHRINK, GROW)
        down = (SAFETY * safe.pow(-POWER_1)).nan_to_num(SHRINK).clamp(SHRINK, 1.0)
        h = torch.where(active, size * torch.where(good, up, down), h)
        h = torch.where(good & (up >= 1.0), torch.maximum(h, size + path.cell), h)
        before = torch.where(good, safe.clamp_min(FIRST_ERROR), before)
        place = torch.where(good, stop, place)
        failed, active = active & ~good, place < cells
        done, some_failed, lost = torch.stack(
            [~active.any(), failed.any(), (good & ~q.isfinite()).any()]
        ).tolist()
        if lost:
            raise RuntimeError("sdeint_rows: a state is not finite")
        y = torch.where(failed.view(-1, *[1] * (y.ndim - 1)), y, z) if some_failed else z
        if done:
            break
    else:
        raise RuntimeError(f"sdeint_rows did not reach the end within {max_steps} steps")
    return ODESolution(
        y,
        torch.stack(errors),
        torch.stack(stiffnesses),
        torch.stack(sizes),
        nfe=1 + 4 * tried,
        num_accepted=accepted,
        num_rejected=tried - accepted,
    )
