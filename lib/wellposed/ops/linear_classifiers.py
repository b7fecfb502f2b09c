r"""Linear classifiers for a list of regularization strengths, many problems side by side.

Both minimize $\frac1n\sum_i\ell(y_i(w\cdot x_i+b))+\lambda\|w\|^2$ with a bias that is not
penalized: the support vector machine with $\ell(t)=\max(0,1-t)$, logistic regression with
$\ell(t)=\log(1+e^{-t})$. By the representer theorem $w=\sum_ia_ix_i$, so the solvers work with the
$n$ coefficients $a$ and the Gram matrix, whatever the number of features.

Source: X. Li, D. Sun, K.-C. Toh, "A Highly Efficient Semismooth Newton Augmented Lagrangian Method
for Solving Lasso Problems", SIAM Journal on Optimization 2018 (the scheme, here for the hinge
loss); T. Hastie, R. Tibshirani, J. Friedman, "The Elements of Statistical Learning", section 4.4.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LinearPath", "logistic_path", "signed_labels", "svm_path"]

MAX_NEWTON = 30  # Newton steps between two updates of the multipliers
MAX_HALVINGS = 20  # of a Newton step
ARMIJO = 1e-4
PENALTY, GROWTH, MOST = 10.0, 2.0, 1e4  # of the augmented Lagrangian: first, factor, largest
ACCURACY, TIGHTER = 0.01, 0.3  # of the Newton steps: first, and factor an update
GPU_BYTES = 4 * 2**30  # of systems side by side; a CPU is faster one problem after the other


@dataclass(frozen=True)
class LinearPath:
    """Classifiers of `...` problems for `k` strengths of regularization."""

    weight: Tensor  # (..., k, d)
    bias: Tensor  # (..., k)
    coef: Tensor  # (..., k, n), signed coefficients of the centered examples
    residual: Tensor  # (..., k), relative duality gap (SVM) or relative Newton decrement
    converged: Tensor  # (..., k), whether `residual <= tol`
    num_iters: int  # Newton steps of the slowest problem


@dataclass
class _State:
    """Coefficients, bias, residual and steps of `p` problems at `k` strengths."""

    coef: Tensor  # (p, k, n)
    bias: Tensor  # (p, k)
    residual: Tensor  # (p, k)
    num_iters: int


_Solver = Callable[[Tensor, Tensor, Tensor, float, int], _State]


def signed_labels(x: Tensor, y: Tensor) -> Tensor:
    """Labels of two classes in the dtype of their points, after a check of both.

    Args:
        x: points ``(..., n, d)``, floating point, not empty.
        y: labels -1 and 1, ``(..., n)``, any dtype; both occur in every problem.

    Returns:
        ``y`` in the dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit, other labels, or one class only.

    Source: ours.

    Example:
        >>> signed_labels(torch.zeros(2, 3), torch.tensor([-1, 1])).tolist()
        [-1.0, 1.0]
    """
    if x.ndim < 2 or 0 in x.shape or y.shape != x.shape[:-1]:
        raise ValueError(
            f"x must be (..., n, d) and y (..., n), got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if not ((y == 1) | (y == -1)).all():
        raise ValueError("y must hold the labels -1 and 1 only")
    if ((y == 1).all(-1) | (y == -1).all(-1)).any():
        raise ValueError("y must hold both classes")
    return y.to(x.dtype)


def _solve(
    solver: _Solver, x: Tensor, y: Tensor, regs: Sequence[float], tol: float, max_iter: int
) -> LinearPath:
    """Check the input, center it, and solve the problems in groups."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("x must be a floating-point tensor")
    y = signed_labels(x, y)
    if not x.isfinite().all():
        raise ValueError("x must be finite")
    if not len(regs) or not all(0 < reg < float("inf") for reg in regs):
        raise ValueError(f"regs must be positive numbers, got {list(regs)}")
    if not tol > 0 or max_iter < 1:
        raise ValueError(f"tol must be positive and max_iter at least 1, got {tol}, {max_iter}")
    n = x.shape[-2]
    signs = y.reshape(-1, 1, n)
    c = 1 / (2 * n * x.new_tensor(list(regs)))[:, None]
    many = max(1, GPU_BYTES // (x.element_size() * n * n * (1 + len(regs))))
    parts, iters = [], 0
    for xs, ys in zip(*(t.split(1 if x.device.type == "cpu" else many)
                        for t in (x.reshape(-1, *x.shape[-2:]), signs)), strict=True):  # fmt: skip
        mean = xs.mean(1, keepdim=True)
        centered = xs - mean
        state = solver(centered @ centered.mT, ys, c, tol, max_iter)
        weight = state.coef @ centered
        bias = state.bias - (weight * mean).sum(-1)
        parts.append((weight, bias, state.coef, state.residual))
        iters = max(iters, state.num_iters)
    weight, bias, coef, residual = (
        torch.cat(t).reshape(*x.shape[:-2], *t[0].shape[1:]) for t in zip(*parts, strict=True)
    )
    good = residual <= tol
    if not good.all():
        text = f"{int((~good).sum())} classifiers did not reach tol={tol:g} in max_iter={max_iter}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    return LinearPath(weight, bias, coef, residual, good, iters)


def _cholesky(system: Tensor) -> Tensor:
    """Cholesky factors; where rounding makes a system indefinite, of a slightly larger one."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(system)
    if info.any():
        hair = system.shape[-1] * torch.finfo(system.dtype).eps * (info > 0)
        system = system.clone()
        diagonal = system.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(10 * hair[..., None] * diagonal.amax(-1, keepdim=True))
        factor = torch.linalg.cholesky_ex(system)[0]
    return factor


# --- support vector machine ---------------------------------------------------------------------


def _gap(y: Tensor, c: Tensor, coef: Tensor, image: Tensor, bias: Tensor) -> Tensor:
    """Relative duality gap `(p, k)`; `image` is the Gram matrix times `coef`.

    Where the coefficients do not add up to zero, the dual value is that of the best bias, which
    is at most `1 + max |image|` in size.
    """
    norm = (coef * image).sum(-1)
    loss = c[:, 0] * (1 - y * (image + bias[..., None])).clamp(min=0).sum(-1)
    dual = (y * coef).sum(-1) - norm / 2 - (1 + image.abs().amax(-1)) * coef.sum(-1).abs()
    primal = norm / 2 + loss
    return (primal - dual) / primal


def _newton_step(
    gram: Tensor, spread: Tensor, free: Tensor, residual: Tensor, push: Tensor, sigma: Tensor,
    todo: Tensor,
) -> Tensor:  # fmt: skip
    r"""Solve $(I+\sigma D_F(K+s))\,\delta=-r+\sigma D_Fo$, where $F$ are the free examples.

    With $p=(K+s)r+o$ it is $\delta=-r+(I/\sigma+K+s)_{FF}^{-1}p_F$: only a system of the size of
    $F$ is solved. The problems are padded to the largest $F$.
    """
    at = todo.nonzero()[:, 0]
    free, sigma = free[todo], sigma[todo]
    size = max(int(free.sum(-1).max()), 1)
    place = free.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :size]
    used = free.gather(-1, place)
    system = (
        gram[at[:, None, None], place[:, :, None], place[:, None, :]] + spread[todo][:, None, None]
    )
    system = system * (used[:, :, None] & used[:, None, :])
    system.diagonal(dim1=-2, dim2=-1).add_(torch.where(used, 1 / sigma, 1.0))
    right = (push[todo].gather(-1, place) * used)[..., None]
    inside = torch.cholesky_solve(right, _cholesky(system))[..., 0]
    step = torch.zeros_like(residual)
    step[todo] = torch.scatter_add(-residual[todo], -1, place, inside)
    return step


@dataclass
class _Augmented:
    """The augmented Lagrangian with the multipliers and the bias of the last update.

    The bias is one more feature whose weight is drawn to its last value with strength `1 / s`.
    """

    gram: Tensor  # (p, n, n)
    y: Tensor  # (p, 1, n)
    c: Tensor  # (k, 1)
    multipliers: Tensor  # (p, k, n), at least 0
    origin: Tensor  # (p, k)
    sigma: Tensor  # (p, k, 1)
    s: Tensor  # (p, k)

    def clip(self, raw: Tensor) -> Tensor:
        return torch.minimum(raw.clamp(min=0), self.c)

    def loss(self, raw: Tensor) -> Tensor:
        """Moreau envelope of the hinge losses, up to a constant."""
        over = raw - self.clip(raw)
        return ((raw - over) * (raw + over)).sum(-1) / (2 * self.sigma[..., 0])


def _minimize(
    model: _Augmented, beta: Tensor, bias: Tensor, active: Tensor, goal: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Semismooth Newton steps; returns new multipliers, weights, bias and the number of steps."""
    gram, y, sigma, s = model.gram, model.y, model.sigma, model.s
    image, coef = beta @ gram, beta
    for steps in range(MAX_NEWTON + 1):
        raw = model.multipliers + sigma * (1 - y * (image + bias[..., None]))
        coef = y * model.clip(raw)
        residual, away = beta - coef, (bias - model.origin) / s
        pull = away - coef.sum(-1)
        pushed = residual @ gram
        size = (residual * pushed).sum(-1).clamp(min=0) + s * pull.square()
        quad = (beta * image).sum(-1) + s * away.square()
        todo = active & (size > goal * quad)
        if steps == MAX_NEWTON or not todo.any():
            break
        free = (raw > 0) & (raw < model.c) & todo[..., None]
        off = bias - model.origin - s * beta.sum(-1)
        pushed = pushed + (s * residual.sum(-1) + off)[..., None]
        step = _newton_step(gram, s, free, residual, pushed, sigma, todo)
        shift = (s * step.sum(-1) - off) * todo
        moved = step @ gram
        slope = (residual * moved).sum(-1) + pull * shift
        cross = (step * image).sum(-1) + away * shift
        far = (step * moved).sum(-1) + shift.square() / s
        rate = sigma * y * (moved + shift[..., None])
        length, before = torch.ones_like(slope), model.loss(raw)
        for _ in range(MAX_HALVINGS):
            change = length * cross + length.square() * far / 2
            change = change + model.loss(raw - length[..., None] * rate) - before
            short = change <= ARMIJO * length * slope + 1e-12 * (before.abs() + quad)
            if short.all():
                break
            length = torch.where(short, length, length / 2)
        beta = beta + length[..., None] * step
        image = image + length[..., None] * moved
        bias = bias + length * shift
    return coef, beta, bias, steps


def _svm(gram: Tensor, y: Tensor, c: Tensor, tol: float, max_iter: int) -> _State:
    """Augmented Lagrangian of the hinge losses; starts at a multiple of the nearest centroid."""
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
    scale = scale.clamp(min=torch.finfo(gram.dtype).tiny)
    between = (y @ gram @ y.mT).clamp(min=torch.finfo(gram.dtype).tiny)
    coef = y * torch.minimum(c, 2 * gram.shape[-1] / between)
    start = PENALTY * torch.minimum(c, 1 / scale[..., None])
    beta, bias = coef, torch.zeros_like(coef[..., 0])
    # the bias is of the order of one, even where the examples are tiny
    spread = torch.maximum(scale, 1 / (gram.shape[-1] * c[:, 0]))
    best = _State(coef, bias, torch.ones_like(bias), 0)
    for update in range(max_iter):
        sigma = min(GROWTH**update, MOST) * start
        goal = ACCURACY * best.residual.clamp(max=max(TIGHTER**update, 1e-3 * tol))
        model = _Augmented(gram, y, c, y * coef, bias, sigma, spread)
        coef, beta, bias, steps = _minimize(model, beta, bias, best.residual > tol, goal)
        gap = _gap(y, c, coef, coef @ gram, bias)
        better = gap < best.residual
        best = _State(
            torch.where(better[..., None], coef, best.coef),
            torch.where(better, bias, best.bias),
            torch.where(better, gap, best.residual),
            best.num_iters + steps,
        )
        if (best.residual <= tol).all():
            break
    return best


@torch.no_grad()
def svm_path(
    x: Tensor, y: Tensor, regs: Sequence[float], *, tol: float = 1e-6, max_iter: int = 60
) -> LinearPath:
    r"""Linear support vector machines, $\frac1n\sum_i\max(0,1-y_i(w\cdot x_i+b))+\lambda\|w\|^2$.

    In the notation of libsvm and scikit-learn $C=1/(2n\lambda)$. If all coefficients are below
    $C$ in size, the classifier is the one of maximal margin, and smaller $\lambda$ change nothing.
    Where every example is at the bound, the bias is not unique.

    Args:
        x: `(..., n, d)`, float64 (float32 reaches a `tol` of about 1e-3).
        y: labels -1 and 1, `(..., n)`, both in each problem.
        regs: `k` values of $\lambda>0$.
        tol: largest relative duality gap that counts as solved, positive.
        max_iter: most updates of the multipliers.

    Returns:
        A :class:`LinearPath`; classifiers above `tol` are not `converged`, and a warning says so.

    Raises:
        TypeError: `x` is no floating-point tensor.
        ValueError: shapes, labels or numbers out of range, `x` not finite.

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> svm_path(x, torch.tensor([-1, 1]), [0.1, 1.0]).weight[:, 0]   # min(1, 1 / (2 reg))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    return _solve(_svm, x, y, regs, tol, max_iter)


# --- logistic regression ------------------------------------------------------------------------


def _logistic(gram: Tensor, y: Tensor, c: Tensor, tol: float, max_iter: int) -> _State:
    """Newton's method (reweighted least squares), damped."""
    beta = torch.zeros_like(y).expand(-1, len(c), -1)
    bias, image, eye = beta[..., 0], beta, torch.eye(gram.shape[-1]).to(gram)
    residual, steps = torch.ones_like(bias), 0

    def value(beta: Tensor, image: Tensor, bias: Tensor) -> Tensor:
        losses = torch.nn.functional.softplus(-y * (image + bias[..., None]))
        return (beta * image).sum(-1) / 2 + c[:, 0] * losses.sum(-1)

    while steps < max_iter:
        steps += 1
        margin = y * (image + bias[..., None])
        root = (c * torch.sigmoid(margin) * torch.sigmoid(-margin)).sqrt()
        system = root[..., :, None] * gram[:, None] * root[..., None, :] + eye
        target = root * (image + bias[..., None]) + y * c.sqrt() * (-margin / 2).exp()
        both = torch.stack([target, root], dim=-1)
        solved = torch.cholesky_solve(both, _cholesky(system))
        sums = (root[..., None] * solved).sum(-2)
        new_bias = sums[..., 0] / sums[..., 1]
        new_beta = root * (solved[..., 0] - new_bias[..., None] * solved[..., 1])
        step, shift = new_beta - beta, new_bias - bias
        moved = step @ gram
        force = -c * y * torch.sigmoid(-margin)
        slope = ((beta + force) * moved).sum(-1) + force.sum(-1) * shift
        now = value(beta, image, bias)
        residual = slope.abs() / now
        length = torch.ones_like(slope)
        for _ in range(MAX_HALVINGS):
            far = length[..., None]
            after = value(beta + far * step, image + far * moved, bias + length * shift)
            short = after <= now + ARMIJO * length * slope + 1e-12 * now.abs()
            if short.all():
                break
            length = torch.where(short, length, length / 2)
        beta, bias = beta + length[..., None] * step, bias + length * shift
        image = beta @ gram
        if (residual <= tol).all():
            break
    return _State(beta, bias, residual, steps)


@torch.no_grad()
def logistic_path(
    x: Tensor, y: Tensor, regs: Sequence[float], *, tol: float = 1e-6, max_iter: int = 60
) -> LinearPath:
    r"""Logistic regression, $\frac1n\sum_i\log(1+e^{-y_i(w\cdot x_i+b)})+\lambda\|w\|^2$.

    In the notation of scikit-learn $C=1/(2n\lambda)$.

    Args:
        x: `(..., n, d)`, float64 (float32 reaches a `tol` of about 1e-3).
        y: labels -1 and 1, `(..., n)`, both in each problem.
        regs: `k` values of $\lambda>0$.
        tol: largest Newton decrement, relative to the value, that counts as solved, positive.
        max_iter: most Newton steps.

    Returns:
        A :class:`LinearPath`; classifiers above `tol` are not `converged`, and a warning says so.

    Raises:
        TypeError: `x` is no floating-point tensor.
        ValueError: shapes, labels or numbers out of range, `x` not finite.

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> reg = 1 / (4 * (1 + 2.718281828459045))     # then the slope is zero at w = 1, 2 reg w
        >>> logistic_path(x, torch.tensor([-1, 1]), [2 * reg]).weight
        tensor([[1.0000]], dtype=torch.float64)
    """
    return _solve(_logistic, x, y, regs, tol, max_iter)
