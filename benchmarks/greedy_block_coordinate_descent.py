"""Greedy block coordinate descent beside scikit-learn and skglm on the nonnegative lasso.

Everybody reaches a relative duality gap of 1e-8, computed here from the solution it returns. Each
stops by its own rule, so the loosest setting that reaches the goal is looked for first, and for our
method the fastest of three block sizes. That search also compiles skglm's loops.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Lasso

from contest import OURS, Contender, contest, loosest
from wellposed.data.sparse_features import sparse_features
from wellposed.methods.optimization.block_coordinate import GramBound, block_coordinate_descent

GOAL = 1e-8
ITERATIONS = [*range(1, 20), *range(20, 101, 4)]
TOLERANCES = [10.0**-k for k in range(1, 15)]
Array = NDArray[np.float64]


def duality_gap(a: Array, y: Array, penalty: float, x: Array) -> float:
    """Relative duality gap of the nonnegative lasso: 0 at a solution, 1 at most at x = 0."""
    left = y - a @ x
    primal = left @ left / 2 + penalty * x.sum()
    scaled = left * min(1.0, penalty / max((a.T @ left).max(), 1e-300))
    dual = (y @ y - (y - scaled) @ (y - scaled)) / 2
    return float((primal - dual) / (y @ y / 2))


def contenders(kind: str, share: float, small: bool) -> dict[str, Contender]:
    """Solvers of one problem; `share` is the penalty's share of the smallest that gives zero."""
    peer = pytest.importorskip("skglm")
    rows, columns = (40, 80) if small else (500, 2000)
    g = torch.Generator().manual_seed(0)
    if kind == "sparse":
        features = sparse_features(rows, columns, generator=g)
    else:
        features = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    w = torch.randn(columns, generator=g, dtype=torch.float64)
    w *= torch.rand(columns, generator=g) < 0.1
    target = features @ w + torch.randn(rows, generator=g, dtype=torch.float64)
    penalty = share * float((features.T @ target).max())
    a, y = np.asfortranarray(features.numpy()), target.numpy()
    alpha = penalty / rows

    def ours(block_size: int, num_iters: int) -> Array:
        run = block_coordinate_descent(
            lambda x: (features @ x - target).square().sum() / 2 + penalty * x.sum(),
            GramBound(features),
            features.new_zeros(columns),
            block_size=block_size,
            nonnegative=True,
            num_iters=num_iters,
        )
        return np.asarray(run.x.numpy())

    def scikit(tol: float) -> Array:
        model = Lasso(alpha=alpha, fit_intercept=False, positive=True, tol=tol, max_iter=100_000)
        return np.asarray(model.fit(a, y).coef_)

    def skglm(tol: float) -> Array:
        model = peer.Lasso(alpha=alpha, fit_intercept=False, positive=True, tol=tol)
        return np.asarray(model.fit(a, y).coef_)

    def gap(x: Any) -> float:
        return duality_gap(a, y, penalty, x)

    tried = []
    for size in (20,) if small else (100, 200, 400):
        for iterations in ITERATIONS:
            begin = time.process_time()
            reached = gap(ours(size, iterations)) <= GOAL
            if reached:
                tried.append((time.process_time() - begin, size, iterations))
                break
    _, size, iterations = min(tried)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # solvers warn at loose tolerances; the gap is checked
        return {
            OURS: Contender(
                lambda: ours(size, iterations), gap, f"blocks of {size}, {iterations} iterations"
            ),
            "scikit-learn": loosest(TOLERANCES, scikit, gap, GOAL),
            "skglm": loosest(TOLERANCES, skglm, gap, GOAL),
        }


SOLVERS = (OURS, "scikit-learn", "skglm")


@contest(*SOLVERS, goal=GOAL, paper=True)
def test_sparse_features(small: bool) -> dict[str, Contender]:
    """The paper's sparse features, 500 x 2,000, penalty 0.2."""
    return contenders("sparse", 0.2, small)


@contest(*SOLVERS, goal=GOAL, paper=True)
def test_weaker_penalty(small: bool) -> dict[str, Contender]:
    """The paper's sparse features, 500 x 2,000, penalty 0.05."""
    return contenders("sparse", 0.05, small)


@contest(*SOLVERS, goal=GOAL)
def test_gaussian(small: bool) -> dict[str, Contender]:
    """Gaussian features, 500 x 2,000, penalty 0.2."""
    return contenders("gaussian", 0.2, small)
