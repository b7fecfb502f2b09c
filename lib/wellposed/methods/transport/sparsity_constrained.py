r"""Sparsity-constrained optimal transport: at most k nonzeros in every column of the plan.

Tianlin Liu, Joan Puigcerver and Mathieu Blondel, "Sparsity-Constrained Optimal Transport", ICLR
2023, arXiv 2209.15466.

Claim: although a limit on the number of nonzeros is not convex, the dual and the semi-dual of
quadratically regularized transport with that limit are concave, cheap to evaluate and solvable by
gradients; k leads from unregularized transport to the quadratic one.

For marginals $a\in\mathbb R^m, b\in\mathbb R^n$, costs $C$ with columns $c_j$ and plans $T\ge0$
with columns $t_j$:

$$\min_{T\mathbf 1=a,\;T^\top\mathbf 1=b}\ \sum_j\langle t_j,c_j\rangle+\tfrac\gamma2\|t_j\|^2
\qquad\text{with }\|t_j\|_0\le k,$$

$$S(\alpha)=\langle\alpha,a\rangle-\sum_j\max_{t\ge0,\ \mathbf 1^\top t=b_j,\ \|t\|_0\le k}
\langle t,\alpha-c_j\rangle-\tfrac\gamma2\|t\|^2 .$$

The maximizer $t_j$ keeps the $k$ largest entries of $\alpha-c_j$; $\nabla S=a-T\mathbf 1$.

Departures from the paper: L-BFGS with a line search for kinks solves many problems side by side,
and gets to $k=1$ by way of larger $k$; the mixture of experts is a small network on digits instead
of V-MoE, where the plan chooses the tokens of an expert and the router's softmax weighs its answer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from wellposed.nets import RoutedExperts
from wellposed.ops.dispatch import Dispatch, plan_choice
from wellposed.ops.lbfgs import LBFGSResult, minimize_lbfgs
from wellposed.ops.simplex import simplex_threshold
from wellposed.ops.sinkhorn import marginal_error
from wellposed.train import StackedAdam, accuracy, minibatches

__all__ = [
    "ExpertsResult",
    "SparseOTResult",
    "dual_objective",
    "semi_dual_objective",
    "sparse_ot",
    "train_experts",
    "transport_choice",
]

MASS_TOL = 1e-4  # relative difference in mass that counts as rounding
ROUTING_TOL = 1e-6
FIRST_WIDTH = 16  # entries of a column that are looked at before there is need for more


@dataclass(frozen=True)
class SparseOTResult:
    """What :func:`sparse_ot` returns; `...` are the leading axes of the costs."""

    plan: Tensor  # (..., m, n), at most k nonzeros a column, exact zeros elsewhere
    alpha: Tensor  # (..., m)
    value: Tensor  # (...), the (semi-)dual value at `alpha`
    marginal_error: Tensor  # (...), L1 error of the rows (and of the columns, from the dual)
    num_iters: Tensor  # (...)
    num_evals: Tensor  # (...), evaluations of the objective
    values: Tensor  # (t + 1, ...), the value after each iteration
    evals: Tensor  # (t + 1, ...), evaluations until then
    converged: Tensor  # (...), the value stopped rising before `max_iter`


@dataclass(frozen=True)
class ExpertsResult:
    """What :func:`train_experts` returns, for `s` networks side by side."""

    test_accuracy: Tensor  # (s,)
    coverage: Tensor  # (s,), share of the test tokens that reach an expert
    load: Tensor  # (s,), share of all places that are taken in the test
    train_coverage: Tensor  # (epochs, s)
    train_loss: Tensor  # (epochs, s)


class _Columns:
    """The best columns of the plan for given potentials.

    Often far fewer than k entries are nonzero. So only the `width` largest are looked for, and
    `width` doubles, for good, while the last of them is nonzero.
    """

    def __init__(self, b: Tensor, cost_t: Tensor, k: int, gamma: float) -> None:
        self.b, self.cost_t, self.gamma = b, cost_t, gamma
        self.k = min(k, cost_t.shape[-1])
        self.width = min(self.k, FIRST_WIDTH)

    def semi_dual(self, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Kept values and their rows, both `(..., n, width)`, and the conjugates' sum `(...)`."""
        scores = alpha.unsqueeze(-2) - self.cost_t
        while True:
            top, place = scores.topk(self.width, dim=-1)
            scaled = top / self.gamma
            kept = (scaled - simplex_threshold(scaled, self.b)).clamp(min=0)
            if self._enough(kept):
                return kept, place, (kept * (top - self.gamma / 2 * kept)).sum((-2, -1))

    def dual(self, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same without the constraint on the columns' sums."""
        scores = alpha.unsqueeze(-2) + beta.unsqueeze(-1) - self.cost_t
        while True:
            top, place = scores.topk(self.width, dim=-1)
            kept = top.clamp(min=0) / self.gamma
            if self._enough(kept):
                return kept, place, self.gamma / 2 * kept.square().sum((-2, -1))

    def _enough(self, kept: Tensor) -> bool:
        if self.width == self.k or not (kept[..., -1] > 0).any():
            return True
        self.width = min(self.k, 2 * self.width)
        return False


def _dense(kept: Tensor, place: Tensor, m: int) -> Tensor:
    """The plan `(..., m, n)` with the kept entries in their places."""
    columns = kept.new_zeros((*kept.shape[:-1], m)).scatter(-1, place, kept)
    return columns.transpose(-1, -2)


def semi_dual_objective(
    alpha: Tensor, a: Tensor, b: Tensor, cost: Tensor, k: int, gamma: float
) -> tuple[Tensor, Tensor]:
    r"""The semi-dual $S(\alpha)$ and the plan of its maximizers, column by column.

    $$S(\alpha)=\langle\alpha,a\rangle-\sum_j\langle t_j,\alpha-c_j\rangle-\tfrac\gamma2\|t_j\|^2,
    \qquad t_j=P_{b_j,k}\bigl((\alpha-c_j)/\gamma\bigr)$$

    with $P_{b,k}$ from :func:`wellposed.ops.simplex.project_sparse_simplex`.

    Args:
        alpha: potential of the rows, `(..., m)`.
        a: row marginal, `(..., m)`.
        b: column marginal, `(..., n)`, at least 0.
        cost: $C$, `(..., m, n)`.
        k: largest number of nonzeros in a column, at least 1.
        gamma: weight of the quadratic term, positive.

    Returns:
        The value `(...)`, differentiable in `alpha` (gradient $a-T\mathbf 1$) and in `cost`
        (gradient $T$); and $T$, `(..., m, n)`, detached.

    Raises:
        TypeError, ValueError: see :func:`sparse_ot`.

    Source: Liu et al. 2023, the semi-dual.

    Example:
        >>> zero, half, one = torch.zeros(2), torch.full((2,), 0.5), torch.ones(1)
        >>> cost = torch.tensor([[0.0], [1.0]])
        >>> value, plan = semi_dual_objective(zero, half, one, cost, k=2, gamma=1.0)
        >>> value.item(), plan.flatten().tolist()
        (0.5, [1.0, 0.0])
    """
    _check_problem(a, b, cost, k, gamma)
    _check_shape("alpha", alpha, a.shape)
    with torch.no_grad():
        kept, place, _ = _Columns(b, cost.mT, k, gamma).semi_dual(alpha)
        plan = _dense(kept, place, cost.shape[-2])
    gain = plan * (alpha.unsqueeze(-1) - cost) - gamma / 2 * plan.square()
    return (alpha * a).sum(-1) - gain.sum((-2, -1)), plan


def dual_objective(
    alpha: Tensor, beta: Tensor, a: Tensor, b: Tensor, cost: Tensor, k: int, gamma: float
) -> tuple[Tensor, Tensor]:
    r"""The dual $D(\alpha,\beta)$ and the plan of its maximizers.

    $$D(\alpha,\beta)=\langle\alpha,a\rangle+\langle\beta,b\rangle
    -\frac1{2\gamma}\sum_j\sum_{i\in\text{top-}k}[\alpha_i+\beta_j-C_{ij}]_+^2$$

    Args:
        alpha: potential of the rows, `(..., m)`.
        beta: potential of the columns, `(..., n)`.
        a: row marginal, `(..., m)`.
        b: column marginal, `(..., n)`.
        cost: $C$, `(..., m, n)`.
        k: largest number of nonzeros in a column, at least 1.
        gamma: weight of the quadratic term, positive.

    Returns:
        The value `(...)`, differentiable in `alpha`, `beta` (gradients $a-T\mathbf 1$ and
        $b-T^\top\mathbf 1$) and `cost`; and $T$, `(..., m, n)`, detached.

    Raises:
        TypeError, ValueError: see :func:`sparse_ot`.

    Source: Liu et al. 2023, the dual.

    Example:
        >>> one = torch.ones(1)
        >>> value, plan = dual_objective(one, one, one, one, torch.ones(1, 1), k=1, gamma=2.0)
        >>> value.item(), plan.item()     # 1 + 1 - 1/4, and 1/2
        (1.75, 0.5)
    """
    _check_problem(a, b, cost, k, gamma)
    _check_shape("alpha", alpha, a.shape)
    _check_shape("beta", beta, b.shape)
    with torch.no_grad():
        kept, place, _ = _Columns(b, cost.mT, k, gamma).dual(alpha, beta)
        plan = _dense(kept, place, cost.shape[-2])
    scores = alpha.unsqueeze(-1) + beta.unsqueeze(-2) - cost
    gain = plan * scores - gamma / 2 * plan.square()
    return (alpha * a).sum(-1) + (beta * b).sum(-1) - gain.sum((-2, -1)), plan


def _solve_semi_dual(
    a: Tensor, columns: _Columns, start: Tensor, max_iter: int, tol: float
) -> LBFGSResult:
    """Minimize $-S$ for `(p, m)` potentials; the plan itself is never formed."""

    def objective(alpha: Tensor) -> tuple[Tensor, Tensor]:
        kept, place, conjugate = columns.semi_dual(alpha)
        rows = torch.zeros_like(alpha).scatter_add_(-1, place.flatten(-2), kept.flatten(-2))
        return conjugate - (alpha * a).sum(-1), rows - a

    grad_tol = tol * float(a.sum(-1).min())
    return minimize_lbfgs(objective, start, max_iter=max_iter, tol=tol, grad_tol=grad_tol)


def _solve_dual(
    a: Tensor, columns: _Columns, start: Tensor, max_iter: int, tol: float
) -> LBFGSResult:
    """Minimize $-D$ over both potentials, one behind the other."""
    m, both = a.shape[-1], torch.cat([a, columns.b], dim=-1)

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        kept, place, conjugate = columns.dual(x[:, :m], x[:, m:])
        rows = torch.zeros_like(a).scatter_add_(-1, place.flatten(-2), kept.flatten(-2))
        return conjugate - (x * both).sum(-1), torch.cat([rows, kept.sum(-1)], -1) - both

    grad_tol = tol * float(a.sum(-1).min())
    return minimize_lbfgs(objective, start, max_iter=max_iter, tol=tol, grad_tol=grad_tol)


@torch.no_grad()
def sparse_ot(
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    *,
    k: int,
    gamma: float = 1.0,
    formulation: str = "semi_dual",
    max_iter: int = 1000,
    tol: float = 1e-9,
) -> SparseOTResult:
    r"""Maximize the semi-dual or the dual by L-BFGS, starting from zero.

    With `k = 1` the semi-dual is piecewise linear and L-BFGS stalls early. So it first solves
    without a limit, for 4 and for 2; each starts where the last ended, and evaluations add up.

    Column sums (semi-dual) and the limit of `k` hold exactly. The row sums hold as far as the
    gradient vanished: where they do (`marginal_error` near 0), the plan also solves the problem
    with the nonconvex limit. Where entries tie at the optimum they cannot, and the value is that of
    the convex relaxation. The plan is not rounded afterwards.

    Args:
        a: row marginal, `(..., m)`, at least 0.
        b: column marginal, `(..., n)`, at least 0, of the same mass.
        cost: $C$, `(..., m, n)`, float32 or float64; leading axes are problems side by side.
        k: largest number of nonzeros in a column, at least 1; no limit from `m` on.
        gamma: weight of the quadratic term, positive.
        formulation: "semi_dual" or "dual", two ways to the same value.
        max_iter: largest number of L-BFGS iterations.
        tol: relative gain of an iteration that counts as none.

    Returns:
        A :class:`SparseOTResult`; a RuntimeWarning if a problem ran out of iterations.

    Raises:
        TypeError: `cost` is neither float32 nor float64, the dtypes differ, `k` is no integer.
        ValueError: shapes do not fit, marginals negative or of different mass, costs not finite,
            `k`, `gamma`, `max_iter` or `tol` out of range, another formulation.

    Source: Liu et al. 2023; the line search is ours.

    Example:
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> result = sparse_ot(half, half, 1 - torch.eye(2, dtype=torch.float64), k=1)
        >>> result.plan.tolist(), round(result.value.item(), 6)     # 0 + (1/4 + 1/4) / 2
        ([[0.5, 0.0], [0.0, 0.5]], 0.25)
    """
    _check_problem(a, b, cost, k, gamma)
    if formulation not in ("semi_dual", "dual"):
        raise ValueError(f'formulation must be "semi_dual" or "dual", got {formulation!r}')
    batch, (m, n) = cost.shape[:-2], cost.shape[-2:]
    rows = a.reshape(-1, m)
    targets, cost_t = b.reshape(-1, n), cost.mT.reshape(-1, n, m).contiguous()
    semi = formulation == "semi_dual"
    solve = _solve_semi_dual if semi else _solve_dual
    start = cost.new_zeros(len(rows), m if semi else m + n)
    spent = torch.zeros(len(rows), dtype=torch.int64, device=cost.device)
    for larger in (m, 4, 2) if k == 1 < m else ():
        columns = _Columns(targets, cost_t, larger, gamma)
        found = solve(rows, columns, start, min(max_iter, 300), max(tol, 1e-7))
        start, spent = found.x, spent + found.num_evals
    columns = _Columns(targets, cost_t, k, gamma)
    found = solve(rows, columns, start, max_iter, tol)
    if semi:
        kept, place, _ = columns.semi_dual(found.x)
    else:
        kept, place, _ = columns.dual(found.x[:, :m], found.x[:, m:])
    if not found.converged.all():
        warnings.warn(
            f"sparse_ot used all max_iter={max_iter} iterations in "
            f"{int((~found.converged).sum())} of {len(found.x)} problems",
            RuntimeWarning,
            stacklevel=3,
        )
    plan = _dense(kept, place, m).reshape(cost.shape)
    return SparseOTResult(
        plan=plan,
        alpha=found.x[:, :m].reshape(*batch, m),
        value=-found.value.reshape(batch),
        marginal_error=marginal_error(plan, a, b),
        num_iters=found.num_iters.reshape(batch),
        num_evals=(found.num_evals + spent).reshape(batch),
        values=-found.values.reshape(-1, *batch),
        evals=(found.evals + spent).reshape(-1, *batch),
        converged=found.converged.reshape(batch),
    )


@torch.no_grad()
def transport_choice(
    gates: Tensor, capacity: int, *, gamma: float = 100.0, max_iter: int = 20
) -> Dispatch:
    r"""Route a batch by sparsity-constrained transport: costs $-$gates, uniform marginals.

    A few L-BFGS iterations suffice for routing, so the plan's rows are only roughly right; the
    capacity holds exactly.

    Args:
        gates: affinities, `(s, m, n)`: tokens are rows, experts are columns.
        capacity: $k$, tokens an expert takes at most, at least `m / n` to find room for all.
        gamma: weight of the quadratic term, positive; entries of the plan are about `1 / m`, so
            100 is mild.
        max_iter: iterations, at least 1; no warning if they do not suffice.

    Returns:
        A :class:`Dispatch`.

    Raises:
        ValueError: shapes or `capacity`, `gamma`, `max_iter` out of range.

    Source: Liu et al. 2023, mixtures of experts; the few iterations are ours.

    Example:
        >>> gates = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]])     # both prefer the first expert
        >>> transport_choice(gates, 1).tokens.flatten().tolist()
        [0, 1]
    """
    if gates.ndim != 3:
        raise ValueError(f"gates must have shape (s, m, n), got {tuple(gates.shape)}")
    s, m, n = gates.shape
    a, b = gates.new_full((s, m), 1 / m), gates.new_full((s, n), 1 / n)
    _check_problem(a, b, gates, capacity, gamma)
    columns = _Columns(b, (-gates).mT.contiguous(), capacity, gamma)
    found = _solve_semi_dual(a, columns, torch.zeros_like(a), max_iter, ROUTING_TOL)
    kept, place, _ = columns.semi_dual(found.x)
    return plan_choice(_dense(kept, place, m), capacity)


def train_experts(
    x: Tensor,
    target: Tensor,
    x_test: Tensor,
    target_test: Tensor,
    *,
    route: Callable[[Tensor], Dispatch],
    generator: torch.Generator,
    num_experts: int = 8,
    width: int = 32,
    hidden: int = 16,
    epochs: int = 10,
    batch_size: int = 256,
    lr: float = 1e-2,
    balance: float = 0.0,
) -> ExpertsResult:
    r"""Train small mixtures of experts side by side on batches that are routed as a whole.

    The networks are :class:`wellposed.nets.RoutedExperts`; the loss is cross-entropy plus `balance`
    times $n\sum_jf_jp_j$ ($f_j$: share of tokens whose best expert is $j$; $p_j$: its mean gate).

    Args:
        x: `(s, n, d)`, one slice a network.
        target: int64 labels `(s, n)`.
        x_test: `(s, n_test, d)`.
        target_test: `(s, n_test)`.
        route: maps gates `(s, m, num_experts)` to a :class:`Dispatch`.
        generator: source of parameters and batches.
        num_experts: number of experts.
        width: of the stem.
        hidden: units of an expert.
        epochs: passes over the data.
        batch_size: tokens routed together; a shorter rest is left out of training and test.
        lr: learning rate of Adam, falling linearly to zero.
        balance: weight of the balancing loss, at least 0.

    Returns:
        An :class:`ExpertsResult`.

    Raises:
        ValueError: shapes do not fit or are empty, fewer examples than a batch, `balance` negative.

    Source: Liu et al. 2023, at the scale of a notebook; Fedus et al. 2022 (balancing loss).

    Example:
        >>> from wellposed.ops.dispatch import expert_choice
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.eye(4).repeat(1, 8, 1), torch.arange(4).repeat(8)[None]
        >>> run = train_experts(x, y, x, y, generator=g, batch_size=8, num_experts=2, epochs=40,
        ...                     route=lambda gates: expert_choice(gates, 4))
        >>> run.test_accuracy.tolist()
        [1.0]
    """
    fits = x.ndim == 3 and x.shape[:2] == target.shape and x_test.shape[:2] == target_test.shape
    if not fits or len(x) != len(x_test) or 0 in x.shape:
        raise ValueError("x must have shape (s, n, d), target (s, n), and the test set likewise")
    if min(x.shape[1], x_test.shape[1]) < batch_size:
        raise ValueError(f"x and x_test must hold a batch of {batch_size} examples")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not balance >= 0:
        raise ValueError(f"balance must be at least 0, got {balance}")
    s, n, dim = x.shape
    classes = int(target.max()) + 1
    net = RoutedExperts(s, dim, num_experts, width, hidden, classes, generator=generator).to(x)
    adam = StackedAdam(net.parameters(), lr=lr)
    steps, step = epochs * (n // batch_size), 0
    losses, coverages = [], []
    for _ in range(epochs):
        loss_sum, covered = x.new_zeros(s), x.new_zeros(s)
        for batch in minibatches(n, batch_size, generator, x.device):
            if len(batch) < batch_size:
                continue
            logits, gates, sent = net(x[:, batch], route)
            each = cross_entropy(logits.mT, target[:, batch], reduction="none").mean(1)
            best = torch.zeros_like(gates).scatter(2, gates.detach().argmax(2, True), 1.0).mean(1)
            penalty = num_experts * (best * gates.mean(1)).sum(1)
            (each + balance * penalty).sum().backward()
            adam.step(1 - step / steps)
            step += 1
            loss_sum += each.detach()
            covered += (sent.copies(batch_size) > 0).to(x.dtype).mean(1)
        losses.append(loss_sum / (n // batch_size))
        coverages.append(covered / (n // batch_size))
    right, reached, places = [], [], []
    with torch.no_grad():
        for batch in torch.arange(x_test.shape[1], device=x.device).split(batch_size):
            if len(batch) == batch_size:
                logits, _, sent = net(x_test[:, batch], route)
                right.append(accuracy(logits, target_test[:, batch]))
                reached.append((sent.copies(batch_size) > 0).to(x.dtype).mean(1))
                places.append(sent.used.to(x.dtype).mean((1, 2)))
    return ExpertsResult(
        test_accuracy=torch.stack(right).mean(0),
        coverage=torch.stack(reached).mean(0),
        load=torch.stack(places).mean(0),
        train_coverage=torch.stack(coverages),
        train_loss=torch.stack(losses),
    )


def _check_shape(name: str, value: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def _check_problem(a: Tensor, b: Tensor, cost: Tensor, k: int, gamma: float) -> None:
    if cost.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cost must be float32 or float64, got {cost.dtype}")
    if not a.dtype == b.dtype == cost.dtype:
        raise TypeError(f"a, b, cost must share a dtype, got {a.dtype}, {b.dtype}, {cost.dtype}")
    if cost.ndim < 2 or 0 in cost.shape:
        raise ValueError(f"cost must have shape (..., m, n), not empty, got {tuple(cost.shape)}")
    _check_shape("a", a, cost.shape[:-1])
    _check_shape("b", b, cost.shape[:-2] + cost.shape[-1:])
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if not cost.isfinite().all():
        raise ValueError("cost must be finite in every entry")
    for name, marginal in (("a", a), ("b", b)):
        if not ((marginal >= 0) & (marginal < math.inf)).all():
            raise ValueError(f"{name} must be finite and at least 0 in every entry")
    mass_a, mass_b = a.sum(-1), b.sum(-1)
    if not ((mass_a - mass_b).abs() <= MASS_TOL * mass_a).all():
        raise ValueError("a and b must have equal mass")
