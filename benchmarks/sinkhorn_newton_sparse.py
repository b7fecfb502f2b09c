"""Sinkhorn-Newton-Sparse beside POT, geomloss and ott-jax, to a marginal error of 1e-10.

Each peer runs the variant that is cheapest on the problem, and no longer than it needs: its
tolerance or number of sweeps is the loosest that reaches the goal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ot
import pytest
import torch

from contest import OURS, Contender, contest, loosest
from wellposed.methods.transport.sinkhorn_newton import (
    random_assignment,
    sinkhorn_newton_sparse,
)

GOAL = 1e-10
SWEEPS = [100, 400]  # geomloss has no tolerance, its sweeps anneal to the same eta


def contenders(problem: tuple, eta: float, kept: int, kernel: bool) -> dict[str, Contender]:
    """All four solvers; `kernel` says whether exp(-eta C) can be used without underflow."""
    geomloss = pytest.importorskip("geomloss.ot")
    jax = pytest.importorskip("jax")
    ott_geometry = pytest.importorskip("ott.geometry.geometry")
    ott_problem = pytest.importorskip("ott.problems.linear.linear_problem")
    ott_solver = pytest.importorskip("ott.solvers.linear.sinkhorn")

    cost, r, c = problem
    C, a, b = cost.numpy(), r.numpy(), c.numpy()

    def error(plan: Any) -> float:
        plan = np.asarray(plan)
        found = float(abs(plan.sum(1) - a).sum() + abs(plan.sum(0) - b).sum())
        return found if np.isfinite(found) else np.inf

    def ours() -> Any:
        return sinkhorn_newton_sparse(
            cost, r, c, eta, sparsity=kept / len(C), tol=GOAL, newton_iters=200
        ).plan

    def pot(tol: float) -> Any:
        method = "sinkhorn" if kernel else "sinkhorn_log"
        return ot.sinkhorn(
            a, b, C, 1 / eta, method=method, stopThr=tol, numItermax=50_000, warn=False
        )

    def geom(sweeps: int) -> Any:
        found = geomloss.solve(cost, a=r, b=c, reg=1 / eta, max_iter=sweeps)
        return found.plan

    @jax.jit
    def solve(C: Any, a: Any, b: Any, tol: Any) -> Any:
        solver = ott_solver.Sinkhorn(lse_mode=not kernel, threshold=tol, max_iterations=50_000)
        geometry = ott_geometry.Geometry(C, epsilon=1 / eta)
        return solver(ott_problem.LinearProblem(geometry, a, b)).matrix

    def on_jax(tol: float) -> Any:
        return solve(C, a, b, tol).block_until_ready()

    return {
        OURS: Contender(ours, error),
        "POT": loosest([GOAL, GOAL / 3, GOAL / 10, GOAL / 30], pot, error, GOAL),
        "geomloss": loosest(SWEEPS, geom, error, GOAL),
        "ott-jax": loosest([GOAL], on_jax, error, GOAL),
    }


@contest(OURS, "POT", "geomloss", "ott-jax", goal=GOAL, paper=True)
def test_assignment(small: bool) -> dict[str, Contender]:
    """Random assignment, n = 500, eta = 1200."""
    n, eta = (40, 60.0) if small else (500, 1200.0)
    problem = random_assignment(n, generator=torch.Generator().manual_seed(0))
    return contenders(problem, eta, kept=min(15, n), kernel=True)


@contest(OURS, "POT", "geomloss", "ott-jax", goal=GOAL)
def test_much_entropy(small: bool) -> dict[str, Contender]:
    """Random assignment, n = 500, eta = 50 (Sinkhorn needs few sweeps)."""
    n, eta = (40, 10.0) if small else (500, 50.0)
    problem = random_assignment(n, generator=torch.Generator().manual_seed(1))
    return contenders(problem, eta, kept=min(100, n), kernel=True)
