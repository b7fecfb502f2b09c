"""Linear DAGs: drawing, sampling and counting, against loops and the dagma package."""

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.ops.dag import (
    centered_samples,
    edge_rates,
    random_dag,
    simulate_linear_sem,
    structural_hamming_distance,
    threshold_dag,
)

F64 = torch.float64


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _dag(g):
    return (torch.randn(2, 5, 5, generator=g).triu(1),)


def _two(g):
    return tuple((torch.rand(5, 5, generator=g) < 0.3).float() for _ in range(2))


CASES = {
    "centered_samples": Case(
        inputs=lambda g: (torch.randn(5, 3, generator=g),),
        call=centered_samples,
        keeps_dtype=False,
    ),
    "random_dag": Case(
        inputs=lambda g: (torch.zeros(1),),
        call=lambda like: random_dag(6, 5, batch=2, generator=_generator()),
        keeps_dtype=False,
    ),
    "simulate_linear_sem": Case(
        inputs=_dag,
        call=lambda w: simulate_linear_sem(
            w, 4, noise_std=0.5, generator=torch.Generator(w.device).manual_seed(0)
        ),
        on_device=False,
    ),
    "threshold_dag": Case(
        inputs=lambda g: (torch.randn(2, 5, 5, generator=g),), call=threshold_dag
    ),
    "structural_hamming_distance": Case(inputs=_two, call=structural_hamming_distance),
    "edge_rates": Case(inputs=_two, call=edge_rates),
}


def _acyclic(w):
    return nx.is_directed_acyclic_graph(nx.DiGraph(w.numpy()))


def test_centering_is_for_each_problem():
    """Fails if the mean runs over the batch, or the input is changed in place."""
    x = torch.randn(2, 9, 3, generator=_generator()) + 5
    before = x.clone()
    found = centered_samples(x)
    assert torch.equal(x, before)
    assert found.dtype == F64
    for b in range(2):
        for j in range(3):
            mean = sum(x[b, i, j].double() for i in range(9)) / 9
            torch.testing.assert_close(found[b, :, j], x[b, :, j].double() - mean)
    assert centered_samples(x[0]).shape == (1, 9, 3)
    with pytest.raises(TypeError, match="floating"):
        centered_samples(x.long())


def test_random_dag_has_the_promised_edges():
    """Fails if the probability is that of ordered pairs, or if nodes stay in order."""
    w = random_dag(12, 20, batch=300, low=0.5, high=2.0, generator=_generator())
    edges = w != 0
    assert abs(edges.sum((1, 2)).double().mean() - 20) < 0.8  # three standard errors
    assert all(_acyclic(one) for one in w[:50])
    size = w[edges].abs()
    assert 0.5 <= size.min() < 0.52
    assert 1.98 < size.max() <= 2.0
    assert 0.45 < (w[edges] > 0).double().mean() < 0.55
    forward = (edges.triu(1).sum() / edges.sum()).item()
    assert 0.45 < forward < 0.55


@pytest.mark.parametrize("distribution", ["gaussian", "exponential", "laplace"])
def test_noise_has_the_promised_spread(distribution):
    """Fails if Laplace noise is not divided by the root of two."""
    std = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
    x = simulate_linear_sem(
        torch.zeros(3, 3, dtype=F64),
        40000,
        noise_std=std,
        distribution=distribution,
        generator=_generator(),
    )
    torch.testing.assert_close(x.std(0), std, rtol=0.03, atol=0)


def test_samples_obey_the_equations():
    """Node j reads column j of the weights; fails if they are transposed."""
    w = random_dag(5, 6, generator=_generator(1))[0]
    x = simulate_linear_sem(w, 7, noise_std=1.0, generator=_generator(2))
    z = torch.randn(7, 5, dtype=F64, generator=_generator(2))
    for row, noise in zip(x, z):
        for j in range(5):
            read = sum(w[i, j] * row[i] for i in range(5))
            assert abs(row[j] - read - noise[j]) < 1e-12


