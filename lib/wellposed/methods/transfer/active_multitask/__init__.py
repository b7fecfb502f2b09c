r"""L1-A-MTRL: sample the source tasks in proportion to a sparse relevance.

Yiping Wang, Yifang Chen, Kevin Jamieson and Simon S. Du, "Improved Active Multi-Task
Representation Learning via Lasso", ICML 2023, arXiv 2306.02556.

Claim: source tasks should be sampled in proportion to the weights of *least L1 norm* that combine
their heads into the target's head. Squared weights of least L2 norm, the earlier rule, can need a
number of samples larger by a factor of the order of the number of tasks.

Tasks share a basis $B\in\mathbb R^{d\times k}$: $y=x^\top Bw_m+\xi$ with noise variance $\sigma^2$.
With heads $W=(w_1,\dots,w_M)$, a target head $w$, and $n_m$ samples from task $m$, the error that
the learned basis carries to the target is at most of the order of

$$\sigma^2dk\sum_m\frac{\nu_m^2}{n_m},\qquad W\nu=w,\qquad
\min_{\nu,\,n:\,\sum n_m=N}\ \sum_m\frac{\nu_m^2}{n_m}=\frac{\|\nu^1\|_1^2}N .$$

Departures from the paper: set-up and bounds are known to us from the abstract and from memory, and
the allocation identities were derived again. The fit sums over all samples, each with the same
weight. What a budget leaves after exploration is split in proportion to the relevance, instead of
by a target accuracy. `design_error` and the instance in `copied_tasks` are ours; the paper's own
construction for its lower bound was not seen.
"""

from __future__ import annotations

from wellposed.methods.transfer.active_multitask.allocation import (
    allocate_samples,
    design_error,
    lasso_relevance,
    relevance,
    transfer_error,
)
from wellposed.methods.transfer.active_multitask.phases import (
    ActiveResult,
    Exploration,
    collect_from,
    exploit,
    explore,
    l1_a_mtrl,
)
from wellposed.ops.shared_representation import excess_risk, fit_representation

__all__ = [
    "ActiveResult",
    "Exploration",
    "allocate_samples",
    "collect_from",
    "design_error",
    "excess_risk",
    "exploit",
    "explore",
    "fit_representation",
    "l1_a_mtrl",
    "lasso_relevance",
    "relevance",
    "transfer_error",
]
