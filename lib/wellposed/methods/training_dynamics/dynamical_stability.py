r"""Dynamical stability of SGD: which interpolating minima a learning rate can hold.

Lei Wu and Weijie J. Su, "The Implicit Regularization of Dynamical Stability in Stochastic Gradient
Descent", ICML 2023, arXiv 2305.17490.

Claim: SGD holds a minimum only if the trace of the Hessian is at most $2/\eta$, gradient descent if
its largest eigenvalue is; in the networks below the trace controls a norm of the function.

With $L(\theta)=\frac1{2n}\sum_i(f(x_i;\theta)-y_i)^2$, zero residuals, $g_i=\nabla_\theta f(x_i)$
and $G=\frac1n\sum_ig_ig_i^\top$, the second moment $M=E[\delta\delta^\top]$ of a small deviation
obeys, for batches of $B$ drawn with replacement,

$$M'=(I-\eta G)M(I-\eta G)+\tfrac{\eta^2}B\Bigl(\tfrac1n\sum_i(g_i^\top Mg_i)\,g_ig_i^\top-GMG
\Bigr).$$

Departures from the paper: a constant rate, with no decaying tail; the exact critical rate and
batches of more than one example are derived here. The set-up is partly second-hand, see the card.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from wellposed.ops.hessian import lanczos, per_sample_jacobian
from wellposed.ops.numerics import unit_of, warn_of_nan

__all__ = [
    "DiagonalLinearNet",
    "Runs",
    "Sharpness",
    "TrainingResult",
    "TwoLayerReLU",
    "critical_learning_rate",
    "path_norm",
    "per_sample_jacobian",
    "second_moment_step",
    "sharpness",
    "train_runs",
    "train_to_interpolation",
]

CHUNK = 1000  # steps whose batches are drawn at once

Parameters = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sharpness:
    """Three sizes of $G$, 0-d each; trace >= frobenius >= spectral."""

    trace: Tensor
    frobenius: Tensor
    spectral: Tensor


@dataclass(frozen=True)
class TrainingResult:
    """How :func:`train_to_interpolation` ended."""

    loss: Tensor  # 0-d, over all examples
    steps: int
    converged: bool  # every residual at most the tolerance


@dataclass(frozen=True)
class Runs:
    """What :func:`train_runs` returns; `(s, k)` are the runs."""

    parameters: Parameters  # each (s, k, ...)
    loss: Tensor  # (s, k), over all examples
    converged: Tensor  # (s, k), bool: every residual at most the tolerance
    curve: Tensor  # (t, s, k), the loss at `steps`
    steps: list[int]  # of the curve


def sharpness(jacobian: Tensor) -> Sharpness:
    r"""Trace, Frobenius norm and largest eigenvalue of $G=\frac1nJ^\top J$.

    Args:
        jacobian: $J$, `(n, p)`, the gradient of each prediction; floating, finite.

    Returns:
        Three 0-d tensors, by the smaller of $J^\top J$ and $JJ^\top$.

    Raises:
        ValueError: `jacobian` is not 2-D, empty or not finite.

    Source: Wu and Su 2023, the sharpness measures of linear stability.

    Example:
        >>> found = sharpness(torch.diag(torch.tensor([2.0, 4.0])))     # G = diag(2, 8)
        >>> found.trace.item(), found.spectral.item()
        (10.0, 8.0)
    """
    gram = _gram(jacobian)
    return Sharpness(gram.trace(), gram.norm(), torch.linalg.eigvalsh(gram)[-1])


def second_moment_step(
    moment: Tensor, jacobian: Tensor, lr: float, batch_size: int | None = 1
) -> Tensor:
    r"""One step of linearized SGD, exactly in the second moment $M=E[\delta\delta^\top]$.

    $$M'=(I-\eta G)M(I-\eta G)+\tfrac{\eta^2}B\bigl(\mathcal A(M)-GMG\bigr),\qquad
    \mathcal A(M)=\tfrac1n\sum_i(g_i^\top Mg_i)\,g_ig_i^\top$$

    Args:
        moment: $M$, `(p, p)`, symmetric.
        jacobian: $J$ with rows $g_i$, `(n, p)`.
        lr: $\eta$, positive.
        batch_size: $B$, at least 1, drawn with replacement; None for the full batch (no noise).

    Returns:
        $M'$, `(p, p)`; a RuntimeWarning where it overflows.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a number out of range.

    Source: Wu and Su 2023, linear stability; batches are our derivation.

    Example:
        >>> eye = torch.eye(1)     # one example, g = 1: the deviation shrinks by 1 - lr
        >>> second_moment_step(eye, eye, 0.5).item()
        0.25
    """
    _check_jacobian(jacobian)
    _check_positive(lr=lr, batch_size=batch_size)
    n, p = jacobian.shape
    if moment.shape != (p, p):
        raise ValueError(f"moment must have shape ({p}, {p}), got {tuple(moment.shape)}")
    g = jacobian.T @ jacobian / n
    shrink = torch.eye(p, dtype=g.dtype, device=g.device) - lr * g
    after = shrink @ moment @ shrink
    if batch_size is not None:
        after = after + lr**2 / batch_size * (_fourth(moment, jacobian) - g @ moment @ g)
    warn_of_nan("second_moment_step", after)
    return after


def critical_learning_rate(jacobian: Tensor, batch_size: int | None = 1) -> Tensor:
    r"""The largest rate at which SGD is linearly stable at a minimum, in the second moment.

    The map of :func:`second_moment_step` is self-adjoint and keeps $M$ positive, so it is stable
    iff its largest eigenvalue is at most 1. With $\mathcal B(M)=GM+MG$ that is
    $\eta\le\eta^*_B=1/\lambda_{\max}\bigl(\mathcal B^{-1}[\frac1B\mathcal A
    +(1-\frac1B)G\cdot G]\bigr)$, found by Lanczos in the eigenbasis of $G$, where $\mathcal B$ is
    diagonal. Without noise it is $2/\lambda_{\max}(G)$.

    Args:
        jacobian: $J$ with rows $g_i$, `(n, p)`.
        batch_size: $B$, at least 1, drawn with replacement; None for the full batch.

    Returns:
        0-d, in the dtype of `jacobian`; computed in float64. Infinite if all $g_i$ vanish. A
        RuntimeWarning if Lanczos did not converge.

    Raises:
        ValueError: `jacobian` is not 2-D, empty or not finite; `batch_size` below 1.

    Source: our derivation; an equivalent threshold is in Mulayoff and Michaeli, arXiv 2306.07850.

    Example:
        >>> jacobian = torch.diag(torch.tensor([2.0, 4.0]))     # orthogonal: 2 / max |g|^2
        >>> round(critical_learning_rate(jacobian).item(), 6)
        0.125
    """
    _check_positive(batch_size=batch_size)
    _check_jacobian(jacobian)
    unit = unit_of(jacobian.detach().double(), power=4)
    eigenvalues, rows = _eigenbasis(jacobian.detach().double() / unit)
    unit = unit.squeeze()
    if len(eigenvalues) == 0:
        return jacobian.new_tensor(math.inf)
    if batch_size is None:
        return (2 / eigenvalues.max() / unit / unit).to(jacobian.dtype)
    half, both = (eigenvalues[:, None] + eigenvalues).rsqrt(), eigenvalues.outer(eigenvalues)

    def apply(vector: Tensor) -> Tensor:
        moment = half * vector.view_as(half)
        noise = _fourth(moment, rows) / batch_size
        return (half * (noise + (1 - 1 / batch_size) * both * moment)).flatten()

    # The worst deviation is positive semidefinite, so the identity is never orthogonal to it.
    start = torch.eye(len(half), dtype=half.dtype, device=half.device).flatten()
    found = lanczos(apply, start, max_iter=200, tol=1e-6)
    return (1 / found.value / unit / unit).to(jacobian.dtype)


def path_norm(output_weights: Tensor, input_weights: Tensor) -> Tensor:
    r"""The path norm $\sum_j|a_j|\,\|w_j\|$ of a two-layer network.

    Args:
        output_weights: $a$, `(..., m)`.
        input_weights: rows $w_j$, `(..., m, d)`.

    Returns:
        Shape `(...)`.

    Raises:
        ValueError: shapes that do not fit.

    Source: Wu and Su 2023, two-layer ReLU networks.

    Example:
        >>> path_norm(torch.tensor([-2.0, 1.0]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])).item()
        11.0
    """
    if input_weights.ndim < 2 or output_weights.shape != input_weights.shape[:-1]:
        shapes = f"{tuple(output_weights.shape)} and {tuple(input_weights.shape)}"
        raise ValueError(f"output_weights (..., m) must match input_weights, got {shapes}")
    norms: Tensor = input_weights.norm(dim=-1)
    return (output_weights.abs() * norms).sum(-1)


class DiagonalLinearNet(nn.Module):
    r"""The diagonal linear network $f(x)=\langle a\odot b,x\rangle$, started at random.

    Args:
        in_features: $d$, positive.
        scale: standard deviation of the starting `a` and `b`, both `(d,)`, positive.

    Source: Wu and Su 2023, diagonal linear networks.

    Example:
        >>> net = DiagonalLinearNet(3)
        >>> _ = nn.init.ones_(net.a), nn.init.constant_(net.b, 2.0)
        >>> net(torch.ones(1, 3)).item()
        6.0
    """

    def __init__(self, in_features: int, scale: float = 1.0) -> None:
        super().__init__()
        _check_positive(in_features=in_features, scale=scale)
        self.a = nn.Parameter(scale * torch.randn(in_features))
        self.b = nn.Parameter(scale * torch.randn(in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Predictions `(n,)` for `x` of shape `(n, d)`."""
        return x @ (self.a * self.b)

    @staticmethod
    def gradients(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Parameters]:
        """Residuals `(g, k, n)`, gradients `(g, k, d)`; `x` is `(g, n, d)` and `y` `(g, n)`."""
        a, b = parameters
        if x.shape[1] == 1:  # one example: the same without matrix products, which are slower
            residual = (a * b * x).sum(-1, keepdim=True) - y[:, None]
            slope = residual * x
        else:
            residual = (a * b) @ x.mT - y[:, None]
            slope = residual @ x / x.shape[1]
        return residual, (slope * b, slope * a)


