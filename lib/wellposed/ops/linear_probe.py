"""Linear classifiers on frozen features: how much a linear map can read off."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ProbeTask", "linear_probe", "linear_probes"]

PROBE_C = 0.1  # inverse ridge penalty of the probe, in scikit-learn's convention
PROBE_TOL = 3e-4  # largest entry of the gradient at which the probe's solver stops
PROBE_STEPS = 2000  # after which it gives up
PROBE_TASKS = 4  # solved side by side: more of them fall out of a CPU's cache


@dataclass(frozen=True)
class ProbeTask:
    """Inputs ``(n, ...)`` and classes ``(n,)`` for fitting a probe, and the same for testing."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


@torch.no_grad()
def linear_probes(tasks: Sequence[ProbeTask], *, c: float = PROBE_C) -> Tensor:
    r"""Accuracy of linear classifiers, one for each task: how much a linear map can read off.

    Multinomial logistic regression on standardized features with a ridge penalty,

    .. math:: \min_{W, b} \; \sum_i -\log \mathrm{softmax}(W x_i + b)_{y_i}
              + \frac{1}{2 c} \|W\|^2 ,

    all tasks side by side. The Hessian is at most :math:`\tfrac12 X^\top X` plus the penalty, for
    each class; gradients are divided by that bound, with Nesterov's momentum and restarts.

    Args:
        tasks: features ``(n, ...)``, flattened (constant ones are ignored), and classes ``(n,)``;
            all of the same sizes.
        c: inverse strength of the penalty, positive.

    Returns:
        Shares of test examples classified correctly, ``(len(tasks),)``, float64, on the CPU. One
        warning if the solver gave up.

    Raises:
        ValueError: no task or an empty one, ``c`` not positive, or features and classes that do
            not pair up.

    Source: the probe of F. Sarnthein et al., "Random Teachers are Good Teachers", arXiv:2302.12091;
        the bound: D. Böhning, Ann. Inst. Stat. Math. 44, 1992.

    Example:
        >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> linear_probes([ProbeTask(x, y, x, y), ProbeTask(-x, y, x, y)]).tolist()
        [1.0, 0.0]
    """
    if not c > 0.0 or not tasks:
        raise ValueError(f"c must be positive and tasks not be empty, got {c} and {len(tasks)}")
    if any(not 0 < len(t.x) == len(t.y) or not 0 < len(t.x_test) == len(t.y_test) for t in tasks):
        raise ValueError("x and y, and x_test and y_test, must have the same length, not 0")
    classes = int(torch.stack([torch.cat([t.y, t.y_test]) for t in tasks]).max()) + 1
    parts = [tasks[i : i + PROBE_TASKS] for i in range(0, len(tasks), PROBE_TASKS)]
    return torch.cat([_probe(part, classes, c) for part in parts]).cpu()


def _probe(tasks: Sequence[ProbeTask], classes: int, c: float) -> Tensor:
    """Probing accuracy of some tasks, shape (len(tasks),)."""
    x, z = (torch.stack([p.flatten(1) for p in q]) for q in zip(*((t.x, t.x_test) for t in tasks)))
    y, target = (torch.stack(list(q)) for q in zip(*((t.y, t.y_test) for t in tasks)))
    x, z = (v if v.dtype == torch.float64 else v.float() for v in (x, z))
    mean, std = x.mean(1, keepdim=True), x.std(1, correction=0, keepdim=True)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.inf)
    weight, bias = _logistic((x - mean) / std, F.one_hot(y, classes).to(x).mT.contiguous(), c)
    hits = (((z - mean) / std) @ weight.mT + bias.mT).argmax(2) == target
    return hits.double().mean(1)


def _logistic(x: Tensor, onehot: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Weights (k, classes, d) and biases (k, classes, 1) for centered features (k, n, d)."""
    k, n, d = x.shape
    ridge = 1.0 / (c * n)
    metric = torch.linalg.inv(0.5 * x.mT @ x / n + ridge * torch.eye(d, dtype=x.dtype).to(x))
    now = [x.new_zeros(k, onehot.shape[1], d), x.new_zeros(k, onehot.shape[1], 1)]
    ahead, pace = now, x.new_ones(k, 1, 1)
    for step in range(PROBE_STEPS):
        residual = torch.baddbmm(ahead[1], ahead[0], x.mT).softmax(1).sub_(onehot)
        grad = [residual @ x / n + ridge * ahead[0], residual.mean(2, keepdim=True)]
        if step % 10 == 0 and max(g.abs().max().item() for g in grad) < PROBE_TOL:
            break
        new = [ahead[0] - grad[0] @ metric, ahead[1] - 2.0 * grad[1]]
        move = [a - b for a, b in zip(new, now)]
        uphill = sum((g * m).sum((1, 2), keepdim=True) for g, m in zip(grad, move)) > 0
        pace = torch.where(uphill, 1.0, pace)  # the momentum points uphill: forget it
        faster = (1 + (1 + 4 * pace.square()).sqrt()) / 2
        ahead = [a + (pace - 1) / faster * m for a, m in zip(new, move)]
        now, pace = new, faster
    else:
        warnings.warn("the probe's solver stopped before it converged", stacklevel=4)
    return ahead[0], ahead[1]


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, c: float = PROBE_C
) -> float:
    """Accuracy of a linear classifier on frozen features; :func:`linear_probes` for one task.

    Args:
        train_x: features ``(n, ...)``, flattened.
        train_y: classes ``(n,)``, int64.
        test_x, test_y: the same for testing.
        c: inverse strength of the penalty, positive.

    Returns:
        Share of test examples classified correctly, in [0, 1].

    Raises:
        ValueError: ``c`` not positive, no example, or features and classes that do not pair up.

    Source: as there.

    Example:
        >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> linear_probe(x, y, torch.tensor([[-3.0], [3.0], [4.0], [5.0]]), y)
        0.75
    """
    return float(linear_probes([ProbeTask(train_x, train_y, test_x, test_y)], c=c))
