r"""Perturbation analysis of neural collapse: a model that stays near given features.

Tom Tirer, Haoxiang Huang and Jonathan Niles-Weed, "Perturbation Analysis of Neural Collapse",
ICML 2023, arXiv 2210.16658.

Claim: features that may only move a little from given ones still move toward collapse, and the
regularization of the features decides how far. With features $h_{k,i}$ as rows of $H$ $(N,d)$,
$N=Kn$, one-hot labels $Y$ and head $W$ $(K,d)$ the model minimizes (the paper's Eq. 2, transposed)

$$f=\frac1{2Kn}\|HW^\top-Y\|^2+\frac{\lambda_W}{2K}\|W\|^2+\frac{\lambda_H}{2Kn}\|H\|^2
+\frac\beta{2Kn}\|H-H_0\|^2 .$$

Departures from the paper: features are rows, not columns; the complete spectrum without
approximation in $1/\beta$ (:func:`block_spectrum`) and :func:`joint_flow` are ours. Formulas follow
the openly reviewed version; its appendices were not at hand.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from wellposed.ops.collapse import CollapseMetrics, balanced_one_hot, collapse_metrics
from wellposed.ops.ode import odeint

__all__ = [
    "BlockSpectrum",
    "CollapseMetrics",
    "JointPath",
    "ProximalFeatures",
    "block_spectrum",
    "central_path_flow",
    "central_path_velocity",
    "collapse_metrics",
    "feature_sensitivity",
    "joint_flow",
    "optimal_classifier",
    "orthogonal_frame",
    "proximal_features",
]


@dataclass(frozen=True)
class ProximalFeatures:
    """A stationary point of the model."""

    features: Tensor  # (..., N, d)
    classifier: Tensor  # (..., K, d), optimal for these features
    iterations: int
    converged: bool


@dataclass(frozen=True)
class JointPath:
    """The path of :func:`joint_flow`."""

    features: Tensor  # (T, ..., N, d)
    classifier: Tensor  # (T, ..., K, d)


@dataclass(frozen=True)
class BlockSpectrum:
    """Singular values of the blocks of the sensitivity at a collapsed point."""

    diagonal: Tensor  # (n d,), falling
    off_diagonal: Tensor  # 0-d, the only one that is not zero


def optimal_classifier(features: Tensor, labels: Tensor, weight_reg: float) -> Tensor:
    r"""The best head for given features, $W^*(H)=Y^\top H(H^\top H+n\lambda_WI)^{-1}$.

    Args:
        features: $H$, `(..., N, d)`.
        labels: `(N,)`, balanced.
        weight_reg: $\lambda_W$, positive.

    Returns:
        $W^*$, `(..., K, d)`.

    Raises:
        ValueError: shapes, labels, values or weights out of range.

    Source: Tirer et al. 2023, Section 3.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [0.0, 1.0]])     # H'H = I, n = 1: half of Y'H
        >>> optimal_classifier(h, torch.tensor([0, 1]), 1.0).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    one_hot = balanced_one_hot(features, labels)
    _check_regs(weight_reg)
    return _head(features, one_hot, weight_reg)


def _head(h: Tensor, one_hot: Tensor, weight_reg: float) -> Tensor:
    ridge = len(one_hot) // one_hot.shape[1] * weight_reg
    gram = h.mT @ h
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    solved, info = torch.linalg.solve_ex(gram, h.mT @ one_hot)
    if info.any():  # rounding has eaten the ridge
        u, s, vh = torch.linalg.svd(h, full_matrices=False)
        s = s * (s > len(one_hot) * torch.finfo(s.dtype).eps * s.amax(-1, keepdim=True))
        solved = vh.mT @ ((s / (s.square() + ridge))[..., None] * (u.mT @ one_hot))
    head: Tensor = solved.mT
    return head


def _velocity(h: Tensor, one_hot: Tensor, head: Tensor, feature_reg: float) -> Tensor:
    return (one_hot - h @ head.mT) @ head - feature_reg * h


