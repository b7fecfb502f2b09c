"""Fréchet cumulative covariance beside its definition, and distance correlation beside dcor.

Two races have one and the same number as their goal. The third has not: no other library computes
FCCov, so it is set beside what one would use instead for responses in a metric space, the distance
covariance of dcor. The two measure dependence differently; each is held to its own definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contest import OURS, Contender, contest, untouched
from wellposed.methods.structured_data.frechet_covariance import (
    ball_kernel,
    distance_correlation,
    frechet_cumulative_covariance,
    frechet_cumulative_covariance_direct,
    wasserstein_distances,
)

GOAL = 1e-10


def sample(n: int, q: int) -> tuple[Tensor, Tensor]:
    """Two features, and responses with q quantiles whose mean depends on the first."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(n, 2, generator=g, dtype=torch.float64)
    mean = u[:, :1].sin() + 0.5 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    levels = (torch.arange(q, dtype=torch.float64) + 0.5) / q
    return u, mean + torch.special.ndtri(levels)


@contest(OURS, "ball kernel", "definition", goal=GOAL, paper=True)
def test_sorting(small: bool) -> dict[str, Contender]:
    """FCCov of 2 features with 400 distributions, distances given."""
    n = 20 if small else 400
    u, quantiles = sample(n, 19)
    distances = wasserstein_distances(quantiles)
    centered = u - u.mean(0)
    truth = frechet_cumulative_covariance_direct(u, distances)

    def error(found: Any) -> float:
        return float((found - truth).abs().max())

    return {
        OURS: Contender(lambda: frechet_cumulative_covariance(u, distances), error),
        "ball kernel": Contender(
            lambda: centered.mT @ ball_kernel(distances) @ centered / n**2, error
        ),
        "definition": Contender(lambda: frechet_cumulative_covariance_direct(u, distances), error),
    }


@contest(OURS, "dcor's distance covariance", goal=GOAL)
def test_measures(small: bool) -> dict[str, Contender]:
    """FCCov of 2 features with 1,000 distributions (dcor: another measure)."""
    dcor = untouched("dcor")
    n = 20 if small else 1000
    u, quantiles = sample(n, 19)
    distances = wasserstein_distances(quantiles)
    centered = u - u.mean(0)
    own = centered.mT @ ball_kernel(distances) @ centered / n**2
    parts = []
    for d in (torch.cdist(u, u), distances):
        d = d - d.mean(0)
        parts.append(d - d.mean(1, keepdim=True))
    other = (parts[0] * parts[1]).mean()
    # The Euclidean distance of quantiles divided by sqrt(q) is the Wasserstein distance.
    x, y = u.numpy(), (quantiles / 19**0.5).numpy()
    return {
        OURS: Contender(
            lambda: frechet_cumulative_covariance(u, wasserstein_distances(quantiles)),
            lambda found: float((found - own).abs().max()),
        ),
        "dcor's distance covariance": Contender(
            lambda: dcor.distance_covariance_sqr(x, y), lambda found: float(abs(found - other))
        ),
    }


def correlations(a: Tensor, b: Tensor) -> dict[str, Contender]:
    """Distance correlation by us and by dcor, which chooses its algorithm."""
    dcor = untouched("dcor")
    x, y = (t.squeeze(1).numpy() for t in (a, b))
    truth = dcor.distance_correlation(x, y, method="naive")

    def error(found: Any) -> float:
        return float(abs(found - truth))

    return {
        OURS: Contender(lambda: distance_correlation(a, b), error),
        "dcor": Contender(lambda: dcor.distance_correlation(x, y), error),
    }


@contest(OURS, "dcor", goal=GOAL)
def test_correlation_of_vectors(small: bool) -> dict[str, Contender]:
    """Distance correlation of 2,000 vectors with 2 and 19 entries."""
    return correlations(*sample(20 if small else 2000, 19))


@contest(OURS, "dcor", goal=GOAL)
def test_correlation_of_numbers(small: bool) -> dict[str, Contender]:
    """Distance correlation of 2,000 pairs of numbers."""
    u, response = sample(20 if small else 2000, 1)
    return correlations(u[:, :1], response)
