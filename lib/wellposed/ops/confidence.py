r"""How good a classifier's confidence is: calibration, ranking, and one temperature.

The confidence of an example is its largest class probability. *Calibration* asks whether, among
examples of confidence 0.8, four in five are right. *Ranking* asks whether the wrong ones are those
of low confidence. Either can be good while the other is bad.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ConfidenceScores",
    "aurc",
    "confidence_scores",
    "eaurc",
    "expected_calibration_error",
    "fit_temperature",
    "reliability",
    "risk_coverage",
]

COLDEST, HOTTEST = 0.01, 100.0  # temperatures to look at


@dataclass(frozen=True)
class ConfidenceScores:
    """Six scores of each of several classifiers; lower is better. Shape ``(r,)`` each, float64.

    Attributes:
        error: share of wrong predictions.
        nll: mean negative log-likelihood of the true class, in nats.
        ece: expected calibration error, a share.
        aurc: area under the risk-coverage curve, a share; few errors and a good ranking lower it.
        eaurc: its part that is due to the ranking alone, a share.
        overconfidence: mean confidence minus accuracy; negative where the confidence is too low.
            Its best value is 0.
    """

    error: Tensor
    nll: Tensor
    ece: Tensor
    aurc: Tensor
    eaurc: Tensor
    overconfidence: Tensor


def _check(values: Tensor, labels: Tensor, name: str, *, n_bins: int = 1) -> None:
    if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] < 2:
        raise ValueError(
            f"{name} must have shape (n, c) with n >= 1 and c >= 2, got {tuple(values.shape)}"
        )
    if labels.shape != values.shape[:1]:
        raise ValueError(f"labels must have shape ({values.shape[0]},), got {tuple(labels.shape)}")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")


def expected_calibration_error(probs: Tensor, labels: Tensor, n_bins: int = 10) -> float:
    r"""Expected calibration error.

    .. math:: \mathrm{ECE} = \sum_{m=1}^{M} \frac{|B_m|}{n} \,
              \bigl| \mathrm{acc}(B_m) - \mathrm{conf}(B_m) \bigr|

    with the examples sorted into ``n_bins`` bins :math:`(l, u]` of equal width by confidence.

    Args:
        probs: class probabilities, shape ``(n, c)``, in [0, 1].
        labels: true classes, shape ``(n,)``, int64 in ``[0, c)``.
        n_bins: number :math:`M` of bins, at least 1.

    Returns:
        A share in [0, 1], not a percentage.

    Raises:
        ValueError: wrong shapes, no example, or ``n_bins`` below 1.

    Source: M. P. Naeini, G. Cooper, M. Hauskrecht, AAAI 2015; with these bins, C. Guo et al.,
    arXiv:1706.04599.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> round(expected_calibration_error(probs, torch.tensor([0, 1])), 6)  # |1/2 - 3/4|
        0.25
    """
    confidence, right, weight = reliability(probs, labels, n_bins)
    return float((weight * (right - confidence).abs()).nansum())


def reliability(probs: Tensor, labels: Tensor, n_bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, accuracy and weight of each bin: the points of a reliability diagram.

    Args:
        probs: class probabilities, shape ``(n, c)``, in [0, 1].
        labels: true classes, shape ``(n,)``, int64.
        n_bins: number of bins of equal width, at least 1.

    Returns:
        Mean confidence, accuracy and share of the examples of each bin, shape ``(n_bins,)`` each;
        the first two are NaN where a bin is empty.

    Raises:
        ValueError: wrong shapes, no example, or ``n_bins`` below 1.

    Source: A. Niculescu-Mizil, R. Caruana, ICML 2005.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> confidence, share_right, weight = reliability(probs, torch.tensor([0, 1]), n_bins=2)
        >>> share_right[1].item(), weight.tolist()
        (0.5, [0.0, 1.0])
    """
    _check(probs, labels, "probs", n_bins=n_bins)
    confidence, predicted = probs.detach().max(dim=1)
    right = (predicted == labels).to(confidence.dtype)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=confidence.dtype, device=probs.device)
    bins = (torch.bucketize(confidence, edges) - 1).clamp(0, n_bins - 1)
    zeros = confidence.new_zeros(n_bins)
    count = zeros.index_add(0, bins, torch.ones_like(confidence))
    return (
        zeros.index_add(0, bins, confidence) / count,
        zeros.index_add(0, bins, right) / count,
        count / len(labels),
    )


