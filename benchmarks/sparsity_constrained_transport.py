"""Sparse transport beside POT's, at equal accuracy; Sinkhorn beside both.

Every solver starts from zero. Its tolerance is loosened as far as its dual value stays within 1e-5
of the best that any solver found. Sinkhorn solves another problem: it is timed to a plan that costs
at most 5 % more and whose marginals are no worse, with the strongest entropy that does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import numpy as np
import ot
import torch

from contest import OURS, Contender, contest
from wellposed.methods.transport.sparsity_constrained import sparse_ot

GAP = 1e-5
COST_GAP = 0.05
TOLERANCES = [10.0 ** (-e / 2) for e in range(8, 23)]
FAST, SAFE = "sinkhorn", "sinkhorn_log"  # the fast variant underflows with little entropy
REGS = {0.05: FAST, 0.02: FAST, 0.01: FAST, 0.005: FAST, 0.002: FAST, 0.001: SAFE, 0.0005: SAFE}
Found = tuple[np.ndarray, float]


def contenders(m: int, n: int, k: int) -> dict[str, Contender]:
    """All solvers of one random problem with at most `k` entries a column."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(size, 2, generator=g, dtype=torch.float64) for size in (m, n))
    cost = torch.cdist(x, y).square()
    cost /= cost.max()
    a, b = (cost.new_full((size,), 1 / size) for size in cost.shape)
    table, rows, columns = cost.numpy(), a.numpy(), b.numpy()
    kind = {"reg_type": "sparsity_constrained", "max_nz": k} if k < m else {"reg_type": "l2"}

    def ours(tol: float) -> Found:
        found = sparse_ot(a, b, cost, k=k, tol=tol, max_iter=2000)
        return found.plan.numpy(), float(found.value)

    def pot(tol: float) -> Found:
        # POT 0.9.7 prints from inside its projection
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            plan, log = ot.smooth.smooth_ot_semi_dual(
                rows, columns, table, 1.0, stopThr=tol, numItermax=2000, log=True, **kind
            )
        return plan, -float(log["res"].fun)

    runs = {f: [(tol, f(tol)) for tol in TOLERANCES] for f in (ours, pot)}
    best = max(value for tries in runs.values() for _, (_, value) in tries)

    def gap(found: Found) -> float:
        return (best - found[1]) / abs(best)

    def smooth(f: Callable[[float], Found]) -> Contender:
        fits = [tol for tol, found in runs[f] if gap(found) <= GAP] or [TOLERANCES[-1]]
        return Contender(lambda: f(fits[0]), gap, f"tolerance {fits[0]:.2g}")

    plan, _ = smooth(ours).call()
    target = max(float(abs(plan.sum(1) - rows).sum()), 1e-6)
    price = float((plan * table).sum()) * (1 + COST_GAP)

    def sinkhorn(reg: float) -> np.ndarray:
        return ot.sinkhorn(
            rows,
            columns,
            table,
            reg,
            method=REGS[reg],
            stopThr=target / 10,
            numItermax=2000,
            warn=False,
        )

    def excess(found: np.ndarray) -> float:
        """0 where the plan is as good as asked, else how far it is off."""
        off = float(abs(found.sum(1) - rows).sum() + abs(found.sum(0) - columns).sum())
        worse = max(off / target, float((found * table).sum()) / price) - 1
        return max(0.0, worse) if np.isfinite(worse) else np.inf

    reg = next((reg for reg in REGS if excess(sinkhorn(reg)) == 0), min(REGS))
    return {
        OURS: smooth(ours),
        "POT": smooth(pot),
        "POT Sinkhorn": Contender(lambda: sinkhorn(reg), excess, f"entropy {reg:g}"),
    }


@contest(OURS, "POT", "POT Sinkhorn", goal=GAP, paper=True)
def test_sparse(small: bool) -> dict[str, Contender]:
    """512 x 64 points, at most 16 entries a column."""
    return contenders(24, 8, 6) if small else contenders(512, 64, 16)


@contest(OURS, "POT", "POT Sinkhorn", goal=GAP)
def test_quadratic(small: bool) -> dict[str, Contender]:
    """512 x 64 points, any number of entries (quadratic regularization)."""
    return contenders(24, 8, 24) if small else contenders(512, 64, 512)


@contest(OURS, "POT", "POT Sinkhorn", goal=GAP, paper=True)
def test_larger(small: bool) -> dict[str, Contender]:
    """1,024 x 128 points, at most 16 entries a column."""
    return contenders(30, 8, 4) if small else contenders(1024, 128, 16)
