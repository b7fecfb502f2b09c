"""Seconds of our sparse transport beside POT's, at equal accuracy, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/sparsity_constrained_transport.py

Every solver starts from zero and gets float64 costs of the same random problem. Its tolerance is
loosened as far as its value stays within ``GAP`` of the best value that any solver found, so all
are timed at one accuracy, each at its best setting. Sinkhorn solves another problem: it is timed to
a plan that costs at most 5 % more and whose marginals are no worse (nan: no entropy gives that). A
ratio above 1 means that the other takes longer than ours. Seconds are CPU seconds, the median of
``repeats`` runs after one warm-up (Sinkhorn: one run).
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import torch

from wellposed.methods.transport.sparsity_constrained import sparse_ot

GAP = 1e-5
COST_GAP = 0.05
TOLERANCES = [10.0**-e for e in range(4, 12)]
FAST, SAFE = "sinkhorn", "sinkhorn_log"  # the fast variant underflows with little entropy
REGS = {0.05: FAST, 0.02: FAST, 0.01: FAST, 0.005: FAST, 0.002: FAST, 0.001: SAFE, 0.0005: SAFE}
Solve = Callable[[float], tuple[np.ndarray, float]]


def _clouds(m: int, n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(size, 2, generator=g, dtype=torch.float64) for size in (m, n))
    cost = torch.cdist(x, y).square()
    return cost / cost.max()


def _ours(cost: torch.Tensor, k: int) -> Solve:
    a, b = (cost.new_full((size,), 1 / size) for size in cost.shape)

    def solve(tol: float) -> tuple[np.ndarray, float]:
        found = sparse_ot(a, b, cost, k=k, tol=tol, max_iter=2000)
        return found.plan.numpy(), float(found.value)

    return solve


def _pot(cost: torch.Tensor, k: int) -> Solve:
    table = cost.numpy()
    a, b = (np.full(size, 1 / size) for size in table.shape)
    kind = {"reg_type": "sparsity_constrained", "max_nz": k} if k < len(a) else {"reg_type": "l2"}

    def solve(tol: float) -> tuple[np.ndarray, float]:
        # POT 0.9.7 prints from inside its projection
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            plan, log = ot.smooth.smooth_ot_semi_dual(
                a, b, table, 1.0, stopThr=tol, numItermax=2000, log=True, **kind
            )
        return plan, -float(log["res"].fun)

    return solve


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    spent = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        call()
        spent.append(time.process_time() - begin)
    return statistics.median(spent[1:])


def _row_error(plan: np.ndarray) -> float:
    return float(abs(plan.sum(1) - 1 / len(plan)).sum())


def _smooth(cost: torch.Tensor, k: int, repeats: int) -> dict[str, float]:
    """Ours and POT's at the loosest tolerance that still gives the value."""
    solvers = {"ours": _ours(cost, k), "pot": _pot(cost, k)}
    tries = {name: [(tol, *solve(tol)) for tol in TOLERANCES] for name, solve in solvers.items()}
    best = max(value for runs in tries.values() for _, _, value in runs)
    row: dict[str, float] = {"k": k}
    for name, runs in tries.items():
        fits = [run for run in runs if best - run[2] <= GAP * abs(best)]
        tol, plan, value = (fits or runs[-1:])[0]
        row[f"{name}_seconds"] = _seconds(lambda n=name, t=tol: solvers[n](t), repeats)
        row[f"{name}_gap"] = (best - value) / abs(best)
        row[f"{name}_row_error"] = _row_error(plan)
        row[f"{name}_cost"] = float((plan * cost.numpy()).sum())
    row["ratio"] = row["pot_seconds"] / row["ours_seconds"]
    return row


def _sinkhorn(cost: torch.Tensor, row: dict[str, float]) -> dict[str, float]:
    """POT's Sinkhorn with the strongest entropy whose plan is about as cheap as ours."""
    table = cost.numpy()
    a, b = (np.full(size, 1 / size) for size in table.shape)
    target = max(row["ours_row_error"], 1e-6)
    for reg, method in REGS.items():
        begin = time.process_time()
        plan = ot.sinkhorn(
            a, b, table, reg, method=method, stopThr=target / 10, numItermax=2000, warn=False
        )
        seconds = time.process_time() - begin
        error = _row_error(plan) + float(abs(plan.sum(0) - b).sum())
        if error <= target and (plan * table).sum() <= row["ours_cost"] * (1 + COST_GAP):
            return {"sinkhorn_seconds": seconds, "sinkhorn_ratio": seconds / row["ours_seconds"]}
    return {"sinkhorn_seconds": math.nan, "sinkhorn_ratio": math.nan}


def run(
    sizes: tuple[tuple[int, int], ...] = ((512, 64), (1024, 128)),
    *,
    k: int = 16,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Time all solvers on one thread and print the ratios; a name of the problem -> numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for m, n in sizes:
            cost = _clouds(m, n, seed)
            for limit in (k, m):
                row = _smooth(cost, limit, repeats)
                row |= _sinkhorn(cost, row)
                results[f"{m} x {n}, k = {limit}"] = row
    torch.set_num_threads(threads)
    print(f"{'problem':22s}{'ours':>9s}{'POT':>9s}{'ratio':>8s}{'Sinkhorn':>10s}{'ratio':>8s}")
    for name, row in results.items():
        print(
            f"{name:22s}{row['ours_seconds']:8.3f}s{row['pot_seconds']:8.3f}s{row['ratio']:8.1f}"
            f"{row['sinkhorn_seconds']:9.3f}s{row['sinkhorn_ratio']:8.1f}"
        )
        print(
            f"    missing share of the value {row['ours_gap']:.0e} / {row['pot_gap']:.0e}, "
            f"row error {row['ours_row_error']:.0e} / {row['pot_row_error']:.0e}"
        )
    return results


if __name__ == "__main__":
    run()
