r"""Block coordinate descent with greedy blocks, Newton updates, trees and active sets.

Julie Nutini, Issam Laradji and Mark Schmidt, "Let's Make Block Coordinate Descent Converge Faster:
Faster Greedy Rules, Message-Passing, Active-Set Complexity, and Superlinear Convergence", JMLR 23,
2022, arXiv 1712.08859.

Claim: choosing blocks by the progress that curvature allows, solving for the whole block, and
taking huge tree-shaped blocks where the problem is sparse each save orders of magnitude of
iterations; with bounds at zero the support is found in finite time and the end is superlinear.

With $g=\nabla f(x)$ and a bound $H\succeq\nabla^2f$, one step on the block $b$ guarantees

$$f(x^+)\le f(x)-\tfrac12g_b^\top H_{bb}^{-1}g_b\quad\text{for}\quad x^+_b=x_b-H_{bb}^{-1}g_b .$$

Departures from the paper: singular blocks are solved with their diagonal scaled to one and raised
by rounding, not by a pseudo-inverse; two-metric projection counts a variable as held at zero up to
1e-10 of the largest one (the authors' code: 1e-4), steps that change $f$ by rounding only pass the
line search, and where 20 halvings do not help a projected gradient step is taken; fixed partitions
of a graph are built first-fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wellposed.ops.curvature import (
    BlockPartition,
    Bound,
    GramBound,
    as_bound,
    check_blocks,
    diagonal_gain,
    divide_or_zero,
    hard_threshold_block,
    solve_semidefinite,
)
from wellposed.ops.graph import (
    GraphQuadratic,
    check_graph,
    forest_block,
    forest_partition,
    label_propagation,
    restrict_to_block,
    solve_forest,
)

__all__ = [
    "BCDResult",
    "GramBound",
    "GraphQuadratic",
    "block_coordinate_descent",
    "forest_block",
    "forest_descent",
    "forest_partition",
    "label_propagation",
    "select_fixed_block",
    "select_variable_block",
    "solve_forest",
]

ARMIJO = 1e-10  # share of the predicted decrease that a step must deliver, as in the authors' code
MAX_HALVINGS = 20  # then a gradient step takes over
HELD = 1e-10  # a variable below this share of the largest counts as zero
BLIND = ("random", "cyclic", "lipschitz")  # rules that do not look at the gradient
VARIABLE_RULES = (*BLIND, "gs", "gsd", "gsq")
FIXED_RULES = (*VARIABLE_RULES, "gsl")
Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BCDResult:
    """The last iterate and what was seen on the way; the start is included."""

    x: Tensor  # (n,)
    objective: Tensor  # (T + 1,)
    support: Tensor  # (T + 1,), int64, numbers of nonzero variables
    residual: Tensor  # 0-d, largest |g_i| (or |x_i - max(x_i - g_i, 0)|) at x: 0 at a solution

    def gap(self, best: float | Tensor) -> Tensor:
        """$(f_t-f^*)/(f_0-f^*)$, `(T + 1,)`; rounding counts as 1e-16."""
        left: Tensor = (self.objective - best) / (self.objective[0] - best)
        return left.clamp(min=1e-16)


# --- selection ------------------------------------------------------------------------------------


def select_variable_block(
    gradient: Tensor,
    size: int,
    rule: str = "gs",
    *,
    lipschitz: Tensor | None = None,
    hessian: Tensor | GramBound | None = None,
    num_iters: int = 10,
) -> Tensor:
    r"""Choose any $k$ coordinates.

    "gs": the largest $|g_i|$; "gsd": the largest $|g_i|/\sqrt{D_i}$; "gsq": approximately the
    largest $g_b^\top H_{bb}^{-1}g_b$, by iterative hard thresholding
    $d\leftarrow\mathcal H_k(d-\mu(g+Hd))$ with $\mu=1/\lambda_{max}(H)$ from
    $d=-g/\sqrt{\mathrm{diag}\,H}$.

    Args:
        gradient: $g$, `(n,)`.
        size: $k$, from 1 to n.
        rule: "gs", "gsd" or "gsq".
        lipschitz: $D_i\ge0$, `(n,)`, for "gsd".
        hessian: the bound $H$, `(n, n)` or a :class:`GramBound`, for "gsq".
        num_iters: hard thresholding steps, at least 1.

    Returns:
        int64 `(size,)`, the most promising first.

    Raises:
        ValueError: an unknown rule, a bound it needs is missing or misshapen, numbers out of range.
        TypeError: a bound of another dtype.

    Source: sections on greedy rules and on variable blocks; hard thresholding as in their code.

    Example:
        >>> g, L = torch.tensor([4.0, 3.0, 1.0]), torch.tensor([16.0, 1.0, 1.0])
        >>> select_variable_block(g, 2), select_variable_block(g, 2, "gsd", lipschitz=L)
        (tensor([0, 1]), tensor([1, 0]))
    """
    n = _check_vector("gradient", gradient)
    _check_rule(rule, ("gs", "gsd", "gsq"))
    _check_size("size", size, n)
    if rule == "gs":
        return torch.topk(gradient.abs(), size).indices
    if rule == "gsd":
        return torch.topk(
            diagonal_gain(gradient, _needed("lipschitz", lipschitz, rule, n)), size
        ).indices
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {num_iters}")
    bound = as_bound(hessian, n, dtype=gradient.dtype)
    return hard_threshold_block(gradient, size, bound, _safe_step(bound), num_iters)


def select_fixed_block(
    gradient: Tensor,
    blocks: Sequence[Tensor],
    rule: str = "gs",
    *,
    lipschitz: Tensor | None = None,
    hessian: Tensor | GramBound | None = None,
) -> int:
    r"""Choose one of given blocks.

    "gs": the largest $\lVert g_b\rVert^2$; "gsl": $\lVert g_b\rVert^2/L_b$; "gsd":
    $\sum_{i\in b}g_i^2/D_i$; "gsq": $g_b^\top H_{bb}^{-1}g_b$, twice the guaranteed decrease.

    Args:
        gradient: $g$, `(n,)`.
        blocks: int64 tensors of coordinates, of any lengths from 1.
        rule: "gs", "gsl", "gsd" or "gsq".
        lipschitz: $D_i\ge0$, `(n,)`, for "gsd".
        hessian: the bound $H$, `(n, n)` or a :class:`GramBound`, for "gsl" and "gsq".

    Returns:
        The position in `blocks`.

    Raises:
        ValueError: an unknown rule, what the rule needs is missing or misshapen, bad blocks.
        TypeError: a bound of another dtype.

    Source: section on greedy rules; squared 2-norms as in the paper (the authors' code sums
    absolute values).

    Example:
        >>> g, L = torch.tensor([4.0, 3.0, 1.0]), torch.tensor([16.0, 1.0, 1.0])
        >>> blocks = [torch.tensor([0]), torch.tensor([1, 2])]
        >>> select_fixed_block(g, blocks), select_fixed_block(g, blocks, "gsd", lipschitz=L)
        (0, 1)
    """
    n = _check_vector("gradient", gradient)
    _check_rule(rule, ("gs", "gsl", "gsd", "gsq"))
    check_blocks(blocks, n)
    bound = as_bound(hessian, n, dtype=gradient.dtype) if rule in ("gsl", "gsq") else None
    partition = BlockPartition.of(blocks, n, bound)
    curvature = partition.lipschitz() if rule == "gsl" else gradient
    if rule == "gsd":
        curvature = _needed("lipschitz", lipschitz, rule, n)
    return int(partition.scores(gradient, rule, curvature).argmax())


def _safe_step(bound: Bound) -> float:
    """The inverse of the largest eigenvalue; any step will do where the bound is zero."""
    largest = float(bound.largest_eigenvalue())
    return 1 / largest if largest > 0 else 1.0


Chooser = Callable[[Tensor, Tensor, int], Tensor]  # gradient, x, iteration -> block


def _variable_chooser(
    rule: str, bound: Bound, diagonal: Tensor, size: int, generator: torch.Generator | None
) -> Chooser:
    n, place = len(diagonal), diagonal.device
    home = place if generator is None else generator.device
    if rule == "gs":
        return lambda gradient, x, t: torch.topk(gradient.abs(), size).indices
    if rule == "gsd":
        return lambda gradient, x, t: torch.topk(diagonal_gain(gradient, diagonal), size).indices
    if rule == "gsq":
        step = _safe_step(bound)
        return lambda gradient, x, t: hard_threshold_block(gradient, size, bound, step, 10)
    if rule == "lipschitz":
        weights = bound.diagonal().to(home)
        pick = partial(torch.multinomial, weights, size, generator=generator)
        return lambda gradient, x, t: pick().to(place)
    turns = n // size if rule == "cyclic" else 1
    order = torch.empty(0)

    def draw(gradient: Tensor, x: Tensor, t: int) -> Tensor:
        nonlocal order
        turn = t % turns
        if turn == 0:
            order = torch.randperm(n, generator=generator, device=home).to(place)
        return order[turn * size : (turn + 1) * size]

    return draw


def _fixed_chooser(
    rule: str,
    bound: Bound,
    diagonal: Tensor,
    blocks: Sequence[Tensor],
    generator: torch.Generator | None,
) -> Chooser:
    if rule == "cyclic":
        return lambda gradient, x, t: blocks[t % len(blocks)]
    partition = BlockPartition.of(blocks, len(diagonal), bound)
    curvature = partition.lipschitz() if rule in ("gsl", "lipschitz") else diagonal
    if rule in ("random", "lipschitz"):
        weights = curvature if rule == "lipschitz" else curvature.new_ones(len(blocks))
        weights = weights if generator is None else weights.to(generator.device)
        return lambda gradient, x, t: blocks[int(weights.multinomial(1, generator=generator))]
    return lambda gradient, x, t: blocks[int(partition.scores(gradient, rule, curvature).argmax())]


def _constrained_chooser(diagonal: Tensor, size: int, blocks: Sequence[Tensor] | None) -> Chooser:
    if blocks is None:
        return lambda gradient, x, t: torch.topk(diagonal_gain(gradient, diagonal, x), size).indices
    whole = BlockPartition.of(blocks, len(diagonal), None)
    gain = lambda gradient, x: whole.gather(diagonal_gain(gradient, diagonal, x)).sum(1)  # noqa: E731
    return lambda gradient, x, t: blocks[int(gain(gradient, x).argmax())]


# --- updates --------------------------------------------------------------------------------------


Point = tuple[Tensor, Tensor, Tensor]  # x, value, gradient


@torch.enable_grad()
def _forward(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    return leaf, objective(leaf)


def _evaluate(objective: Objective, x: Tensor) -> Point:
    leaf, value = _forward(objective, x)
    return x, value.detach(), torch.autograd.grad(value, leaf)[0]


def _newton_direction(
    x: Tensor, gradient: Tensor, block: Tensor, matrix: Tensor, nonnegative: bool
) -> Tensor:
    """Newton's direction; if `nonnegative`, variables held at zero go to zero and drop out."""
    here, slope = x[block], gradient[block]
    if not nonnegative:
        return -solve_semidefinite(matrix, slope)
    held = ((here <= HELD * x.abs().max()) | (matrix.diagonal() <= 0)) & (slope > 0)
    free_matrix = torch.where(held[:, None] | held, 0.0, matrix)
    newton = solve_semidefinite(free_matrix, torch.where(held, 0.0, slope))
    return torch.where(held, -here, -newton)