def central_path_velocity(
    features: Tensor, labels: Tensor, weight_reg: float, feature_reg: float
) -> Tensor:
    r"""Velocity of the features when the head is always optimal.

    $\dot h_{k,i}=-W^{*\top}(W^*h_{k,i}-y_k)-\lambda_Hh_{k,i}=-Kn\nabla\mathcal L(H)$, where
    $\mathcal L(H)=\min_Wf$ without the last term.

    Args:
        features: $H$, `(..., N, d)`.
        labels: `(N,)`, balanced.
        weight_reg: $\lambda_W$, positive.
        feature_reg: $\lambda_H$, at least 0.

    Returns:
        $\dot H$, like `features`.

    Raises:
        ValueError: shapes, labels, values or weights out of range.

    Source: Tirer et al. 2023, Eq. 4.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [0.0, 1.0]])     # W* = I / 2: 1/2 (1 - 1/2) - 1/8
        >>> central_path_velocity(h, torch.tensor([0, 1]), 1.0, 0.125)[0, 0].item()
        0.125
    """
    one_hot = balanced_one_hot(features, labels)
    _check_regs(weight_reg, feature_reg)
    return _velocity(features, one_hot, _head(features, one_hot, weight_reg), feature_reg)


def central_path_flow(
    features: Tensor,
    labels: Tensor,
    weight_reg: float,
    feature_reg: float,
    times: Sequence[float],
) -> Tensor:
    r"""Integrate the gradient flow on the central path, $\dot H=-Kn\nabla\mathcal L(H)$.

    Args:
        features: $H$ at time 0, `(..., N, d)`; a batch shares its step sizes.
        labels: `(N,)`, balanced.
        weight_reg: $\lambda_W$, positive.
        feature_reg: $\lambda_H$, at least 0.
        times: $T$ increasing times, the first at least 0.

    Returns:
        $H$ at these times, `(T, ..., N, d)`.

    Raises:
        ValueError: shapes, labels, values, weights or times out of range.
        RuntimeError: the flow is too stiff, as for huge features.

    Source: Tirer et al. 2023, Eq. 4 and Theorem 3.1.

    Example:
        >>> h = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
        >>> path = central_path_flow(h, torch.tensor([0, 1]), 1e9, 2.0, [0.0, 0.5])
        >>> round(path[1, 0, 0].item(), 6)     # the head is off, so e^(-1)
        0.367879
    """
    one_hot = balanced_one_hot(features, labels)
    _check_regs(weight_reg, feature_reg)

    def velocity(h: Tensor) -> Tensor:
        return _velocity(h, one_hot, _head(h, one_hot, weight_reg), feature_reg)

    return _integrate(velocity, features, times)


def _integrate(
    velocity: Callable[[Tensor], Tensor], start: Tensor, times: Sequence[float]
) -> Tensor:
    marks = [float(t) for t in times]
    if not marks or not all(a < b for a, b in pairwise([-math.ulp(0.0), *marks, math.inf])):
        raise ValueError(f"times must increase, be finite and at least 0, got {marks}")
    tol = 1e-9 if start.dtype == torch.float64 else 1e-5
    now, state, path = 0.0, start, []
    for mark in marks:
        if mark > now:
            state = odeint(lambda _, h: velocity(h), state, (now, mark), rtol=tol, atol=tol).y
        now = mark
        path.append(state)
    return torch.stack(path)


