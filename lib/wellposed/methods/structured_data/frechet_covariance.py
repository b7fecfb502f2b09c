r"""Dependence on a response that lives in a metric space, by counting points in balls.

H. Yuan, C. D. Wang, Z. Yu, "Fréchet Cumulative Covariance Net for Deep Nonlinear Sufficient
Dimension Reduction with Random Objects", arXiv:2502.15374, 2025.

Claim: the covariance of features :math:`U \in R^d` with "is the response in this ball?", squared
and averaged over balls,

.. math::

    \hat\Lambda = \frac1{n^2} \sum_{k,j} S_{kj} S_{kj}^T , \qquad
    S_{kj} = \frac1n \sum_i (u_i - \bar u) \, 1\{\rho_{ik} \le \rho_{jk}\} ,

measures dependence on responses of any kind, costs :math:`O(n^2 \log n)` and withstands outliers:
of the distances :math:`\rho` only their ranks around each center :math:`k` count.

Departures: the full text was not available to us. Ball, constants and objective are reconstructed
from the abstract, the introduction, and the scalar ancestor (cumulative covariance). The form by
rank distances is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.nets import Stacked
from wellposed.nets.columns import stacked_forward
from wellposed.nets.seeded import seeded_mlps
from wellposed.ops.metric_spaces import (
    distance_correlation,
    spd_distances,
    sphere_distances,
    wasserstein_distances,
)
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedAdam, generator, minibatches
from wellposed.train.checks import check_epochs

__all__ = [
    "FCCovLoss",
    "ball_kernel",
    "distance_correlation",
    "fit_sdr",
    "frechet_cumulative_covariance",
    "frechet_cumulative_covariance_direct",
    "martingale_divergence",
    "rank_distances",
    "reduction_loss",
    "spd_distances",
    "sphere_distances",
    "train_reductions",
    "wasserstein_distances",
]


def _check_distances(distances: Tensor, n: int | None = None) -> None:
    shape = tuple(distances.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1 or n not in (None, shape[-1]):
        wanted = "n, n" if n is None else f"{n}, {n}"
        raise ValueError(f"distances must have shape (..., {wanted}), got {shape}")


def _check_features(features: Tensor, distances: Tensor, *, batched: bool = True) -> None:
    if features.ndim < 2 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating, of shape (..., n, d), got {tuple(features.shape)}"
        )
    if not batched and (features.ndim != 2 or distances.ndim != 2):
        raise ValueError(
            f"features and distances must be matrices, got shapes {tuple(features.shape)} and "
            f"{tuple(distances.shape)}"
        )
    _check_distances(distances, features.shape[-2])


def _check_penalty(penalty: float) -> None:
    if not 0.0 <= penalty < math.inf:
        raise ValueError(f"penalty must be finite and at least 0, got {penalty}")


def _centered(features: Tensor) -> Tensor:
    return features - features.mean(-2, keepdim=True)


def _order(distances: Tensor) -> Tensor:
    """Order of each row; on a CPU by NumPy, whose vectorized sort is several times faster."""
    if distances.device.type == "cpu" and distances.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.argsort(distances.detach().numpy(), axis=-1))
    return distances.argsort(dim=-1)


# --- the measure -----------------------------------------------------------------------------


def frechet_cumulative_covariance(features: Tensor, distances: Tensor) -> Tensor:
    r"""The matrix :math:`\hat\Lambda` by sorting; its trace is the FCCov.

    Around each center the examples are sorted by distance. Cumulative sums of the centered
    features are then the :math:`S_{kj}` of all balls; among equal distances the last sum counts.

    Args:
        features: shape ``(n, d)``.
        distances: of the responses, symmetric, shape ``(n, n)``.

    Returns:
        Positive semidefinite matrix ``(d, d)``, differentiable in ``features``.

    Raises:
        ValueError: shapes that do not match.

    Source: the sample version of FCCov, reconstructed; cost :math:`O(n^2 (\log n + d^2))`.

    Example:
        >>> u, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
        >>> frechet_cumulative_covariance(u, torch.cdist(y, y))  # two of four balls: (1/4)^2 each
        tensor([[0.0312]])
    """
    _check_features(features, distances, batched=False)
    n = len(features)
    order = _order(distances)
    ordered = distances.gather(1, order)
    # Rows are picked by index_select, several times faster than indexing and gather.
    near = _centered(features).index_select(0, order.flatten())
    sums = near.view(n, n, -1).cumsum(1)  # (n centers, n radii, d)
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    last += n * torch.arange(n, device=last.device).unsqueeze(1)
    s = sums.flatten(0, 1).index_select(0, last.flatten()) / n
    return s.mT @ s / n**2


def frechet_cumulative_covariance_direct(features: Tensor, distances: Tensor) -> Tensor:
    r"""The same matrix from its definition, in :math:`O(n^3)`: the yardstick.

    Args:
        features: shape ``(n, d)``.
        distances: symmetric, shape ``(n, n)``.

    Returns:
        Matrix ``(d, d)``.

    Raises:
        ValueError: shapes that do not match.

    Source: definition of the sample version, term by term.

    Example:
        >>> u, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
        >>> frechet_cumulative_covariance_direct(u, torch.cdist(y, y))
        tensor([[0.0312]])
    """
    _check_features(features, distances, batched=False)
    u = _centered(features)
    result = u.new_zeros(u.shape[1], u.shape[1])
    for k in range(len(u)):
        inside = distances[:, k, None] <= distances[None, :, k]  # (example i, radius j)
        s = (u.unsqueeze(1) * inside.unsqueeze(2)).mean(0)
        result = result + s.mT @ s
    return result / len(u) ** 2


def _profiles(distances: Tensor) -> Tensor:
    """Entry (i, k): how many examples are at least as far from center k as i is."""
    _check_distances(distances)
    distances = distances.contiguous()
    order = _order(distances)
    ordered = distances.gather(-1, order)
    closer = torch.empty_like(order)  # found in order, which is faster, and put back in place
    closer.scatter_(-1, order, torch.searchsorted(ordered, ordered))
    return (distances.shape[-1] - closer).to(distances.dtype).mT.contiguous()


def _gaps(profiles: Tensor) -> Tensor:
    """Sums of absolute differences of all pairs of rows; ``pdist`` is far faster than ``cdist``."""
    n = profiles.shape[-1]
    rows, columns = torch.triu_indices(n, n, 1, device=profiles.device)
    result = torch.zeros_like(profiles)
    for one, into in zip(profiles.reshape(-1, n, n), result.view(-1, n, n)):
        into[rows, columns] = F.pdist(one, p=1.0)
    return result + result.mT


def rank_distances(distances: Tensor) -> Tensor:
    r"""How differently two responses rank around the centers, on average: a bounded distance.

    :math:`D_{ii'} = \frac1n \sum_k |c_{ik} - c_{i'k}|`, where :math:`c_{ik}` is the share of
    examples that are at least as far from center :math:`k` as :math:`i` is. FCCov is half the
    martingale difference divergence with :math:`D` in place of the metric.

    Args:
        distances: symmetric, shape ``(..., n, n)``.

    Returns:
        Distances in [0, 1), shape ``(..., n, n)``.

    Raises:
        ValueError: not square.

    Source: ours; :math:`\min(a, b) = (a + b - |a - b|) / 2` in the kernel of
        :func:`ball_kernel`, and terms of one index vanish for centered features.

    Example:
        >>> y = torch.tensor([[0.0], [1.0], [1000.0]])  # how far the outlier is does not matter
        >>> rank_distances(torch.cdist(y, y))[0] * 9
        tensor([0., 3., 5.])
    """
    return _gaps(_profiles(distances)) / distances.shape[-1] ** 2


def ball_kernel(distances: Tensor) -> Tensor:
    r"""The share of balls that hold both responses:
    :math:`K_{ii'} = \frac1{n^2} \sum_k \#\{j: \rho_{jk} \ge \max(\rho_{ik}, \rho_{i'k})\}`.

    With centered features, :math:`\hat\Lambda = \frac1{n^2} U^T K U`.

    Args:
        distances: symmetric, shape ``(..., n, n)``.

    Returns:
        Positive semidefinite kernel ``(..., n, n)``, entries in (0, 1].

    Raises:
        ValueError: not square.

    Source: kernel form of the sample version, reconstructed.

    Example:
        >>> y = torch.tensor([[0.0], [1.0]])  # of four balls, two hold both points
        >>> ball_kernel(torch.cdist(y, y)).tolist()
        [[0.75, 0.5], [0.5, 0.75]]
    """
    profiles = _profiles(distances)
    totals = profiles.sum(-1)
    both = totals.unsqueeze(-1) + totals.unsqueeze(-2) - _gaps(profiles)
    return both / (2.0 * distances.shape[-1] ** 2)


def martingale_divergence(features: Tensor, distances: Tensor) -> Tensor:
    r"""Martingale difference divergence: :math:`-\frac1{n^2} \sum_{ij} u_i^T u_j \rho_{ij}`.

    The features are centered first. GMDD, the baseline, is this with the metric itself; half of it
    with :func:`rank_distances` is FCCov.

    Args:
        features: shape ``(..., n, d)``.
        distances: shape ``(..., n, n)``.

    Returns:
        One number for each problem, shape ``(...)``; not below 0 where the distance is of
        negative type.

    Raises:
        ValueError: shapes that do not match.

    Source: Shao and Zhang 2014 (scalar response), the V-statistic.

    Example:
        >>> u = torch.tensor([[0.0], [2.0]])  # centered: -1 and 1
        >>> martingale_divergence(u, torch.tensor([[0.0, 3.0], [3.0, 0.0]]))  # 2 * 3 / 4
        tensor(1.5000)
    """
    _check_features(features, distances)
    u = _centered(features)
    return -(u * (distances @ u)).sum((-2, -1)) / u.shape[-2] ** 2


# --- the reduction ---------------------------------------------------------------------------


def _whitening(features: Tensor) -> Tensor:
    """Squared Frobenius distance of the covariance from the identity, one for each problem."""
    u = _centered(features)
    cov = u.mT @ u / u.shape[-2]
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    return (cov - eye).square().sum((-2, -1))


class FCCovLoss(nn.Module):
    r"""What the network minimizes: :math:`-tr \hat\Lambda + \tau \|\hat{Cov}(U) - I\|_F^2`.

    Args:
        penalty: :math:`\tau \ge 0`. The trace is a few hundredths; at 1 the penalty rules, and at
            0 the features grow without bound.

    Raises:
        ValueError: a negative penalty; in ``forward``, shapes that do not match.

    Source: the paper's objective, reconstructed; covariances divide by n.

    Example:
        >>> u = torch.tensor([[-1.0], [1.0]])  # of variance one, so nothing to pay
        >>> FCCovLoss()(u, torch.cdist(u, u))
        tensor(-0.1250)
    """

    def __init__(self, penalty: float = 0.03) -> None:
        super().__init__()
        _check_penalty(penalty)
        self.penalty = penalty

    def forward(self, features: Tensor, distances: Tensor) -> Tensor:
        """Loss of features ``(n, d)`` and response distances ``(n, n)``, a 0-d tensor."""
        trace = frechet_cumulative_covariance(features, distances).diagonal().sum()
        return self.penalty * _whitening(features) - trace


def fit_sdr(
    network: nn.Module,
    x: Tensor,
    distances: Tensor,
    *,
    num_epochs: int = 60,
    batch_size: int = 125,
    lr: float = 3e-3,
    penalty: float = 0.03,
    seed: int = 0,
) -> nn.Module:
    r"""Train a network's outputs to be sufficient predictors, with Adam on minibatches.

    Args:
        network: maps rows of ``x`` to features ``(b, d)``; trained in place.
        x: inputs, shape ``(n, ...)``.
        distances: of the responses, shape ``(n, n)``.
        num_epochs: passes over the data, at least 1.
        batch_size: at least 2; balls are those of the batch, which are coarse below about 50. A
            last batch that is not full is dropped.
        lr: learning rate of Adam.
        penalty: :math:`\tau` of :class:`FCCovLoss`.
        seed: of the order of examples.

    Returns:
        The network.

    Raises:
        ValueError: distances not ``(n, n)``, a negative penalty, or a number out of range.

    Source: FCCov-Net, reconstructed; widths, rate and epochs are ours.

    Example:
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> line = fit_sdr(nn.Linear(1, 1), x, torch.cdist(x, x), batch_size=20, num_epochs=100)
        >>> distance_correlation(line(x), x) > 0.999  # a line is a line
        tensor(True)
    """
    _check_distances(distances, len(x))
    if distances.ndim != 2:
        raise ValueError(f"distances must be a matrix, got shape {tuple(distances.shape)}")
    loss = FCCovLoss(penalty)
    check_epochs(num_epochs, batch_size)
    batch_size = min(batch_size, len(x))
    g, adam = generator(seed), StackedAdam(network.parameters(), lr=lr)
    network.train()
    for _ in range(num_epochs):
        for rows in minibatches(len(x), batch_size, g, x.device):
            if len(rows) < batch_size:
                continue
            loss(network(x[rows]), distances[rows][:, rows]).backward()
            adam.step()
    warn_of_nan("fit_sdr", *network.parameters())
    network.eval()
    return network


def reduction_loss(features: Tensor, distances: Tensor, penalty: Tensor) -> Tensor:
    r"""Minus half the divergence plus the whitening penalty, for problems side by side.

    :math:`-\frac12 MDD(U | \rho) + \tau \|\hat{Cov}(U) - I\|_F^2`; with rank distances this is the
    FCCov objective.

    Args:
        features: shape ``(m, b, d)``.
        distances: shape ``(m, b, b)``.
        penalty: :math:`\tau`, shape ``(m,)``.

    Returns:
        Losses ``(m,)``.

    Raises:
        ValueError: shapes that do not match.

    Source: the objective of FCCov-Net in the form by rank distances.

    Example:
        >>> u = torch.tensor([[[-1.0], [1.0]]])  # of variance one; ranks differ by 1/2
        >>> reduction_loss(u, rank_distances(torch.cdist(u, u)), torch.ones(1))
        tensor([-0.1250])
    """
    if features.ndim != 3 or penalty.shape != features.shape[:1]:
        raise ValueError(
            f"features must have shape (m, b, d) and penalty (m,), got {tuple(features.shape)} "
            f"and {tuple(penalty.shape)}"
        )
    u = features - features.mean(1, keepdim=True)
    cov = u.mT @ u / u.shape[1]
    eye = torch.eye(u.shape[2], dtype=u.dtype, device=u.device)
    whitening = (cov - eye).square().sum((1, 2))
    return penalty * whitening - 0.5 * martingale_divergence(features, distances)


def _loss_gradient(features: Tensor, distances: Tensor, penalty: Tensor) -> Tensor:
    """Gradient of :func:`reduction_loss`, summed over problems, for symmetric distances.

    In closed form it takes a third of the operations of automatic differentiation.
    """
    u, b = _centered(features), features.shape[1]
    eye = torch.eye(u.shape[2], dtype=u.dtype, device=u.device)
    whitening = u @ (u.mT @ u / b - eye) * (4.0 / b * penalty).view(-1, 1, 1)
    return _centered(whitening + distances @ u / b**2)


def train_reductions(
    x: Tensor,
    distances: Tensor,
    *,
    seeds: Sequence[int],
    penalty: float | Sequence[float],
    num_features: int = 1,
    hidden: Sequence[int] = (64, 32),
    num_epochs: int = 60,
    batch_size: int = 125,
    lr: float = 3e-3,
    local_balls: bool = False,
) -> Stacked:
    """Train networks side by side, each on predictors and response distances of its own.

    Args:
        x: shape ``(m, n, p)``.
        distances: shape ``(m, n, n)``: :func:`rank_distances` for FCCov, the metric for GMDD.
        seeds: m seeds of the initial weights; the first also orders the examples, for all alike.
        penalty: one number, or one for each network.
        num_features: d, at least 1.
        hidden: widths of the hidden layers.
        num_epochs: passes over the data, at least 1.
        batch_size: at least 2; a last batch that is not full is dropped.
        lr: learning rate of Adam.
        local_balls: rank distances are taken inside each batch, as :func:`fit_sdr` does; then
            ``distances`` must hold the metric. Otherwise ``distances`` are used as they are.

    Returns:
        The trained networks.

    Raises:
        ValueError: shapes that do not match, or a number out of range.

    Source: FCCov-Net, reconstructed; networks side by side and balls of the whole sample are ours.

    Example:
        >>> x = torch.linspace(-1, 1, 20).view(1, 20, 1)
        >>> ranks = rank_distances(torch.cdist(x, x))
        >>> nets = train_reductions(x, ranks, seeds=[0], penalty=0.03, batch_size=20)
        >>> nets(x).shape
        torch.Size([1, 20, 1])
    """
    check_epochs(num_epochs, batch_size)
    nets = seeded_mlps(x, (*hidden, num_features), seeds)
    m, n = x.shape[:2]
    if distances.shape != (m, n, n):
        raise ValueError(f"distances must have shape {(m, n, n)}, got {tuple(distances.shape)}")
    penalties = [penalty] * m if isinstance(penalty, int | float) else list(penalty)
    if len(penalties) != m or not all(0.0 <= p < math.inf for p in penalties):
        raise ValueError(f"penalty must be one number >= 0, or {m} of them, got {penalty}")
    strengths, flat = x.new_tensor(penalties), distances.flatten(1)
    g, adam, batch_size = (
        generator(seeds[0]),
        StackedAdam(nets.parameters(), lr=lr),
        min(batch_size, n),
    )
    for _ in range(num_epochs):
        for rows in minibatches(n, batch_size, g, x.device):
            if len(rows) < batch_size:
                continue
            rows = rows.sort().values  # the loss knows no order, and memory is read faster
            pairs = (rows[:, None] * n + rows).flatten()  # much faster than two-axis indexing
            near = flat.index_select(1, pairs).view(m, batch_size, batch_size)
            near = rank_distances(near) if local_balls else near
            features = stacked_forward(nets, x[:, rows])
            features.backward(_loss_gradient(features.detach(), near, strengths))
            adam.step()
    warn_of_nan("train_reductions", *nets.parameters())
    return nets
