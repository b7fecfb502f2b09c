"""Every operation of `wellposed.ops` beside what one would write first, or another library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import torch
from scipy import optimize, sparse
from scipy.sparse.linalg import eigsh
from sklearn.linear_model import Lasso, Ridge
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from contest import OURS, Contender, contest, loosest
from wellposed.nets import MLP
from wellposed.ops.channel_masks import conv_macs
from wellposed.ops.confidence import aurc, expected_calibration_error, fit_temperature
from wellposed.ops.curvature import GramBound
from wellposed.ops.dispatch import token_choice
from wellposed.ops.graph import nearest_neighbor_edges, solve_forest
from wellposed.ops.hessian import hessian_trace, per_sample_jacobian, top_eigenvalue
from wellposed.ops.lasso import lasso
from wellposed.ops.lbfgs import minimize_lbfgs
from wellposed.ops.multitask import fit_statistics, task_statistics
from wellposed.ops.ridge import ridge_leave_one_out
from wellposed.ops.sde import brownian_path, sdeint_rows
from wellposed.ops.simplex import project_simplex, project_sparse_simplex
from wellposed.ops.sinkhorn import sinkhorn_scaling

NAIVE = "plain loop"
F64 = torch.float64


def draws(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def distance(expected: Any) -> Callable[[Any], float]:
    """Largest difference from what is expected, relative to its size."""
    truth = torch.as_tensor(expected, dtype=F64)

    def error(found: Any) -> float:
        gap = (torch.as_tensor(found, dtype=F64) - truth).abs().max()
        return float(gap / truth.abs().max().clamp_min(1e-12))

    return error


def rivals(calls: dict[str, Callable[[], Any]], expected: Any = None) -> dict[str, Contender]:
    """Contenders that must agree with `expected`; if there is none, with ours."""
    error = distance(calls[OURS]() if expected is None else expected)
    return {name: Contender(call, error) for name, call in calls.items()}


# --- confidence ---------------------------------------------------------------------------------


def predictions(n: int, classes: int) -> tuple[Tensor, Tensor]:
    logits = 2 * draws(n, classes)
    g = torch.Generator().manual_seed(1)
    labels = torch.multinomial((logits / 1.5).softmax(1), 1, generator=g)[:, 0]
    return logits, labels


@contest(OURS, "torchmetrics", goal=1e-5)
def test_calibration_error(small: bool) -> dict[str, Contender]:
    """Expected calibration error of 10,000 predictions in 100 classes."""
    logits, labels = predictions(*((50, 3) if small else (10_000, 100)))
    probs = logits.softmax(1)
    return rivals(
        {
            OURS: lambda: expected_calibration_error(probs, labels),
            "torchmetrics": lambda: multiclass_calibration_error(
                probs, labels, num_classes=probs.shape[1], n_bins=10, validate_args=False
            ),
        }
    )


@contest(OURS, NAIVE, goal=1e-9)
def test_aurc(small: bool) -> dict[str, Contender]:
    """Area under the risk-coverage curve of 2,000 predictions."""
    logits, labels = predictions(50 if small else 2000, 10)
    probs = logits.softmax(1)

    def naive() -> float:
        sure, said = probs.max(1)
        wrong = (said != labels).double()[sure.argsort(descending=True, stable=True)]
        return float(sum(wrong[:k].mean() for k in range(1, len(wrong) + 1)) / len(wrong))

    return rivals({OURS: lambda: aurc(probs, labels), NAIVE: naive})


@contest(OURS, "torch LBFGS", goal=1e-4)
def test_temperature(small: bool) -> dict[str, Contender]:
    """Temperature that minimizes the likelihood loss of 5,000 predictions."""
    logits, labels = predictions(50 if small else 5000, 10)

    def plain() -> float:
        log_t = torch.zeros((), dtype=F64, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_t], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(logits / log_t.exp(), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        return float(log_t.detach().exp())

    return rivals({OURS: lambda: fit_temperature(logits, labels), "torch LBFGS": plain})


# --- curvature, Hessians ------------------------------------------------------------------------


@contest(OURS, "dense matrix", goal=1e-9)
def test_gram_block(small: bool) -> dict[str, Contender]:
    """A 50 x 50 block of the Gram matrix of 500 x 2,000 features."""
    rows, columns, size = (20, 30, 5) if small else (500, 2000, 50)
    features = draws(rows, columns)
    block = torch.randperm(columns, generator=torch.Generator().manual_seed(0))[:size]
    return rivals(
        {
            OURS: lambda: GramBound(features).block(block),
            "dense matrix": lambda: (features.T @ features)[block][:, block],
        }
    )


def network(small: bool) -> tuple[nn.Module, Callable[[], Tensor], Tensor]:
    """A small classifier, its loss, and its Hessian."""
    torch.manual_seed(0)
    model = MLP([4, 3, 2] if small else [20, 16, 5]).double()
    x, y = draws(64, 4 if small else 20), torch.arange(64) % (2 if small else 5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    return model, loss, full_hessian(model, loss)


def full_hessian(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Row by row, by differentiating twice."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(v, parameters, retain_graph=True) for v in flat]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


@contest(OURS, "full Hessian", "scipy eigsh", goal=1e-3)
def test_top_eigenvalue(small: bool) -> dict[str, Contender]:
    """Largest eigenvalue of the Hessian of a network with 421 weights."""
    model, loss, exact = network(small)
    parameters = list(model.parameters())

    def arpack() -> float:
        grads = torch.autograd.grad(loss(), parameters, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in grads])

        def product(v: np.ndarray) -> np.ndarray:
            along = torch.autograd.grad(
                flat, parameters, torch.from_numpy(v.ravel()), retain_graph=True
            )
            return torch.cat([g.reshape(-1) for g in along]).numpy()

        operator = sparse.linalg.LinearOperator((len(flat),) * 2, matvec=product, dtype=np.float64)
        start = draws(len(flat)).numpy()
        return float(eigsh(operator, k=1, which="LA", tol=1e-3, v0=start)[0][0])

    g = torch.Generator()
    return rivals(
        {
            OURS: lambda: top_eigenvalue(loss, parameters, generator=g.manual_seed(0)).value,
            "full Hessian": lambda: torch.linalg.eigvalsh(full_hessian(model, loss))[-1],
            "scipy eigsh": arpack,
        },
        torch.linalg.eigvalsh(exact)[-1],
    )


@contest(OURS, "full Hessian", goal=0.25)
def test_hessian_trace(small: bool) -> dict[str, Contender]:
    """Trace of the Hessian of that network to 25 %, from 30 random probes."""
    model, loss, exact = network(small)
    parameters, g = list(model.parameters()), torch.Generator()
    probes = 2000 if small else 30  # few weights need many probes
    return rivals(
        {
            OURS: lambda: (
                hessian_trace(loss, parameters, probes=probes, generator=g.manual_seed(0)).trace
            ),
            "full Hessian": lambda: full_hessian(model, loss).trace(),
        },
        exact.trace(),
    )


@contest(OURS, NAIVE, goal=1e-9)
def test_jacobian(small: bool) -> dict[str, Contender]:
    """Gradient of each of 128 outputs in all weights."""
    torch.manual_seed(0)
    model = nn.Sequential(MLP([10, 16, 1]).double(), nn.Flatten(0))
    x = draws(4 if small else 128, 10)

    def naive() -> Tensor:
        rows = [torch.autograd.grad(model(one[None])[0], list(model.parameters())) for one in x]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])

    return rivals({OURS: lambda: per_sample_jacobian(model, x), NAIVE: naive})


# --- dispatch, channel masks --------------------------------------------------------------------


@contest(OURS, NAIVE, goal=0.0)
def test_token_choice(small: bool) -> dict[str, Contender]:
    """1,024 tokens choose among 16 experts with 64 places each."""
    m, n, capacity = (8, 2, 3) if small else (1024, 16, 64)
    scores = draws(m, n)

    def ours() -> Tensor:
        chosen = token_choice(scores, capacity)
        return torch.where(chosen.used, chosen.tokens, -1)

    def naive() -> Tensor:
        places: list[list[int]] = [[] for _ in range(n)]
        for token, row in enumerate(scores.tolist()):
            expert = row.index(max(row))
            if len(places[expert]) < capacity:
                places[expert].append(token)
        return torch.tensor([p + [-1] * (capacity - len(p)) for p in places])

    return rivals({OURS: ours, NAIVE: naive})


@contest(OURS, NAIVE, goal=0.0)
def test_conv_macs(small: bool) -> dict[str, Contender]:
    """Multiply-adds of 256 samples through six masked convolutions."""
    n = 4 if small else 256
    layers = [(3, 32, 3, 16, 16), *[(32, 32, 3, 16, 16)] * 5]
    masks = [(draws(n, 32, seed=k) > 0).double() for k in range(6)]

    def naive() -> Tensor:
        counts = []
        for i in range(n):
            kept, total = layers[0][0], 0.0
            for mask, (_, _, kernel, height, width) in zip(masks, layers):
                now = int(mask[i].sum())
                total += kernel**2 * height * width * kept * now
                kept = now
            counts.append(total)
        return torch.tensor(counts)

    return rivals({OURS: lambda: conv_macs(masks, layers), NAIVE: naive})


# --- graphs -------------------------------------------------------------------------------------


@contest(OURS, "dense solve", "scipy sparse", goal=1e-9)
def test_forest(small: bool) -> dict[str, Contender]:
    """A linear system on a random tree of 2,000 nodes."""
    n = 12 if small else 2000
    g = torch.Generator().manual_seed(0)
    parent = (torch.rand(n - 1, generator=g) * torch.arange(1, n)).long()
    edges = torch.stack([parent, torch.arange(1, n)], 1)
    weights, rhs = draws(n - 1), draws(n, seed=1)
    diagonal = torch.ones(n, dtype=F64).index_add(
        0, edges.flatten(), weights.abs().repeat_interleave(2)
    )
    ends = edges.numpy()
    values = np.concatenate([diagonal.numpy(), weights.numpy(), weights.numpy()])
    place = np.concatenate([np.stack([np.arange(n)] * 2), ends.T, ends.T[::-1]], 1)

    def dense() -> Tensor:
        matrix = torch.diag(diagonal)
        matrix[edges[:, 0], edges[:, 1]] = weights
        matrix[edges[:, 1], edges[:, 0]] = weights
        return torch.linalg.solve(matrix, rhs)

    def scipy() -> Any:
        return sparse.linalg.spsolve(sparse.csc_matrix((values, place)), rhs.numpy())

    return rivals(
        {
            OURS: lambda: solve_forest(diagonal, edges, weights, rhs),
            "dense solve": dense,
            "scipy sparse": scipy,
        }
    )


@contest(OURS, "scikit-learn", goal=0.0)
def test_neighbors(small: bool) -> dict[str, Contender]:
    """Edges to the 5 nearest neighbors of 1,000 points in 2 dimensions."""
    points = draws(20 if small else 1000, 2)

    def scikit() -> Any:
        graph = kneighbors_graph(points.numpy(), 5)
        pairs = np.sort(np.stack(graph.nonzero(), 1), 1)
        return np.unique(pairs, axis=0)

    return rivals({OURS: lambda: nearest_neighbor_edges(points, 5), "scikit-learn": scikit})


# --- linear models ------------------------------------------------------------------------------


@contest(OURS, "scikit-learn", goal=1e-5)
def test_lassos(small: bool) -> dict[str, Contender]:
    """64 lasso problems of 50 x 30 side by side."""
    problems = 2 if small else 64
    a, b, alpha = draws(problems, 50, 30), draws(problems, 50, seed=1), 5.0

    def objective(x: Any) -> float:
        x = torch.as_tensor(x, dtype=F64)
        left = (a @ x[..., None])[..., 0] - b
        return float((left.square().sum(-1) / 2 + alpha * x.abs().sum(-1)).sum())

    def scikit(tol: float) -> np.ndarray:
        return np.stack(
            [
                Lasso(alpha=alpha / 50, fit_intercept=False, tol=tol).fit(m, v).coef_
                for m, v in zip(a.numpy(), b.numpy())
            ]
        )

    best = min(objective(lasso(a, b, alpha)), objective(scikit(1e-12)))

    def error(x: Any) -> float:
        return objective(x) / best - 1

    return {
        OURS: Contender(lambda: lasso(a, b, alpha), error),
        "scikit-learn": loosest([1e-3, 1e-4, 1e-5, 1e-6], scikit, error, 1e-5),
    }


@contest(OURS, NAIVE, goal=1e-8)
def test_ridge(small: bool) -> dict[str, Contender]:
    """Ridge with the best of 20 strengths by leave-one-out, 60 x 10, against refitting each."""
    n, d = (8, 2) if small else (60, 10)
    x, y, ridges = draws(n, d), draws(n, seed=1), [10.0 ** (k / 5 - 3) for k in range(20)]

    def naive() -> Any:
        def error(strength: float) -> float:
            total = 0.0
            for i in range(n):
                kept = torch.arange(n) != i
                model = Ridge(alpha=n * strength, fit_intercept=False)
                model.fit(x[kept].numpy(), y[kept].numpy())
                total += float(y[i] - x[i].numpy() @ model.coef_) ** 2
            return total

        best = min(ridges, key=error)
        return Ridge(alpha=n * best, fit_intercept=False).fit(x.numpy(), y.numpy()).coef_

    return rivals({OURS: lambda: ridge_leave_one_out(x, y, ridges), NAIVE: naive})


@contest(OURS, "scipy L-BFGS-B, one at a time", goal=1e-6)
def test_lbfgs(small: bool) -> dict[str, Contender]:
    """64 logistic regressions of 50 x 20 side by side."""
    problems = 2 if small else 64
    x, y = draws(problems, 50, 20), draws(problems, 50, seed=1).sign()

    def objective(w: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        margin = y * (x @ w[..., None])[..., 0]
        value = nn.functional.softplus(-margin).mean(-1) + 0.01 * w.square().sum(-1)
        slope = -y * torch.sigmoid(-margin) / y.shape[-1]
        return value, (x.mT @ slope[..., None])[..., 0] + 0.02 * w

    def scipy() -> np.ndarray:
        found = []
        for one, sign in zip(x, y):

            def plain(w: np.ndarray, one: Tensor = one, sign: Tensor = sign) -> tuple:
                value, grad = objective(torch.from_numpy(w), one, sign)
                return float(value), grad.numpy()

            found.append(
                optimize.minimize(
                    plain, np.zeros(20), jac=True, method="L-BFGS-B", options={"ftol": 1e-13}
                ).x
            )
        return np.stack(found)

    best = objective(
        minimize_lbfgs(lambda w: objective(w, x, y), torch.zeros_like(x[:, 0])).x, x, y
    )

    def error(w: Any) -> float:
        value, _ = objective(torch.as_tensor(w), x, y)
        return float((value - best[0]).abs().max())

    start = torch.zeros_like(x[:, 0])
    return {
        OURS: Contender(lambda: minimize_lbfgs(lambda w: objective(w, x, y), start).x, error),
        "scipy L-BFGS-B, one at a time": Contender(scipy, error),
    }


@contest(OURS, NAIVE, goal=1e-3)
def test_multitask(small: bool) -> dict[str, Contender]:
    """A basis of rank 2 shared by 40 tasks of 30 samples in 10 dimensions."""
    tasks, n, d, k = (5, 8, 3, 1) if small else (40, 30, 10, 2)
    basis, heads = torch.linalg.qr(draws(d, k))[0], draws(k, tasks, seed=1)
    inputs = [draws(n, d, seed=2 + m) for m in range(tasks)]
    targets = [x @ basis @ heads[:, m] for m, x in enumerate(inputs)]

    def ours() -> Tensor:
        return fit_statistics(task_statistics(inputs, targets), k).basis

    def naive() -> Tensor:
        shared = torch.linalg.qr(draws(d, k, seed=99))[0]
        for _ in range(60):
            w = [
                torch.linalg.lstsq(x @ shared, y[:, None]).solution for x, y in zip(inputs, targets)
            ]
            design = torch.cat([torch.kron(x, head.T) for x, head in zip(inputs, w)])
            shared = torch.linalg.lstsq(design, torch.cat(targets)[:, None]).solution.reshape(d, k)
            shared = torch.linalg.qr(shared)[0]
        return shared

    def error(found: Any) -> float:
        return float((found @ (found.mT @ basis) - basis).norm())

    return {OURS: Contender(ours, error), NAIVE: Contender(naive, error)}


# --- simplex, scaling ---------------------------------------------------------------------------


@contest(OURS, "POT", NAIVE, goal=1e-6)
def test_simplex(small: bool) -> dict[str, Contender]:
    """Projection of 512 vectors of 64 onto the simplex."""
    x = draws(*((3, 5) if small else (512, 64)))

    def naive() -> Tensor:
        rows = []
        for row in x:
            low, high = float(row.max()) - 1.0, float(row.max())
            for _ in range(40):
                middle = (low + high) / 2
                if float((row - middle).clamp_min(0).sum()) > 1:
                    low = middle
                else:
                    high = middle
            rows.append((row - high).clamp_min(0))
        return torch.stack(rows)

    return rivals(
        {
            OURS: lambda: project_simplex(x),
            "POT": lambda: ot.utils.proj_simplex(x.numpy().T).T,
            NAIVE: naive,
        }
    )


@contest(OURS, NAIVE, goal=1e-9)
def test_sparse_simplex(small: bool) -> dict[str, Contender]:
    """Projection of 512 vectors of 64 onto the simplex, at most 8 entries left."""
    x, k = draws(*((3, 5) if small else (512, 64))), 2 if small else 8

    def naive() -> Tensor:
        rows = []
        for row in x:
            top, place = row.sort(descending=True)
            top, place = top[:k], place[:k]
            total = (top.cumsum(0) - 1) / torch.arange(1, k + 1)
            size = int((top > total).sum())
            rows.append(
                torch.zeros_like(row).scatter(0, place, (top - total[size - 1]).clamp_min(0))
            )
        return torch.stack(rows)

    return rivals({OURS: lambda: project_sparse_simplex(x, k), NAIVE: naive})


@contest(OURS, "POT", NAIVE, goal=1e-8)
def test_scaling(small: bool) -> dict[str, Contender]:
    """Sinkhorn scaling of a 256 x 256 kernel, eta = 50, to a marginal error of 1e-8."""
    n = 16 if small else 256
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    r, eta, goal = cost.new_full((n,), 1 / n), 50.0, 1e-8
    table, mass = cost.numpy(), r.numpy()

    def error(plan: Any) -> float:
        plan = torch.as_tensor(plan)
        return float((plan.sum(1) - r).abs().sum() + (plan.sum(0) - r).abs().sum())

    def pot(tol: float) -> np.ndarray:
        return ot.sinkhorn(mass, mass, table, 1 / eta, stopThr=tol, numItermax=9999, warn=False)

    def naive() -> Tensor:
        f, h, log_r = torch.zeros_like(r), torch.zeros_like(r), r.log()
        for _ in range(9999):
            f = log_r - (-eta * cost + h).logsumexp(1)
            h = log_r - (-eta * cost + f[:, None]).logsumexp(0)
            plan = (-eta * cost + f[:, None] + h).exp()
            if error(plan) <= goal:
                return plan
        raise RuntimeError("no convergence")

    return {
        OURS: Contender(lambda: sinkhorn_scaling(-eta * cost, r, r, tol=goal).plan, error),
        "POT": loosest([goal, goal / 3, goal / 10], pot, error, goal),
        NAIVE: Contender(naive, error),
    }


# --- stochastic differential equations ----------------------------------------------------------


@contest(OURS, "Euler-Maruyama", goal=2e-3)
def test_sde(small: bool) -> dict[str, Contender]:
    """Geometric Brownian motion of 256 paths to a mean error of 0.002."""
    rows = 4 if small else 256
    drift, noise, goal = 0.5, 0.4, 2e-3
    path = brownian_path(
        (rows, 1), generator=torch.Generator().manual_seed(0), cells=4096, like=draws(1)
    )
    start = torch.ones(rows, 1, dtype=F64)
    end = path.values[-1] * noise + (drift - noise**2 / 2)

    def error(y: Any) -> float:
        return float((y - end.exp()).abs().mean())

    def ours(tol: float) -> Tensor:
        return sdeint_rows(
            lambda t, y: drift * y, lambda t, y: noise * y, start, path, rtol=tol, atol=tol
        ).y

    def euler(steps: int) -> Tensor:
        y, skip = start, 4096 // steps
        for k in range(steps):
            dw = path.values[(k + 1) * skip] - path.values[k * skip]
            y = y + drift * y / steps + noise * y * dw
        return y

    return {
        OURS: loosest([10.0 ** (-k / 2) for k in range(-4, 9)], ours, error, goal),
        "Euler-Maruyama": loosest([2**k for k in range(3, 13)], euler, error, goal),
    }