def joint_flow(
    features: Tensor,
    classifier: Tensor,
    labels: Tensor,
    weight_reg: float,
    feature_reg: float,
    times: Sequence[float],
    *,
    head_rate: float = 1.0,
) -> JointPath:
    r"""Gradient flow of features and head together, $(\dot H,\dot W)=-Kn(\nabla_Hf,r\nabla_Wf)$.

    As $r\to\infty$ the head is always optimal, which is the central path.

    Args:
        features: $H$ at time 0, `(..., N, d)`.
        classifier: $W$ at time 0, `(..., K, d)`.
        labels: `(N,)`, balanced.
        weight_reg: $\lambda_W$, positive.
        feature_reg: $\lambda_H$, at least 0.
        times: $T$ increasing times, the first at least 0.
        head_rate: $r$, positive, the speed of the head.

    Returns:
        Both at these times.

    Raises:
        ValueError: shapes, labels, values, weights or times out of range.
        RuntimeError: the flow is too stiff, as for huge features.

    Source: ours; the paper overlooks the difference between the two flows on purpose.

    Example:
        >>> h, w = torch.eye(2).double(), torch.zeros(2, 2).double()
        >>> path = joint_flow(h, w, torch.tensor([0, 1]), 1.0, 1.0, [0.0, 1e-3])
        >>> round(path.classifier[1, 0, 0].item(), 4)     # W' = Y'H = I at the start
        0.001
    """
    one_hot = balanced_one_hot(features, labels)
    _check_head(features, classifier, one_hot)
    _check_regs(weight_reg, feature_reg)
    if not 0 < head_rate < math.inf:
        raise ValueError(f"head_rate must be positive and finite, got {head_rate}")
    count = len(labels)
    ridge = count // one_hot.shape[1] * weight_reg

    def velocity(state: Tensor) -> Tensor:
        h, w = state[..., :count, :], state[..., count:, :]
        turn = (one_hot - h @ w.mT).mT @ h - ridge * w
        return torch.cat([_velocity(h, one_hot, w, feature_reg), head_rate * turn], -2)

    path = _integrate(velocity, torch.cat([features, classifier], -2), times)
    return JointPath(path[..., :count, :], path[..., count:, :])


def proximal_features(
    initial_features: Tensor,
    labels: Tensor,
    weight_reg: float,
    feature_reg: float,
    beta: float,
    *,
    tol: float | None = None,
    max_iter: int = 100_000,
) -> ProximalFeatures:
    r"""Minimize $f(W,H;H_0)$ by exact updates of head and features in turn, from $H=H_0$.

    $W\leftarrow W^*(H)$, $H\leftarrow(YW+\beta H_0)(W^\top W+(\lambda_H+\beta)I)^{-1}$. A fixed
    point is a stationary point of $f$; each update lowers $f$.

    Args:
        initial_features: $H_0$, `(..., N, d)`.
        labels: `(N,)`, balanced.
        weight_reg: $\lambda_W$, positive.
        feature_reg: $\lambda_H$, at least 0.
        beta: $\beta$, positive; large allows little change.
        tol: largest change of an entry in the last update; by default 1e-10, in float32 1e-5
            times the largest entry.
        max_iter: most updates.

    Returns:
        :class:`ProximalFeatures`; if not `converged`, there was a RuntimeWarning.

    Raises:
        ValueError: shapes, labels, values or weights out of range.

    Source: Tirer et al. 2023, Eq. 2; the solver is ours.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
        >>> found = proximal_features(h, torch.tensor([0, 1]), 0.25, 0.25, 1.0)
        >>> f = found.features[0, 0].item()     # rho = (1 - 1/4) sqrt(1) = 0.75, drawn to 1
        >>> 0.75**0.5 < f < 1, found.converged
        (True, True)
    """
    one_hot = balanced_one_hot(initial_features, labels)
    _check_regs(weight_reg, feature_reg)
    _check_beta(beta)
    if tol is None:
        largest = initial_features.detach().abs().max().item()
        tol = 1e-10 if initial_features.dtype == torch.float64 else 1e-5 * max(largest, 1.0)
    if not (tol > 0 and max_iter >= 1):
        raise ValueError(f"tol and max_iter must be positive, got {tol} and {max_iter}")
    h, converged, iterations = initial_features, False, 0
    while not converged and iterations < max_iter:
        w = _head(h, one_hot, weight_reg)
        gram = w.mT @ w
        gram.diagonal(dim1=-2, dim2=-1).add_(feature_reg + beta)
        pull = one_hot @ w + beta * initial_features
        updated = torch.linalg.solve(gram, pull.mT).mT
        iterations += 1
        if iterations % 10 == 0 or iterations == max_iter:  # one look in ten updates
            converged = bool((updated - h).detach().abs().max() < tol)
        h = updated
    if not converged:
        warnings.warn(f"features not converged after {max_iter} updates", RuntimeWarning, 2)
    return ProximalFeatures(h, _head(h, one_hot, weight_reg), iterations, converged)