def _naive_threshold(w, threshold):
    """Remove one edge at a time, the weakest first."""
    a = w.numpy().copy()
    a[np.abs(a) <= threshold] = 0
    while not nx.is_directed_acyclic_graph(nx.DiGraph(a)):
        size = np.where(a != 0, np.abs(a), np.inf)
        a.flat[size.argmin()] = 0
    return torch.from_numpy(a)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 10**6), st.floats(0, 1))
def test_threshold_against_one_at_a_time(d, seed, threshold):
    """Fails if the bisection stops one edge early."""
    w = torch.randn(d, d, dtype=F64, generator=_generator(seed))
    found = threshold_dag(w, threshold)
    assert torch.equal(found, _naive_threshold(w, threshold))
    assert threshold_dag(found, threshold).equal(found)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_distance_and_rates_from_sets(d, seed):
    """Fails if a reversed edge counts twice."""
    a, b = random_dag(d, d / 3, batch=2, generator=_generator(seed))
    true = {(i, j) for i in range(d) for j in range(d) if a[i, j] != 0}
    found = {(i, j) for i in range(d) for j in range(d) if b[i, j] != 0}
    turned = {(i, j) for i, j in found if (j, i) in true}
    wrong = {(i, j) for i, j in found if (i, j) not in true and (j, i) not in true}
    missed = {(i, j) for i, j in true if (i, j) not in found and (j, i) not in found}
    assert structural_hamming_distance(a, b) == len(turned) + len(wrong) + len(missed)
    tpr, fdr = edge_rates(a, b)
    assert tpr == pytest.approx(len(true & found) / max(len(true), 1))
    assert fdr == pytest.approx((len(wrong) + len(turned)) / max(len(found), 1))


def test_distance_of_the_dagma_package():
    utils = pytest.importorskip("dagma.utils")
    for seed in range(5):
        a, b = random_dag(8, 12, batch=2, generator=_generator(seed))
        peer = utils.count_accuracy(a.numpy() != 0, b.numpy() != 0)
        assert structural_hamming_distance(a, b) == peer["shd"]
        assert edge_rates(a, b) == pytest.approx((peer["tpr"], peer["fdr"]))


def test_undirected_edge_counts_as_right():
    edge = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    both = torch.ones(2, 2) - torch.eye(2)
    assert structural_hamming_distance(edge, both) == 0
    assert structural_hamming_distance(torch.zeros(2, 2), both) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: centered_samples(torch.ones(3)), "shape"),
        (lambda: centered_samples(torch.ones(1, 3)), "2 samples"),
        (lambda: centered_samples(torch.full((2, 2), torch.inf)), "finite"),
        (lambda: random_dag(0, 0), "num_nodes"),
        (lambda: random_dag(3, 4), "num_edges"),
        (lambda: random_dag(3, 2, low=2.0, high=1.0), "low and high"),
        (lambda: simulate_linear_sem(torch.ones(2, 2), 3, noise_std=1.0), "acyclic"),
        (lambda: simulate_linear_sem(torch.zeros(2, 3), 3, noise_std=1.0), "weights"),
        (lambda: simulate_linear_sem(torch.zeros(2, 2), 0, noise_std=1.0), "num_samples"),
        (lambda: simulate_linear_sem(torch.zeros(2, 2), 3, noise_std=-1.0), "noise_std"),
        (
            lambda: simulate_linear_sem(torch.zeros(2, 2), 3, noise_std=1.0, distribution="cauchy"),
            "distribution",
        ),
        (
            lambda: simulate_linear_sem(1e30 * torch.ones(4, 4).triu(1), 3, noise_std=1.0),
            "overflow",
        ),
        (lambda: threshold_dag(torch.zeros(3)), "weights"),
        (lambda: threshold_dag(torch.full((2, 2), torch.nan)), "finite"),
        (lambda: threshold_dag(torch.zeros(2, 2), -1.0), "threshold"),
        (lambda: structural_hamming_distance(torch.zeros(2, 2), torch.zeros(3, 3)), "one shape"),
        (lambda: edge_rates(torch.zeros(2), torch.zeros(2)), "true"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
