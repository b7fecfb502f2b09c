r"""CoLiDE: learning a linear DAG together with the size of its noise.

Seyed Saman Saboksayr, Gonzalo Mateos and Mariano Tepper. CoLiDE: Concomitant Linear DAG
Estimation. ICLR 2024. arXiv 2310.02895.

Dividing squared residuals by the estimated noise level makes one sparsity weight serve all noise
levels, and one level for each node copes with noise that differs between nodes:
$S(W,\sigma)=\sum_jq_j(W)/(2\sigma_j)+\frac12\sum_j\sigma_j+\lambda\lVert W\rVert_1$ with
$q_j(W)=[(I-W)^\top\hat C(I-W)]_{jj}$, minimized subject to $W$ being acyclic.

Departures from the paper: many problems are solved side by side, and finished ones leave the batch;
a stage's objective is compared from its second checkpoint on; the default schedule has a ten times
larger step and a tenth of the iterations; the floor $\sigma_0$ is applied (the authors' code leaves
it out). :func:`dagma` is the baseline in the same solver, with $\sigma=1$.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.ops.dag import (
    centered_samples,
    simulate_linear_sem,
    structural_hamming_distance,
    threshold_dag,
)

__all__ = [
    "ColideResult",
    "colide",
    "concomitant_score",
    "dagma",
    "logdet_acyclicity",
    "noise_scale",
    "simulate_linear_sem",
    "structural_hamming_distance",
    "threshold_dag",
]

FLOOR = 1e-2  # sigma_0, in units of the smallest standard deviation of a column
EPS = 1e-8  # of Adam
DOMAIN = -1e-6  # entries of the inverse below this mean: not an M-matrix
RESTART_BELOW = 0.9  # for s up to this, leaving the domain restarts the stage

Lambda = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class ColideResult:
    """Estimates for one problem, or for a batch of them."""

    weights: Tensor  # (..., d, d), as the solver left them: see threshold_dag
    scale: Tensor  # (...,) or (..., d), standard deviation of the noise
    num_iters: Tensor  # (...,) int64, Adam steps in all
    converged: Tensor  # (...,) bool, the last stage met `tol` before `max_iters`


def logdet_acyclicity(weights: Tensor, s: float = 1.0) -> Tensor:
    r"""Log-determinant measure of cycles.

    $$h(W,s)=d\log s-\log\det(sI-W\circ W),\qquad
    \nabla h=2W\circ(sI-W\circ W)^{-\top}$$

    Zero if and only if $W$ is a DAG, on the domain where $s$ exceeds the spectral radius of
    $W\circ W$.

    Args:
        weights: $W$, `(..., d, d)`.
        s: positive.

    Returns:
        `(...,)`; infinite where the determinant is not positive. Differentiable.

    Raises:
        ValueError: weights that are not square or not floating, `s` not positive.

    Source: Bello et al. 2022 (DAGMA); CoLiDE, acyclicity function.

    Example:
        >>> cycle = torch.tensor([[0.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
        >>> f"{logdet_acyclicity(cycle):.4f}"    # -log(1 - 0.25)
        '0.2877'
    """
    d = _check_weights(weights)
    if not 0 < s < math.inf:
        raise ValueError(f"s must be positive and finite, got {s}")
    eye = torch.eye(d, dtype=weights.dtype, device=weights.device)
    sign, logdet = torch.linalg.slogdet(s * eye - weights * weights)
    return torch.where(sign > 0, d * math.log(s) - logdet, math.inf)


def noise_scale(weights: Tensor, cov: Tensor, noise: str = "equal") -> Tensor:
    r"""Closed-form noise level of given weights.

    $$\hat\sigma=\sqrt{\tfrac1d\textstyle\sum_jq_j}\quad\text{or}\quad\hat\sigma_j=\sqrt{q_j},
    \qquad q_j=[(I-W)^\top\hat C(I-W)]_{jj}$$

    Args:
        weights: $W$, `(..., d, d)`.
        cov: $\hat C=X^\top X/n$, `(..., d, d)`.
        noise: "equal" (EV: one level) or "unequal" (NV: one a node).

    Returns:
        Standard deviations, `(...,)` or `(..., d)`, without the floor $\sigma_0$.

    Raises:
        ValueError: shapes that do not fit, an unknown `noise`.

    Source: CoLiDE-EV and CoLiDE-NV, updates of the noise level.

    Example:
        >>> cov = torch.diag(torch.tensor([1.0, 7.0]))
        >>> noise_scale(torch.zeros(2, 2), cov).item()      # (1 + 7) / 2 = 4
        2.0
    """
    _check_pair(weights, cov)
    _check_noise(noise)
    energy = _energy(weights, cov)
    return (energy.mean(-1) if noise == "equal" else energy).sqrt()


def concomitant_score(weights: Tensor, cov: Tensor, scale: Tensor) -> Tensor:
    r"""Score of weights and noise level, without the sparsity term.

    $$\frac1{2\sigma}\sum_jq_j+\frac{d\sigma}2\quad\text{or}\quad
    \sum_j\frac{q_j}{2\sigma_j}+\frac12\sum_j\sigma_j$$

    Jointly convex in $(W,\sigma)$.

    Args:
        weights: $W$, `(..., d, d)`.
        cov: $\hat C$, `(..., d, d)`.
        scale: positive; `(...,)` for one level (EV), `(..., d)` for one a node (NV).

    Returns:
        `(...,)`. Differentiable.

    Raises:
        ValueError: shapes that do not fit.

    Source: CoLiDE-EV and CoLiDE-NV, score functions.

    Example:
        >>> cov = torch.diag(torch.tensor([1.0, 7.0]))
        >>> concomitant_score(torch.zeros(2, 2), cov, torch.tensor(2.0)).item()   # d sigma
        4.0
    """
    _check_pair(weights, cov)
    batch, d = torch.broadcast_shapes(weights.shape[:-2], cov.shape[:-2]), weights.shape[-1]
    levels = scale if scale.ndim > len(batch) else scale[..., None].expand(*scale.shape, d)
    if scale.ndim not in (len(batch), len(batch) + 1) or levels.shape[-1] != d:
        shapes = f"{tuple(batch)} or {(*batch, d)}"
        raise ValueError(f"scale must have shape {shapes}, got {tuple(scale.shape)}")
    return (_energy(weights, cov) / levels + levels).sum(-1) / 2


def colide(
    x: Tensor,
    *,
    noise: str = "equal",
    lambda1: Lambda = 0.05,
    mu: Sequence[float] = (1.0, 0.1, 0.01, 0.001),
    s: Sequence[float] = (1.0, 0.9, 0.8, 0.7),
    warm_iters: int = 2000,
    max_iters: int = 7000,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.99, 0.999),
    tol: float = 1e-6,
    check_every: int = 200,
) -> ColideResult:
    r"""Learn linear DAGs and their noise levels, many problems side by side.

    Stage k minimizes $\mu_kS(W,\sigma)+h(W,s_k)$ from where the last one ended: one Adam step on
    $W$, then $\sigma$ in closed form, at least $\sigma_0$.

    Args:
        x: samples, `(n, d)` or `(b, n, d)`, rows are observations; centered in a copy.
        noise: "equal" (EV) or "unequal" (NV).
        lambda1: sparsity weight, at least 0; one, or one for each problem.
        mu: weights of the score, one a stage, positive.
        s: domain parameters, one a stage, positive.
        warm_iters: most steps of every stage but the last.
        max_iters: most steps of the last stage.
        lr: step size of Adam, positive.
        betas: decay of Adam's moments.
        tol: a stage ends when its objective changes by less, relatively, between checkpoints.
        check_every: steps between checkpoints.

    Returns:
        A :class:`ColideResult` in the dtype of `x`; the work is done in float64.

    Raises:
        ValueError: unknown `noise`, n < 2, lengths of `mu` and `s` that differ, entries of `x` that
            are not finite, a constant column, a number out of range.
        TypeError: `x` is not floating.

    Source: CoLiDE, sections on equal and unequal noise; the authors' code for the domain guard.

    Example:
        >>> cause = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        >>> noise = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
        >>> x = torch.stack([cause, 2 * cause + noise], dim=1)      # both noises have size 1
        >>> threshold_dag(colide(x).weights).round().tolist()
        [[0.0, 2.0], [0.0, 0.0]]
    """
    _check_noise(noise)
    schedule = _Schedule(mu, s, warm_iters, max_iters, lr, betas, tol, check_every)
    return _follow_path(x, noise, lambda1, schedule)


def dagma(
    x: Tensor,
    *,
    lambda1: Lambda = 0.05,
    mu: Sequence[float] = (1.0, 0.1, 0.01, 0.001),
    s: Sequence[float] = (1.0, 0.9, 0.8, 0.7),
    warm_iters: int = 2000,
    max_iters: int = 7000,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.99, 0.999),
    tol: float = 1e-6,
    check_every: int = 200,
) -> ColideResult:
    r"""DAGMA, the baseline: least squares $\frac12\sum_jq_j+\lambda\lVert W\rVert_1$, same solver.

    Args:
        x: samples, `(n, d)` or `(b, n, d)`.
        lambda1: sparsity weight, at least 0; one, or one for each problem.
        mu, s, warm_iters, max_iters, lr, betas, tol, check_every: see :func:`colide`.

    Returns:
        A :class:`ColideResult`; `scale` is the equal level that fits the residuals afterwards.

    Raises:
        ValueError, TypeError: see :func:`colide`.

    Source: Bello et al., "DAGMA", NeurIPS 2022, Algorithm 1.

    Example:
        >>> x = torch.tensor([[1.0, 3.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -3.0]])
        >>> threshold_dag(dagma(x).weights).round().tolist()
        [[0.0, 2.0], [0.0, 0.0]]
    """
    schedule = _Schedule(mu, s, warm_iters, max_iters, lr, betas, tol, check_every)
    return _follow_path(x, "none", lambda1, schedule)


@dataclass(frozen=True)
class _Schedule:
    """How the path is followed; the fields are the arguments of :func:`colide`."""

    mu: Sequence[float]
    s: Sequence[float]
    warm_iters: int
    max_iters: int
    lr: float
    betas: tuple[float, float]
    tol: float
    check_every: int

    def __post_init__(self) -> None:
        if len(self.mu) != len(self.s) or not self.mu:
            raise ValueError(
                f"mu and s must have one length of at least 1, got {len(self.mu)} and {len(self.s)}"
            )
        if not all(0 < v < math.inf for v in (*self.mu, *self.s, self.lr)):
            raise ValueError("mu, s and lr must be positive and finite")
        if min(self.warm_iters, self.max_iters, self.check_every) < 1:
            raise ValueError("warm_iters, max_iters and check_every must be at least 1")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if not self.tol >= 0:
            raise ValueError(f"tol must be at least 0, got {self.tol}")


@dataclass
class _Batch:
    """Problems that are still running in one stage, and where each of them stands."""

    where: Tensor  # (b,), position in the whole batch
    cov: Tensor  # (b, d, d)
    lam: Tensor  # (b, 1, 1), sparsity weight
    floor: Tensor  # (b, 1), sigma_0
    start: Tensor  # (b, d, d), weights at the start of the stage
    start_scale: Tensor  # (b, 1, 1) or (b, 1, d)
    weights: Tensor
    scale: Tensor
    first: Tensor  # Adam's moments
    second: Tensor
    step: Tensor  # last direction of Adam, which moved the weights by `rate` times it
    rest: Tensor  # C (I - W)
    s: Tensor  # (b, 1, 1)
    domain: Tensor  # (b, d, d), s I
    stage_lr: Tensor  # (b, 1, 1), halved by each restart
    lr: Tensor  # (b, 1, 1), halved by each step that is undone
    rate: Tensor  # (b, 1, 1), lr with Adam's corrections for its first steps
    born: Tensor  # (b,), iteration before the first of this attempt
    previous: Tensor  # (b,), objective at the last checkpoint

    def domain_matrix(self) -> Tensor:
        return torch.addcmul(self.domain, self.weights, self.weights, value=-1.0)  # sI - W o W

    def keep(self, mask: Tensor) -> None:
        """Drop the other problems, in place."""
        for name, value in vars(self).items():
            setattr(self, name, value[mask])


def _residual(cov: Tensor, weights: Tensor) -> Tensor:
    return torch.baddbmm(cov, cov, weights, alpha=-1)  # C (I - W)


def _scale(weights: Tensor, rest: Tensor, floor: Tensor, noise: str) -> Tensor:
    r"""$\hat\sigma$ from $C(I-W)$, ready to divide columns: `(b, 1, 1)` or `(b, 1, d)`."""
    if noise == "none":
        return torch.ones_like(floor)[:, None]
    # q_j = (column j of I - W) . (column j of C (I - W))
    energy = rest.diagonal(dim1=-2, dim2=-1) - (weights * rest).sum(-2)
    if noise == "equal":
        energy = energy.mean(-1, keepdim=True)
    return torch.maximum(energy, floor * floor).sqrt()[:, None]


def _follow_path(x: Tensor, noise: str, lambda1: Lambda, schedule: _Schedule) -> ColideResult:
    cov = _covariance(x)
    b = len(cov)
    lam = torch.as_tensor(lambda1, dtype=cov.dtype, device=cov.device).detach()
    if lam.shape not in ((), (b,)) or not bool(((lam >= 0) & (lam < math.inf)).all()):
        raise ValueError(f"lambda1 must be one finite number >= 0, or {b} of them, got {lambda1}")
    lam = lam.expand(b)[:, None, None]
    std = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    floor = FLOOR * std.amin(-1, keepdim=True)
    scale = {"equal": std.amin(-1, keepdim=True), "unequal": std}.get(noise, torch.ones_like(floor))
    state = torch.zeros_like(cov), scale[:, None]
    num_iters = torch.zeros(b, dtype=torch.int64, device=cov.device)
    converged = torch.zeros(b, dtype=torch.bool, device=cov.device)
    for k, (mu, s) in enumerate(zip(schedule.mu, schedule.s)):
        last = k == len(schedule.mu) - 1
        most = schedule.max_iters if last else schedule.warm_iters
        state, steps, converged = _stage(
            cov, lam, floor, state, noise=noise, mu=mu, s=s, most=most, schedule=schedule
        )
        num_iters += steps
    weights, scale = state[0], state[1][:, 0]
    if noise == "none":
        scale = _scale(weights, _residual(cov, weights), floor, "equal")[:, 0]
    if noise != "unequal":
        scale = scale[:, 0]
    found = weights.to(x.dtype), scale.to(x.dtype), num_iters, converged
    return ColideResult(*(found if x.ndim == 3 else (t[0] for t in found)))


def _stage(
    cov: Tensor,
    lam: Tensor,
    floor: Tensor,
    start: tuple[Tensor, Tensor],
    *,
    noise: str,
    mu: float,
    s: float,
    most: int,
    schedule: _Schedule,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """One value of mu, from `start`: the new weights and scales, steps taken, and who converged."""
    weights, scale = start[0].clone(), start[1].clone()
    count = torch.zeros(len(cov), device=cov.device).long()
    one, eye = torch.ones_like(lam), torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    now = _Batch(
        where=torch.arange(len(cov), device=cov.device), cov=cov, lam=lam, floor=floor,
        start=start[0], start_scale=start[1], weights=start[0].clone(), scale=start[1],
        first=torch.zeros_like(cov), second=torch.zeros_like(cov), step=torch.zeros_like(cov),
        rest=_residual(cov, weights), s=s * one, domain=s * one * eye, stage_lr=schedule.lr * one,
        lr=schedule.lr * one, rate=one, born=count, previous=torch.full_like(floor[:, 0], math.inf),
    )  # fmt: skip
    total, converged = count.clone(), count.bool()
    k, births = 0, {0}
    while True:
        inverse = torch.linalg.inv_ex(now.domain_matrix()).inverse
        # The one look at the data in a step; a NaN (a singular matrix) is out of the domain too.
        if not bool(inverse.amin() >= DOMAIN):
            inverse, restarted = _return_to_domain(now, inverse, k, eye, noise)
            births = births | {k} if restarted else births
        k += 1
        age = float(k) if births == {0} else (k - now.born)[:, None, None].to(cov.dtype)
        _step(now, inverse, age, mu, noise, schedule.betas)
        if not any((k - a) % schedule.check_every == 0 or k - a == most for a in births):
            continue
        stopped, ended = _checkpoint(now, k, eye, mu, most, noise, schedule)
        if bool(ended.any()):
            place = now.where[ended]
            weights[place], scale[place] = now.weights[ended], now.scale[ended]
            total[place], converged[place] = k - now.born[ended], stopped[ended]
            now.keep(~ended)
            births = set(now.born.tolist())
            if not births:
                return (weights, scale), total, converged


def _step(
    now: _Batch,
    inverse: Tensor,
    age: float | Tensor,
    mu: float,
    noise: str,
    betas: tuple[float, float],
) -> None:
    """One step of Adam on the weights, then the noise levels in closed form."""
    grad = torch.addcmul(now.rest / (now.scale / -mu), now.weights.sign(), mu * now.lam)
    grad.addcmul_(now.weights, inverse.mT, value=2.0)
    now.first.lerp_(grad, 1 - betas[0])
    now.second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), with the corrections taken out of the root
    bias = (1 - betas[1] ** age) ** 0.5
    now.step = now.first / now.second.sqrt().add_(EPS * bias)
    now.rate = now.lr * (bias / (1 - betas[0] ** age))
    now.weights.addcmul_(now.step, now.rate, value=-1.0)
    now.rest = _residual(now.cov, now.weights)
    now.scale = _scale(now.weights, now.rest, now.floor, noise)


def _checkpoint(
    now: _Batch, k: int, eye: Tensor, mu: float, most: int, noise: str, schedule: _Schedule
) -> tuple[Tensor, Tensor]:
    """Compare objectives: which problems meet the tolerance, and which end for any reason."""
    age = k - now.born
    due = (age % schedule.check_every == 0) | (age == most)
    energy = (now.weights.neg() + eye).mul(now.rest).sum(-2, keepdim=True)
    levels = 0.0 if noise == "none" else now.scale
    fit = (energy / now.scale + levels).sum((-2, -1)) / 2  # an equal level counts d times
    sparse = (now.lam * now.weights.abs()).sum((-2, -1))
    logdet = torch.linalg.slogdet(now.domain_matrix()).logabsdet
    h = len(eye) * now.s[:, 0, 0].log() - logdet
    value = mu * (fit + sparse) + h
    # Not at the first checkpoint: |inf - f| <= tol * inf is true.
    change = (now.previous - value).abs() <= schedule.tol * now.previous.abs()
    stopped = due & change & now.previous.isfinite()
    now.previous = torch.where(due, value, now.previous)
    return stopped, stopped | (due & (age >= most)) | (now.lr <= 1e-16)[:, 0, 0]


def _return_to_domain(
    now: _Batch, inverse: Tensor, k: int, eye: Tensor, noise: str
) -> tuple[Tensor, bool]:
    """Bring back problems whose `sI - W o W` is no M-matrix; did any of them start its stage anew?

    At the first step of an attempt, or for small s, the attempt starts again with half its step
    size and s + 0.1; otherwise the last step is halved until it stays inside.
    """
    restarted = False
    while True:
        bad = ~(inverse.amin((-2, -1)) >= DOMAIN) & (now.lr > 1e-16)[:, 0, 0]
        if not bool(bad.any()):
            return inverse.nan_to_num(0.0), restarted
        anew = bad & ((now.born == k) | (now.s[:, 0, 0] <= RESTART_BELOW))
        back = (bad & ~anew)[:, None, None]
        now.rate = torch.where(back, now.rate / 2, now.rate)
        now.lr = torch.where(back, now.lr / 2, now.lr)
        now.weights = now.weights + torch.where(back, now.rate * now.step, 0.0)
        fresh = anew[:, None, None]
        now.stage_lr = torch.where(fresh, now.stage_lr / 2, now.stage_lr)
        now.lr = torch.where(fresh, now.stage_lr, now.lr)
        now.s = torch.where(fresh, now.s + 0.1, now.s)
        now.domain = now.s * eye
        now.weights = torch.where(fresh, now.start, now.weights)
        now.first, now.second = (torch.where(fresh, 0.0, m) for m in (now.first, now.second))
        now.born = torch.where(anew, k, now.born)
        now.previous = torch.where(anew, math.inf, now.previous)
        restarted |= bool(anew.any())
        now.rest = _residual(now.cov, now.weights)
        scale = _scale(now.weights, now.rest, now.floor, noise)
        now.scale = torch.where(back, scale, torch.where(fresh, now.start_scale, now.scale))
        inverse = torch.linalg.inv_ex(now.domain_matrix()).inverse


def _energy(weights: Tensor, cov: Tensor) -> Tensor:
    """Residual energy of every node, `(..., d)`."""
    eye = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    rest = eye - weights
    return (rest * (cov @ rest)).sum(-2).clamp_min(0.0)


def _covariance(x: Tensor) -> Tensor:
    """Second moments of the centered samples, `(b, d, d)`, float64."""
    samples = centered_samples(x)
    cov = samples.mT @ samples / samples.shape[-2]
    if not bool((cov.diagonal(dim1=-2, dim2=-1) > 0).all()):
        raise ValueError("x must not have a constant column")
    return cov


def _check_noise(noise: str) -> None:
    if noise not in ("equal", "unequal"):
        raise ValueError(f"noise must be 'equal' or 'unequal', got {noise!r}")


def _check_weights(weights: Tensor) -> int:
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must have shape (..., d, d), got {tuple(weights.shape)}")
    if not weights.is_floating_point():
        raise ValueError(f"weights must be floating, got {weights.dtype}")
    return weights.shape[-1]


def _check_pair(weights: Tensor, cov: Tensor) -> None:
    d = _check_weights(weights)
    if cov.ndim < 2 or cov.shape[-2:] != (d, d):
        raise ValueError(f"cov must have shape (..., {d}, {d}), got {tuple(cov.shape)}")