def risk_coverage(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""Error among the most confident examples, for every coverage.

    Sort by confidence, highest first (ties keep their order). At coverage :math:`k/n` the risk is
    the share of wrong predictions among the first :math:`k`.

    Args:
        probs: class probabilities, shape ``(n, c)``.
        labels: true classes, shape ``(n,)``, int64.

    Returns:
        Coverage and risk, shape ``(n,)`` each, of the dtype of ``probs``.

    Raises:
        ValueError: wrong shapes or no example.

    Source: Y. Geifman, R. El-Yaniv, NeurIPS 2017, arXiv:1705.08500.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
        >>> risk_coverage(probs, torch.tensor([0, 1, 1]))[1].tolist()[:2]
        [0.0, 0.0]
    """
    _check(probs, labels, "probs")
    confidence, predicted = probs.detach().max(dim=1)
    order = torch.sort(confidence, descending=True, stable=True).indices
    wrong = (predicted != labels)[order].to(confidence.dtype)
    rank = torch.arange(1, len(labels) + 1, dtype=confidence.dtype, device=probs.device)
    return rank / len(labels), wrong.cumsum(0) / rank


def aurc(probs: Tensor, labels: Tensor) -> float:
    """Area under the risk-coverage curve: the mean of the risk over all coverages.

    Args:
        probs: class probabilities, shape ``(n, c)``.
        labels: true classes, shape ``(n,)``, int64.

    Returns:
        A share in [0, 1]; papers print it times 1000. Lower is better.

    Raises:
        ValueError: wrong shapes or no example.

    Source: Y. Geifman, R. El-Yaniv, NeurIPS 2017, arXiv:1705.08500.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> aurc(probs, torch.tensor([0, 1]))  # risks 0 and 1/2
        0.25
    """
    return float(risk_coverage(probs.double(), labels)[1].mean())


def eaurc(probs: Tensor, labels: Tensor) -> float:
    r"""Excess AURC: the area above the best order that the same errors allow.

    With :math:`r` errors among :math:`n`, the best order puts them last, and its area is
    :math:`\frac1n \sum_{j=1}^{r} \frac{j}{n - r + j}`.

    Args:
        probs: class probabilities, shape ``(n, c)``.
        labels: true classes, shape ``(n,)``, int64.

    Returns:
        A share, 0 where every right prediction is more confident than every wrong one.

    Raises:
        ValueError: wrong shapes or no example.

    Source: Y. Geifman, G. Uziel, R. El-Yaniv, ICLR 2019, arXiv:1805.08206.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> eaurc(probs, torch.tensor([0, 1])), eaurc(probs, torch.tensor([1, 0]))
        (0.0, 0.5)
    """
    _check(probs, labels, "probs")
    n = len(labels)
    errors = int((probs.argmax(dim=1) != labels).sum())
    return aurc(probs, labels) - sum(j / (n - errors + j) for j in range(1, errors + 1)) / n


def fit_temperature(logits: Tensor, labels: Tensor, *, steps: int = 60) -> float:
    r"""The temperature that makes a trained classifier's likelihood best.

    Minimizes the mean of :math:`-\log \mathrm{softmax}(z / \tau)_y` over :math:`\tau`. It is convex
    in :math:`1/\tau`: Newton's method finds the minimum, with bisection where a step would leave
    the bracket. Fit it on validation data: dividing all logits by it changes no prediction.

    Args:
        logits: scores :math:`z`, shape ``(n, c)``.
        labels: true classes :math:`y`, shape ``(n,)``, int64.
        steps: most Newton steps, at least 1; it ends sooner where it has converged.

    Returns:
        The temperature, in [0.01, 100]; above 1 where the classifier was overconfident.

    Raises:
        ValueError: wrong shapes, no example, or ``steps`` below 1.

    Source: C. Guo, G. Pleiss, Y. Sun, K. Weinberger, ICML 2017, arXiv:1706.04599.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]]).expand(4, 2)
        >>> tau = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
        >>> round((4 / torch.tensor(tau)).exp().item(), 4)  # odds of 3 to 1
        3.0
    """
    _check(logits, labels, "logits")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    z = logits.detach().double()
    true = z.gather(1, labels[:, None]).squeeze(1)
    low, high, beta = 1 / HOTTEST, 1 / COLDEST, 1.0  # of 1 / tau
    for _ in range(steps):
        p = (z * beta).softmax(dim=1)
        expected = (p * z).sum(dim=1)
        slope = (expected - true).mean()
        curvature = ((p * z.square()).sum(dim=1) - expected.square()).mean()
        up, step = float(slope) <= 0, float(slope / curvature.clamp_min(1e-300))
        low, high = (beta, high) if up else (low, beta)
        # A slope of zero is the minimum, or a softmax that has saturated: bisect to tell.
        before, beta = beta, beta - step if step else math.inf
        if abs(beta - before) <= 1e-13 * before:
            break
        if not low < beta < high:
            beta = math.sqrt(low * high)
    return 1 / min(max(beta, 1 / HOTTEST), 1 / COLDEST)


def confidence_scores(logits: Tensor, labels: Tensor) -> ConfidenceScores:
    """Error, likelihood, calibration and ranking of several classifiers.

    Args:
        logits: scores, shape ``(r, n, c)``, one slice a classifier.
        labels: true classes, shape ``(r, n)``, int64.

    Returns:
        The scores, on the CPU.

    Raises:
        ValueError: wrong shapes, no classifier or no example.

    Source: see the single scores.

    Example:
        >>> scores = confidence_scores(torch.zeros(1, 2, 4), torch.tensor([[0, 1]]))
        >>> scores.error.item(), scores.overconfidence.item()  # confidence 1/4, accuracy 1/2
        (0.5, -0.25)
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or len(logits) == 0:
        raise ValueError(
            "logits must have shape (r, n, c) with r >= 1 and labels (r, n), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    rows = []
    for z, y in zip(logits.detach().double().cpu(), labels.cpu()):
        probs = z.softmax(dim=1)
        error = float((z.argmax(dim=1) != y).double().mean())
        rows.append(
            [
                error,
                float(F.cross_entropy(z, y)),
                expected_calibration_error(probs, y),
                aurc(probs, y),
                eaurc(probs, y),
                float(probs.max(dim=1).values.mean()) - (1 - error),
            ]
        )
    return ConfidenceScores(*torch.tensor(rows, dtype=torch.float64).T)
