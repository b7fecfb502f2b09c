"""Distances of random objects, and distance correlation beside its peer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm

from contract import Case
from wellposed.ops.metric_spaces import (
    bounded_metric,
    distance_correlation,
    spd_distances,
    sphere_distances,
    wasserstein_distances,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def spd(n, m, seed=0):
    a = randn(n, m, m, seed=seed)
    return a @ a.mT + 0.1 * torch.eye(m, dtype=torch.float64)


def test_wasserstein_of_normals_and_of_samples():
    """The closed form of normals, and optimal transport of two samples of equal size.

    Fails if the sum over levels is not divided by their number.
    """
    levels = torch.arange(0.5, 2000) / 2000
    quantiles = torch.stack(
        [torch.tensor(norm.ppf(levels, m, s)) for m, s in [(0.0, 1.0), (2.0, 1.5)]]
    )
    assert wasserstein_distances(quantiles)[0, 1].item() == pytest.approx(
        math.sqrt(4.0 + 0.25), rel=1e-3
    )
    a, b = randn(12), 3 * randn(12, seed=1) + 1
    ours = wasserstein_distances(torch.stack([a.sort().values, b.sort().values]))[0, 1]
    pairs = (a[:, None] - b[None, :]).square()
    rows, columns = linear_sum_assignment(pairs.numpy())
    assert ours.item() == pytest.approx(pairs[rows, columns].mean().sqrt().item())


def test_sphere_distances_at_all_angles():
    """Exact zeros, right angles near 0 and near pi, where the arc cosine loses its digits.

    Fails with ``acos`` of the inner product: 1e-9 comes out as 0.
    """
    angles = torch.tensor([0.0, 1e-9, 0.3, 1.0, math.pi / 2, 3.0, math.pi - 1e-9, math.pi]).double()
    points = torch.stack([angles.cos(), angles.sin()], 1)
    found = sphere_distances(points)
    assert found.diagonal().eq(0.0).all()
    torch.testing.assert_close(found, found.T, rtol=0.0, atol=0.0)
    torch.testing.assert_close(found[0], angles, rtol=1e-6, atol=1e-15)


def test_spd_distances_against_matrix_roots_and_logarithm():
    """Roots from scipy for one half; the log-Euclidean metric in the limit of power 0.

    Fails without the factor 1/power.
    """
    matrices = spd(4, 3)
    found = spd_distances(matrices)
    for i in range(4):
        for j in range(4):
            gap = sqrtm(matrices[i].numpy()) - sqrtm(matrices[j].numpy())
            assert found[i, j].item() == pytest.approx(2 * np.linalg.norm(gap), abs=1e-9)
    values, vectors = torch.linalg.eigh(matrices)
    logs = (vectors * values.log().unsqueeze(1)) @ vectors.mT
    limit = (logs[0] - logs[1]).norm()
    torch.testing.assert_close(spd_distances(matrices, power=1e-6)[0, 1], limit, rtol=1e-4, atol=0)
    frobenius = (matrices[0] - matrices[1]).norm()
    torch.testing.assert_close(spd_distances(matrices, power=1.0)[0, 1], frobenius)


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 3), (5, 1)])
def test_distance_correlation_against_dcor(p, q):
    """The peer library's value; fails if one of the two centerings is left out."""
    a, b = randn(40, p), randn(40, q, seed=1)
    b[:, 0] += a[:, 0] ** 2
    import dcor  # compiles and caches: one worker alone, not all of them while they collect

    expected = dcor.distance_correlation(a.numpy(), b.numpy())
    assert distance_correlation(a, b).item() == pytest.approx(expected, rel=1e-10)


def test_distance_correlation_of_limits_and_batches():
    """One for similar figures, zero for a constant side; batches are computed one by one."""
    a = randn(3, 30, 2)
    turn = torch.linalg.qr(randn(2, 2)).Q
    torch.testing.assert_close(distance_correlation(a, -4 * a @ turn + 1), torch.ones(3).double())
    assert distance_correlation(a[0], torch.ones(30, 1).double()) == 0.0
    b = randn(3, 30, 1, seed=5)
    one_by_one = torch.stack([distance_correlation(a[i], b[i]) for i in range(3)])
    torch.testing.assert_close(distance_correlation(a, b), one_by_one)


def test_bounded_metric_keeps_order_and_bound():
    """An increasing transform below one; the median distance becomes one half."""
    d = torch.cdist(randn(9, 1), randn(9, 1))
    found = bounded_metric(d)
    assert found.max() < 1.0
    assert torch.equal(found.flatten().argsort(), d.flatten().argsort())
    assert found.flatten().median() == 0.5


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 8),
    p=st.integers(1, 3),
    scale=st.sampled_from([0.0, 1e-12, 1.0, 1e9]),
    seed=st.integers(0, 99),
)
def test_hostile_sizes_and_scales_give_numbers(n, p, scale, seed):
    """Finite, symmetric, in range, whatever the scale, equal points included."""
    a = scale * randn(n, p, seed=seed)
    correlation = distance_correlation(a, randn(n, p, seed=seed + 1))
    assert 0.0 <= correlation <= 1.0
    for distances in (wasserstein_distances(a), bounded_metric(wasserstein_distances(a))):
        assert distances.isfinite().all()
        assert torch.equal(distances, distances.T)


def test_errors_name_the_argument():
    """Wrong shapes, points off the sphere, matrices that are not positive, powers out of range."""
    x = randn(4, 2)
    for bad, name in [
        (lambda: wasserstein_distances(x[0]), "quantiles must have shape"),
        (lambda: sphere_distances(x[0]), "points must have shape"),
        (lambda: sphere_distances(2 * x), "points must be unit vectors"),
        (lambda: spd_distances(x), "matrices must have shape"),
        (lambda: spd_distances(-spd(2, 2)), "matrices must be positive definite"),
        (lambda: spd_distances(spd(2, 2), power=0.0), "power must be positive"),
        (lambda: distance_correlation(x, x[:3]), "a and b must have shapes"),
        (lambda: bounded_metric(x), "distances must have shape"),
    ]:
        with pytest.raises(ValueError, match=name):
            bad()


def _spd_case(g):
    a = torch.randn(4, 3, 3, generator=g)
    return (a @ a.mT + torch.eye(3),)


CASES = {
    "bounded_metric": Case(
        inputs=lambda g: (wasserstein_distances(torch.randn(5, 2, generator=g)),),
        call=bounded_metric,
    ),
    "distance_correlation": Case(
        inputs=lambda g: (torch.randn(9, 2, generator=g), torch.randn(9, 1, generator=g)),
        call=distance_correlation,
    ),
    "spd_distances": Case(inputs=_spd_case, call=spd_distances),
    "sphere_distances": Case(
        inputs=lambda g: (torch.nn.functional.normalize(torch.randn(5, 3, generator=g)),),
        call=sphere_distances,
    ),
    "wasserstein_distances": Case(
        inputs=lambda g: (torch.randn(5, 7, generator=g),), call=wasserstein_distances
    ),
}