def _guarded_step(
    objective: Objective, point: Point, block: Tensor, direction: Tensor, nonnegative: bool
) -> Point | None:
    """Halve a step until the objective falls; None if it never does."""
    x, value, gradient = point
    here, slope, length = x[block], gradient[block], 1.0
    # Near the solution the decrease drowns in rounding: a step that only rounds must pass.
    slack = 4 * torch.finfo(x.dtype).eps * value.abs()
    for _ in range(MAX_HALVINGS):
        moved = here + length * direction
        moved = moved.clamp(min=0) if nonnegative else moved
        candidate = x.index_copy(0, block, moved)
        leaf, new = _forward(objective, candidate)
        if new.detach() <= value + ARMIJO * (slope @ (moved - here)) + slack:
            return candidate, new.detach(), torch.autograd.grad(new, leaf)[0]
        length /= 2
    return None


@torch.no_grad()
def block_coordinate_descent(
    objective: Objective,
    hessian: Tensor | GramBound,
    x0: Tensor,
    *,
    block_size: int,
    rule: str = "gsd",
    update: str = "newton",
    num_iters: int = 100,
    blocks: Sequence[Tensor] | None = None,
    nonnegative: bool = False,
    generator: torch.Generator | None = None,
    lipschitz: Tensor | None = None,
    block_hessian: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> BCDResult:
    r"""Minimize a smooth function, one block of variables at a time.

    "gradient": $x_b\leftarrow x_b-g_b/\lambda_{max}(H_{bb})$; "newton":
    $x_b\leftarrow x_b-H_{bb}^{-1}g_b$. Under $x\ge0$ the first is projected, and the second becomes
    two-metric projection: variables at zero with $g_i>0$ are held, the others take Newton's step,
    the result is projected and the step halved until $f$ falls (or replaced by a gradient step).

    Args:
        objective: $f$, maps `(n,)` to a 0-d tensor; automatic differentiation supplies $g$.
        hessian: $H\succeq\nabla^2f$, `(n, n)` or a :class:`GramBound`.
        x0: the start, `(n,)`, float32 or float64.
        block_size: $k$, from 1 to n; variable blocks have this size.
        rule: "random", "cyclic", "lipschitz" (drawn with probability $L_i$ or $L_b$), "gs", "gsd",
            "gsq", and for fixed blocks "gsl". Under `nonnegative` every greedy rule takes the
            coordinates with the largest guaranteed decrease that keeps $x\ge0$.
        update: "gradient" or "newton".
        num_iters: steps, at least 0.
        blocks: fixed blocks, int64 tensors; variable blocks if not given.
        nonnegative: keep $x\ge0$.
        generator: source of randomness for "random", "cyclic" and "lipschitz".
        lipschitz: $D_i$ of the rule "gsd", `(n,)`; the diagonal of $H$ if not given.
        block_hessian: $(x,b)\mapsto\nabla^2_{bb}f(x)$, `(k, k)`; if given, "newton" uses it in the
            place of $H_{bb}$, with a line search.

    Returns:
        A :class:`BCDResult`; its `residual` says how far from a solution it stopped.

    Raises:
        ValueError: an unknown rule or update, sizes out of range, shapes that do not fit, a start
            outside the orthant, an objective that is not 0-d.
        TypeError: `x0` is not float32 or float64, or `hessian` has another dtype.

    Source: Algorithm 1 and the sections on rules, updates and two-metric projection.

    Example:
        >>> H, b = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([3.0, 3.0])
        >>> f = lambda x: x @ H @ x / 2 - b @ x
        >>> block_coordinate_descent(f, H, torch.zeros(2), block_size=2, num_iters=1).x
        tensor([1.0000, 1.0000])
    """
    n = _check_vector("x0", x0)
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x0 must be float32 or float64, got {x0.dtype}")
    bound = as_bound(hessian, n, dtype=x0.dtype)
    _check_rule(rule, VARIABLE_RULES if blocks is None else FIXED_RULES)
    _check_rule(update, ("gradient", "newton"), name="update")
    _check_size("block_size", block_size, n)
    if num_iters < 0:
        raise ValueError(f"num_iters must be at least 0, got {num_iters}")
    if blocks is not None:
        check_blocks(blocks, n)
    if nonnegative and not (x0 >= 0).all():
        raise ValueError("x0 must be at least 0 in every entry with nonnegative=True")
    diagonal = bound.diagonal() if lipschitz is None else _needed("lipschitz", lipschitz, rule, n)
    if nonnegative and rule not in BLIND:
        choose = _constrained_chooser(diagonal, block_size, blocks)
    elif blocks is None:
        choose = _variable_chooser(rule, bound, diagonal, block_size, generator)
    else:
        choose = _fixed_chooser(rule, bound, diagonal, blocks, generator)
    point = _evaluate(objective, x0.clone())
    if point[1].ndim:
        raise ValueError(f"objective must return a 0-d tensor, got shape {tuple(point[1].shape)}")
    values, support = [point[1]], [(x0 != 0).sum()]
    for t in range(num_iters):
        x, _, gradient = point
        block, found = choose(gradient, x, t), None
        if update == "newton":
            matrix = bound.block(block) if block_hessian is None else block_hessian(x, block)
            direction = _newton_direction(x, gradient, block, matrix, nonnegative)
            if nonnegative or block_hessian is not None:
                found = _guarded_step(objective, point, block, direction, nonnegative)
            else:
                found = _evaluate(objective, x.index_add(0, block, direction))
        if found is None:  # also where no length of Newton's step helped: this step is safe
            largest = torch.linalg.eigvalsh(bound.block(block))[-1]
            moved = x[block] - divide_or_zero(gradient[block], largest)
            moved = moved.clamp(min=0) if nonnegative else moved
            found = _evaluate(objective, x.index_copy(0, block, moved))
        point = found
        values.append(point[1])
        support.append((point[0] != 0).sum())
    x, _, gradient = point
    gap = x - (x - gradient).clamp(min=0) if nonnegative else gradient
    return BCDResult(x, torch.stack(values), torch.stack(support), gap.abs().max())


# --- message passing on forests -------------------------------------------------------------------


@torch.no_grad()
def forest_descent(
    diagonal: Tensor,
    edges: Tensor,
    weights: Tensor,
    rhs: Tensor,
    x0: Tensor,
    *,
    rule: str = "gsd",
    num_iters: int = 100,
    blocks: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> BCDResult:
    r"""Minimize $\frac12x^\top Hx-r^\top x$ for a sparse $H$ with exact steps on forests.

    A step costs time in proportion to the edges: gradient, block and system.

    Args:
        diagonal: diagonal of $H$, `(n,)`; $H$ is positive definite.
        edges: int64 `(m, 2)`, each pair once.
        weights: entries of $H$ off its diagonal, `(m,)`.
        rhs: $r$, `(n,)`.
        x0: the start, `(n,)`.
        rule: order in which nodes are offered to :func:`forest_block` in each step: "gsd" by
            $|g_i|/\sqrt{L_i}$, "gs" by $|g_i|$, "random".
        num_iters: steps, at least 0.
        blocks: fixed forests, taken in turn instead.
        generator: source of randomness for "random".

    Returns:
        A :class:`BCDResult`.

    Raises:
        ValueError: as :func:`solve_forest`, an unknown rule, a block with a cycle.

    Source: section on message passing; experiment with data sets D and E.

    Example:
        >>> d, r = torch.tensor([2.0, 2.0]), torch.tensor([3.0, 3.0])
        >>> problem = d, torch.tensor([[0, 1]]), torch.ones(1), r
        >>> forest_descent(*problem, torch.zeros(2), num_iters=1).objective.tolist()
        [0.0, -3.0]
    """
    n = check_graph(diagonal, edges, weights, rhs)
    _check_rule(rule, ("random", "gs", "gsd"))
    if x0.shape != rhs.shape:
        raise ValueError(f"x0 must have shape ({n},), got {tuple(x0.shape)}")
    problem = GraphQuadratic(diagonal, edges, weights, rhs, torch.arange(n))
    if blocks is not None:
        check_blocks(blocks, n)
    fixed = [restrict_to_block(block, edges, n) for block in blocks or ()]
    adjacency = () if fixed else problem.adjacency()
    home = "cpu" if generator is None else generator.device
    x, values, support = x0.clone(), [], []
    for t in range(num_iters + 1):
        gradient = problem.product(x) - rhs
        values.append((x * (gradient - rhs)).sum() / 2)
        support.append((x != 0).sum())
        if t == num_iters:
            break
        if fixed:
            inside, kept, plan = fixed[t % len(fixed)]
        else:
            score = gradient.abs() if rule == "gs" else diagonal_gain(gradient, diagonal)
            if rule == "random":
                score = torch.rand(n, generator=generator, device=home).to(score)
            block = forest_block(score.argsort(descending=True), adjacency)
            inside, kept, plan = restrict_to_block(block, edges, n)
        # Outside the block there is no edge and nothing on the right-hand side: no step.
        x = x + plan.solve(diagonal, weights[kept], torch.where(inside, -gradient, 0.0))
    return BCDResult(x, torch.stack(values), torch.stack(support), gradient.abs().max())


# --- checks ---------------------------------------------------------------------------------------


def _check_vector(name: str, value: Tensor) -> int:
    if value.ndim != 1 or not len(value) or not value.is_floating_point():
        raise ValueError(f"{name} must be floating and of shape (n,), got {tuple(value.shape)}")
    return len(value)


def _check_rule(rule: str, known: Sequence[str], *, name: str = "rule") -> None:
    if rule not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {rule!r}")


def _check_size(name: str, size: int, n: int) -> None:
    if not 1 <= size <= n:
        raise ValueError(f"{name} must lie between 1 and {n}, got {size}")


def _needed(name: str, value: Tensor | None, rule: str, n: int) -> Tensor:
    if value is None or value.shape != (n,) or not (value >= 0).all():
        raise ValueError(f"{name} must be at least 0 and of shape ({n},) with rule {rule!r}")
    return value