class TwoLayerReLU(nn.Module):
    r"""The two-layer network $f(x)=\sum_{j\le m}a_j\,\mathrm{relu}(w_j^\top x)$.

    It starts with $a_j\sim N(0,1)$ and $w_j\sim N(0,I/\sqrt d)$: a path norm of order $m$.

    Args:
        in_features: $d$, at least 1.
        width: $m$, at least 1.

    Source: Wu and Su 2023, two-layer ReLU networks.

    Example:
        >>> net = TwoLayerReLU(2, 1)
        >>> _ = nn.init.ones_(net.weight), nn.init.constant_(net.output_weight, 3.0)
        >>> net(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).tolist()
        [6.0, 0.0]
    """

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        _check_positive(in_features=in_features, width=width)
        self.weight = nn.Parameter(torch.randn(width, in_features) / in_features**0.25)
        self.output_weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """Predictions `(n,)` for `x` of shape `(n, d)`."""
        return (x @ self.weight.T).relu() @ self.output_weight

    @staticmethod
    def gradients(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Parameters]:
        """Residuals `(g, k, n)`, gradients `(g, k, m, d)` and `(g, k, m)`; `x` is `(g, n, d)`."""
        weight, out = parameters
        hidden = (weight.flatten(1, 2) @ x.mT).view(*out.shape, -1).relu_()
        residual = (out[:, :, None] @ hidden)[:, :, 0] - y[:, None]
        share = (residual / x.shape[1])[..., None]
        out_slope = (hidden @ share)[..., 0]
        # relu'(0) = 0, so a unit is on exactly where its output is positive.
        back = hidden.sign_().mul_(share.mT)
        return residual, (out[..., None] * (back.flatten(1, 2) @ x).view_as(weight), out_slope)