def orthogonal_frame(
    num_classes: int,
    per_class: int,
    in_features: int,
    weight_reg: float,
    feature_reg: float,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""A random collapsed minimizer of the unconstrained model ($\beta=0$).

    $\bar H=\sqrt\rho R$ with orthonormal rows $R$, $\rho=(1-c)\sqrt{\lambda_W/\lambda_H}$,
    $c=\sqrt{\lambda_H\lambda_W}$, and $W=\sqrt{\lambda_H/\lambda_W}\,\bar H$.

    Args:
        num_classes, per_class: $K$ and $n$, positive.
        in_features: $d$, at least $K$.
        weight_reg, feature_reg: $\lambda_W$ and $\lambda_H$, positive, with a product below 1.
        generator: source of $R$.
        dtype, device: of the result.

    Returns:
        Features `(K n, d)`, labels `(K n,)` in ascending order, classifier `(K, d)`.

    Raises:
        ValueError: a number out of range.

    Source: Tirer et al. 2023, Theorem 2.1.

    Example:
        >>> h, y, w = orthogonal_frame(2, 3, 4, 0.25, 0.25)
        >>> round(h[0].square().sum().item(), 6), round((w[0] @ h[0]).item(), 6)
        (0.75, 0.75)
    """
    _check_frame(num_classes, per_class, in_features, weight_reg, feature_reg)
    draw = torch.randn(in_features, num_classes, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(draw)[0].mT
    c = math.sqrt(weight_reg * feature_reg)
    means = math.sqrt((1 - c) * math.sqrt(weight_reg / feature_reg)) * rows
    head = math.sqrt(feature_reg / weight_reg) * means
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    return means[labels].to(device, dtype), labels.to(device), head.to(device, dtype)


def feature_sensitivity(
    features: Tensor,
    labels: Tensor,
    classifier: Tensor,
    weight_reg: float,
    feature_reg: float,
    beta: float,
) -> Tensor:
    r"""First-order change of the minimizer with $H_0$: $\mathrm{vec}\,\delta H\approx
    F\,\mathrm{vec}\,\delta H_0$.

    $F=\frac\beta{Kn}(\mathcal H_{HH}-\mathcal H_{HW}\mathcal H_{WW}^{-1}\mathcal H_{WH})^{-1}$
    with the blocks of the Hessian of $f$.

    Args:
        features: $H$, `(N, d)`, of a stationary point of $f$.
        labels: `(N,)`, balanced.
        classifier: $W$, `(K, d)`, of the same point.
        weight_reg: $\lambda_W$, positive.
        feature_reg: $\lambda_H$, at least 0.
        beta: $\beta$, positive.

    Returns:
        $F$, `(N d, N d)`, for features flattened row by row. It is dense: keep $Nd$ below 10,000.

    Raises:
        ValueError: shapes, labels, values or weights out of range.

    Source: Tirer et al. 2023, Theorem 4.1.

    Example:
        >>> h, y, w = orthogonal_frame(2, 2, 3, 0.25, 0.25)
        >>> f = feature_sensitivity(h, y, w, 0.25, 0.25, 9.0)
        >>> round(torch.linalg.svdvals(f[:6, :6])[-1].item(), 6)     # 9 / (9 + 1)
        0.9
    """
    one_hot = balanced_one_hot(features, labels)
    _check_head(features, classifier, one_hot)
    _check_regs(weight_reg, feature_reg)
    if features.ndim != 2:
        raise ValueError(f"features must be (N, d), got {tuple(features.shape)}")
    _check_beta(beta)
    h, w = features, classifier
    (n, d), k = h.shape, w.shape[0]
    eye = lambda size: torch.eye(size, dtype=h.dtype, device=h.device)  # noqa: E731
    # All blocks are multiplied by K n. Rows of `cross` are entries of W, columns those of H.
    error = h @ w.mT - one_hot
    cross = torch.einsum("ka,ib->kbia", w, h) + torch.einsum("ik,ab->kbia", error, eye(d))
    cross = cross.reshape(k, d, n * d)
    ridge = h.mT @ h + n // k * weight_reg * eye(d)
    coupling = cross.reshape(k * d, -1).mT @ torch.linalg.solve(ridge, cross).reshape(k * d, -1)
    alone = torch.kron(eye(n), w.mT @ w + (feature_reg + beta) * eye(d))
    inverse: Tensor = torch.linalg.inv(alone - coupling)
    return beta * inverse


def block_spectrum(
    num_classes: int,
    per_class: int,
    in_features: int,
    weight_reg: float,
    feature_reg: float,
    beta: float,
) -> BlockSpectrum:
    r"""Singular values of the $(nd,nd)$ blocks of $F$ at a collapsed $H_0$, for every $\beta$.

    With $r=\sqrt{\lambda_H/\lambda_W}$ and $q=4\lambda_H(1-c)$ a diagonal block has
    1 ($d-K$ times), $1-\frac q{2(\beta+q)}$ ($K-1$ times), $\frac\beta{\beta+q}$ (once),
    $\frac\beta{\beta+\lambda_H}$ ($(n-1)(d-K)$ times) and $\frac\beta{\beta+r}$ ($(n-1)K$ times);
    another block has only $\frac q{2(\beta+q)}$. To first order in $1/\beta$ the extreme ones are
    those of the paper: 1, $1-r/\beta$ and $2\lambda_H(1-c)/\beta$.

    Args:
        num_classes, per_class, in_features: $K$, $n$ and $d\ge K$.
        weight_reg, feature_reg: $\lambda_W$ and $\lambda_H$, positive, with a product below 1.
        beta: $\beta$, positive.

    Returns:
        :class:`BlockSpectrum` in float64.

    Raises:
        ValueError: a number out of range.

    Source: ours; its first order is Tirer et al. 2023, Theorem 4.2.

    Example:
        >>> found = block_spectrum(2, 2, 3, 0.25, 0.25, 9.0)     # r = 1, q = 0.75
        >>> round(found.diagonal[-1].item(), 6), round(9.75 * found.off_diagonal.item(), 6)
        (0.9, 0.375)
    """
    _check_frame(num_classes, per_class, in_features, weight_reg, feature_reg)
    _check_beta(beta)
    k, n, free = num_classes, per_class, in_features - num_classes
    c = math.sqrt(weight_reg * feature_reg)
    r, q = math.sqrt(feature_reg / weight_reg), 4 * feature_reg * (1 - c)
    cross = q / (2 * (beta + q))
    values = [1.0] * free + [1 - cross] * (k - 1) + [beta / (beta + q)]
    values += [beta / (beta + feature_reg)] * ((n - 1) * free)
    values += [beta / (beta + r)] * ((n - 1) * k)
    diagonal = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    # A single class has no other one to disturb.
    return BlockSpectrum(diagonal, diagonal.new_tensor(cross if k > 1 else 0.0))


def _check_head(features: Tensor, classifier: Tensor, one_hot: Tensor) -> None:
    expected = (*features.shape[:-2], one_hot.shape[1], features.shape[-1])
    found = tuple(classifier.shape)
    if found != expected or classifier.dtype != features.dtype:
        raise ValueError(f"classifier must have shape {expected} and the features' dtype: {found}")


def _check_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")


def _check_regs(weight_reg: float, feature_reg: float = 0.0) -> None:
    if not 0 < weight_reg < math.inf:
        raise ValueError(f"weight_reg must be positive and finite, got {weight_reg}")
    if not 0 <= feature_reg < math.inf:
        raise ValueError(f"feature_reg must be finite and at least 0, got {feature_reg}")


def _check_frame(
    num_classes: int, per_class: int, in_features: int, weight_reg: float, feature_reg: float
) -> None:
    _check_regs(weight_reg, feature_reg)
    if not 1 <= num_classes <= in_features or per_class < 1:
        raise ValueError(
            "num_classes and per_class must be positive and in_features at least num_classes, got "
            f"{num_classes}, {per_class} and {in_features}"
        )
    if feature_reg == 0 or weight_reg * feature_reg >= 1:
        raise ValueError(
            "feature_reg must be positive and weight_reg * feature_reg below 1, got "
            f"{weight_reg} and {feature_reg}"
        )
