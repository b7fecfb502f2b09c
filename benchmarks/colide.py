"""CoLiDE and our DAGMA beside the dagma package and the NOTEARS of gCastle.

Data of unit noise, where all of these methods work, and the same sparsity weight and threshold for
all. The error is the structural Hamming distance of the mean graph. Who follows a path of penalties
has the same step size and the same path, and runs the shortest schedule that reaches the goal;
NOTEARS runs at its loosest tolerance. dagma's progress bar is off. Ours takes all graphs at once;
peers have no such call and take them one by one, so a single graph is raced as well.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from contest import OURS, Contender, contest, loosest, untouched
from wellposed.methods.structured_data import colide as method
from wellposed.methods.structured_data.dag_rivals import notears
from wellposed.ops.dag import (
    random_dag,
    simulate_linear_sem,
    structural_hamming_distance,
    threshold_dag,
)

GOAL = 1.0  # errors a graph
STEPS = [125, 250, 500, 1000, 2000]  # of each stage but the last, which has thrice that
TOLERANCES = [1e-2, 1e-4, 1e-6, 1e-8]
LAMBDA, RATE = 0.05, 3e-3
PATHS = (OURS, "our DAGMA", "dagma")
ALL = (*PATHS, "our NOTEARS", "gcastle NOTEARS")


def gcastle_algorithms() -> Any:
    """Those of gCastle, with its announcements and its change of torch's default dtype undone."""
    dtype, level = torch.get_default_dtype(), logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        return untouched("castle.algorithms")
    finally:
        logging.disable(level)
        torch.set_default_dtype(dtype)


def contenders(
    num_nodes: int, batch: int, small: bool, everybody: bool = False
) -> dict[str, Contender]:
    """All solvers on random graphs with as many arrows as nodes, on average."""
    linear, algorithms = untouched("dagma.linear"), gcastle_algorithms()
    schedules, tolerances = STEPS, TOLERANCES
    if small:
        num_nodes, batch, schedules, tolerances = 4, min(batch, 2), STEPS[:4], TOLERANCES[:1]
    g = torch.Generator().manual_seed(0)
    truth = random_dag(num_nodes, num_nodes, batch=batch, generator=g)
    x = simulate_linear_sem(truth, 1000, noise_std=1.0, generator=g)
    columns = x.numpy()

    def error(weights: Any) -> float:
        return structural_hamming_distance(truth, threshold_dag(weights)) / batch

    def path(solve: Any, steps: int) -> Tensor:
        found: Tensor = solve(
            x, lambda1=LAMBDA, lr=RATE, warm_iters=steps, max_iters=3 * steps, check_every=125
        ).weights
        return found

    def dagma(steps: int) -> Tensor:
        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "tqdm", partial(tqdm, disable=True))
            for one in columns:
                found.append(
                    linear.DagmaLinear(loss_type="l2").fit(
                        one.copy(), lambda1=LAMBDA, w_threshold=0.0, T=4, s=[1.0, 0.9, 0.8, 0.7],
                        lr=RATE, warm_iter=steps, max_iter=3 * steps, checkpoint=125,
                    )
                )  # fmt: skip
        return torch.from_numpy(np.stack(found))

    def gcastle(tol: float) -> Tensor:
        found = []
        for one in columns:
            peer = algorithms.Notears(lambda1=LAMBDA, h_tol=tol)
            peer.learn(one.copy())
            found.append(np.array(peer.weight_causal_matrix, dtype=float))
        return torch.from_numpy(np.stack(found))

    def ours_notears(tol: float) -> Tensor:
        return notears(x, lambda1=LAMBDA, h_tol=tol).weights

    found = {
        OURS: loosest(schedules, partial(path, method.colide), error, GOAL),
        "our DAGMA": loosest(schedules, partial(path, method.dagma), error, GOAL),
        "dagma": loosest(schedules, dagma, error, GOAL),
    }
    if everybody:  # NOTEARS takes minutes on the larger problems
        found["our NOTEARS"] = loosest(tolerances, ours_notears, error, GOAL)
        found["gcastle NOTEARS"] = loosest(tolerances, gcastle, error, GOAL)
    return found


@contest(*ALL, goal=GOAL)
def test_small_graphs(small: bool) -> dict[str, Contender]:
    """8 graphs of 10 nodes and about 10 arrows, to one error a graph."""
    return contenders(10, 8, small, everybody=True)


@contest(*PATHS, goal=GOAL, paper=True)
def test_graphs(small: bool) -> dict[str, Contender]:
    """16 graphs of 20 nodes and about 20 arrows, to one error a graph."""
    return contenders(20, 16, small)


@contest(*PATHS, goal=GOAL)
def test_graph(small: bool) -> dict[str, Contender]:
    """One graph of 20 nodes and about 20 arrows, to one error."""
    return contenders(20, 1, small)


@contest(*PATHS, goal=GOAL)
def test_larger_graphs(small: bool) -> dict[str, Contender]:
    """4 graphs of 50 nodes and about 50 arrows, to one error a graph."""
    return contenders(50, 4, small)