@torch.no_grad()
def train_runs(
    model: type[DiagonalLinearNet] | type[TwoLayerReLU],
    parameters: Parameters,
    inputs: Tensor,
    targets: Tensor,
    *,
    lr: Tensor,
    steps: int,
    batch_size: int | None = 1,
    max_grad_norm: float = 100.0,
    tolerance: float = 1e-4,
    record_every: int = 1000,
    generator: torch.Generator | None = None,
) -> Runs:
    r"""Train many networks side by side: `k` runs on each of `s` data sets, each with its rate.

    Args:
        model: the class of the network; its hand-written gradients are used.
        parameters: where the runs start, each `(s, k, ...)` in the order of the class.
        inputs, targets: `(s, n, d)` and `(s, n)`.
        lr: $\eta$ of each run, `(k,)` or `(s, k)`, positive.
        steps: most steps; training ends early once every run is found converged.
        batch_size: $B$, drawn with replacement for each run; None for full-batch descent.
        max_grad_norm: longest gradient; a longer one is scaled down to it, run by run.
        tolerance: largest residual of a converged run.
        record_every: steps between two looks at the residuals and entries of the loss curve.
        generator: source of the batches.

    Returns:
        The :class:`Runs`; a run that diverged holds values that are not finite.

    Raises:
        ValueError: shapes that do not fit, a number out of range.

    Source: Wu and Su 2023, experiments.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> lr, start = torch.tensor([0.1]), (one, one)
        >>> runs = train_runs(DiagonalLinearNet, start, one, 4 * one[0], lr=lr, steps=200)
        >>> [round(p.item(), 3) for p in runs.parameters]     # a = b and a b = 4
        [2.0, 2.0]
    """
    s, k = _check_runs(parameters, inputs, targets, lr)
    _check_positive(steps=steps, batch_size=batch_size, record_every=record_every)
    _check_positive(max_grad_norm=max_grad_norm, tolerance=tolerance)
    # Full batches share their data among the k runs; drawn ones do not.
    group = (s, k) if batch_size is None else (s * k, 1)
    shapes = [p.shape for p in parameters]
    first, second = (p.reshape(*group, *p.shape[2:]).clone() for p in parameters)
    rate = lr.to(first).expand(s, k).reshape(group)

    def residuals() -> Tensor:
        return model.gradients((first.view(shapes[0]), second.view(shapes[1])), inputs, targets)[0]

    curve, marks = [residuals().square().mean(-1) / 2], [0]
    batches = _batches(inputs, targets, k, batch_size, steps, generator)
    for t, (x, y) in enumerate(batches, start=1):
        _, (g1, g2) = model.gradients((first, second), x, y)
        norm = torch.hypot(g1.flatten(2).norm(dim=2), g2.flatten(2).norm(dim=2))
        clipped = rate * (max_grad_norm / norm).clamp_(max=1.0)
        first.addcmul_(g1, clipped.view(*group, *[1] * (g1.ndim - 2)), value=-1)
        second.addcmul_(g2, clipped[..., None], value=-1)
        if t % record_every == 0 or t == steps:
            left = residuals()
            curve.append(left.square().mean(-1) / 2)
            marks.append(t)
            if bool((left.abs() <= tolerance).all()):
                break
    ended = (first.view(shapes[0]), second.view(shapes[1]))
    converged = left.abs().amax(-1) <= tolerance
    return Runs(ended, curve[-1], converged, torch.stack(curve), marks)


def train_to_interpolation(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    lr: float,
    steps: int,
    batch_size: int | None = 1,
    max_grad_norm: float = 100.0,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> TrainingResult:
    r"""Train any scalar model in place with SGD on half the mean squared residual.

    It looks at all residuals every 1000 steps, and draws the batches of :func:`train_runs`.

    Args:
        model: maps `(n, ...)` to `(n,)`; it is changed.
        inputs, targets: `(n, ...)` and `(n,)`.
        lr: $\eta$, positive.
        steps, batch_size, max_grad_norm, tolerance, generator: as in :func:`train_runs`.

    Returns:
        Loss over all examples, steps taken and whether it converged.

    Raises:
        ValueError: shapes that do not fit, a number out of range.

    Source: Wu and Su 2023, experiments.

    Example:
        >>> net, one = DiagonalLinearNet(1), torch.ones(1, 1)
        >>> _ = nn.init.ones_(net.a), nn.init.ones_(net.b)
        >>> done = train_to_interpolation(net, one, 4 * one[0], lr=0.1, steps=2000)
        >>> done.converged, done.steps, round(net.a.item(), 3)     # a = b and a b = 4
        (True, 1000, 2.0)
    """
    if targets.numel() == 0 or targets.shape != inputs.shape[:1]:
        raise ValueError(f"targets must have shape ({len(inputs)},), got {tuple(targets.shape)}")
    _check_positive(lr=lr, steps=steps, batch_size=batch_size)
    _check_positive(max_grad_norm=max_grad_norm, tolerance=tolerance)
    weights = [p for p in model.parameters() if p.requires_grad]
    batches = _batches(inputs[None], targets[None], 1, batch_size, steps, generator)
    for taken, (x, y) in enumerate(batches, start=1):
        half_square = (model(x[0]) - y[0]).square().mean() / 2
        gradients = torch.autograd.grad(half_square, weights)
        with torch.no_grad():
            norm = torch.stack([g.norm() for g in gradients]).norm()
            scale = lr * (max_grad_norm / norm).clamp(max=1.0)
            for weight, gradient in zip(weights, gradients):
                weight.sub_(scale * gradient)
            if taken % CHUNK == 0 and bool((model(inputs) - targets).abs().max() <= tolerance):
                break
    with torch.no_grad():
        left = model(inputs) - targets
    return TrainingResult(left.square().mean() / 2, taken, bool(left.abs().max() <= tolerance))


def _batches(
    inputs: Tensor,
    targets: Tensor,
    k: int,
    batch_size: int | None,
    steps: int,
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for `k` runs on each data set: `(s k, B, d)` and `(s k, B)`, or the full data."""
    if batch_size is None:
        yield from repeat((inputs, targets), steps)
        return
    s, n = targets.shape
    x, y = inputs.flatten(0, 1), targets.flatten()
    offset = n * torch.arange(s, device=x.device).repeat_interleave(k)[:, None]
    where = x.device if generator is None else generator.device
    for begin in range(0, steps, CHUNK):
        shape = (min(CHUNK, steps - begin), s * k, batch_size)
        drawn = torch.randint(n, shape, generator=generator, device=where).to(x.device) + offset
        for index in drawn:
            yield x[index], y[index]


def _fourth(moment: Tensor, rows: Tensor) -> Tensor:
    r"""$\mathcal A(M)=\frac1n\sum_i(g_i^\top Mg_i)\,g_ig_i^\top$."""
    weights = ((rows @ moment) * rows).sum(1) / len(rows)
    return rows.T @ (weights[:, None] * rows)


def _gram(jacobian: Tensor) -> Tensor:
    """The smaller of the two matrices that share their nonzero eigenvalues with G."""
    _check_jacobian(jacobian)
    n, p = jacobian.shape
    return (jacobian @ jacobian.T if n < p else jacobian.T @ jacobian) / n


def _eigenbasis(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """Nonzero eigenvalues of G `(r,)` and the rows of J in its eigenbasis `(n, r)`, float64."""
    jacobian = jacobian.detach().double()
    values, vectors = torch.linalg.eigh(_gram(jacobian))
    n, p = jacobian.shape
    keep = values > max(n, p) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    values, vectors = values[keep], vectors[:, keep]
    return values, vectors * (n * values).sqrt() if n < p else jacobian @ vectors


def _check_jacobian(jacobian: Tensor) -> None:
    if jacobian.ndim != 2 or jacobian.numel() == 0:
        raise ValueError(f"jacobian must have shape (n, p), not empty, got {tuple(jacobian.shape)}")
    if not jacobian.isfinite().all():
        raise ValueError("jacobian must be finite in every entry")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:  # a batch size of None is the full batch
            raise ValueError(f"{name} must be positive, got {value}")


def _check_runs(
    parameters: Parameters, inputs: Tensor, targets: Tensor, lr: Tensor
) -> tuple[int, int]:
    s, k = parameters[0].shape[:2]
    fits = inputs.ndim == 3 and inputs.numel() > 0 and targets.shape == inputs.shape[:2]
    fits = fits and len(inputs) == s and parameters[0].shape[-1] == inputs.shape[2]
    if not fits or parameters[1].shape[:2] != (s, k) or lr.shape not in ((k,), (s, k)):
        expected = "parameters (s, k, ...), inputs (s, n, d), targets (s, n) and lr (k,) or (s, k)"
        shapes = [tuple(t.shape) for t in (*parameters, inputs, targets, lr)]
        raise ValueError(f"shapes must fit: {expected}, got {shapes}")
    if not (lr > 0).all():
        raise ValueError("lr must be positive in every run")
    return s, k
