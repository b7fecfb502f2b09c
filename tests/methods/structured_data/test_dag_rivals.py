"""NOTEARS and sorting by variance."""

import numpy as np
import pytest
import torch

from contract import Case
from wellposed.methods.structured_data.dag_rivals import (
    _value_and_gradient,
    notears,
    sort_n_regress,
    trace_exp_acyclicity,
)
from wellposed.ops.dag import random_dag, simulate_linear_sem, threshold_dag

F64 = torch.float64


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _problem(seed=0, d=6, n=400):
    truth = random_dag(d, d, batch=2, generator=_generator(seed))
    return truth, simulate_linear_sem(truth, n, noise_std=1.0, generator=_generator(seed + 50))


CASES = {
    "trace_exp_acyclicity": Case(
        inputs=lambda g: (0.5 * torch.rand(2, 4, 4, generator=g),), call=trace_exp_acyclicity
    ),
    "notears": Case(
        inputs=lambda g: (torch.randn(20, 3, generator=g),),
        call=lambda x: notears(x, max_iters=3).weights,
    ),
    "sort_n_regress": Case(
        inputs=lambda g: (torch.randn(2, 20, 4, generator=g),), call=sort_n_regress
    ),
}


def test_penalty_counts_closed_walks():
    """The series of the exponential; fails if W enters without its square."""
    w = 0.5 * torch.randn(4, 4, generator=_generator(1), dtype=F64)
    square, power, factorial, total = w * w, torch.eye(4, dtype=F64), 1.0, 0.0
    for k in range(1, 30):
        power, factorial = power @ square, factorial * k
        total += power.trace().item() / factorial
    assert trace_exp_acyclicity(w).item() == pytest.approx(total)
    dags = random_dag(6, 8, batch=3, generator=_generator(2))
    torch.testing.assert_close(trace_exp_acyclicity(dags), torch.zeros(3, dtype=F64))
    assert torch.autograd.gradcheck(trace_exp_acyclicity, [w.requires_grad_()])


def test_gradient_of_the_lagrangian():
    """Fails if the exponential is not transposed or alpha is lost."""
    rng = np.random.default_rng(0)
    root, halves = rng.normal(size=(9, 4)), rng.uniform(size=32)
    cov = root.T @ root / 9
    value, grad = _value_and_gradient(halves, cov, 0.1, 2.0, 0.7)
    weights = (halves[:16] - halves[16:]).reshape(4, 4)
    h = trace_exp_acyclicity(torch.from_numpy(weights)).item()
    residual = root @ (np.eye(4) - weights)
    direct = (residual**2).sum() / 18 + 0.1 * halves.sum() + h * h + 0.7 * h
    assert value == pytest.approx(direct)
    for i in range(32):
        shift = 1e-6 * np.eye(32)[i]
        ends = [_value_and_gradient(halves + k * shift, cov, 0.1, 2.0, 0.7)[0] for k in (1, -1)]
        assert grad[i] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_notears_of_gcastle_finds_the_same_graph():
    """Its penalty is a polynomial instead of the exponential: graphs agree, weights nearly."""
    dtype = torch.get_default_dtype()
    algorithms = pytest.importorskip("castle.algorithms")
    torch.set_default_dtype(dtype)  # importing gcastle makes float64 the default of the process
    _, x = _problem(3)
    ours = notears(x, lambda1=0.1)
    assert ours.converged.all()
    for b in range(2):
        peer = algorithms.Notears(lambda1=0.1)
        peer.learn(x[b].numpy().copy())
        weights = torch.from_numpy(np.array(peer.weight_causal_matrix, dtype=float))
        assert torch.equal(weights.abs() > 0.3, ours.weights[b].abs() > 0.3)
        torch.testing.assert_close(ours.weights[b], weights, rtol=0, atol=2e-2)


def test_notears_recovers_and_reports():
    truth, x = _problem(4, n=2000)
    found = notears(x)
    assert torch.equal(threshold_dag(found.weights) != 0, truth != 0)
    torch.testing.assert_close(
        found.acyclicity, trace_exp_acyclicity(found.weights), rtol=1e-6, atol=1e-12
    )
    stopped = notears(x, max_iters=1)
    assert not stopped.converged.any()
    assert (stopped.num_evals < found.num_evals).all()
    assert not torch.equal(notears(x, lambda1=0.3).weights, found.weights)
    assert not torch.equal(notears(x, h_tol=1e-3).weights, found.weights)
    assert not notears(x, rho_max=2.0).converged.any()
    alone = notears(x[1])
    assert torch.equal(alone.weights, found.weights[1])


def test_regressions_after_sorting():
    """Each node by least squares on those of smaller variance; fails if the order is reversed."""
    _, x = _problem(5)
    found = sort_n_regress(x)
    for b in range(2):
        data = x[b].numpy() - x[b].numpy().mean(0)
        order = np.argsort(data.var(0))
        for k, j in enumerate(order):
            expected = np.zeros(6)
            if k:
                before = order[:k]
                expected[before] = np.linalg.lstsq(data[:, before], data[:, j], rcond=None)[0]
            np.testing.assert_allclose(found[b, :, j].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: notears(x, lambda1=-1.0), "lambda1"),
        (lambda x: notears(x, max_iters=0), "max_iters"),
        (lambda x: notears(x / 0), "finite"),
        (lambda x: notears(x[0, 0]), "shape"),
        (lambda x: notears(x[:, :1]), "at least 2"),
        (lambda x: sort_n_regress(x[:, :4]), "more than 6"),
        (lambda x: sort_n_regress(torch.cat([x, x], -1)), "dependent"),
        (lambda x: trace_exp_acyclicity(torch.ones(3)), "weights"),
        (lambda x: trace_exp_acyclicity(torch.ones(3, 3).long()), "floating"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(_problem()[1])


def test_integers_are_refused():
    for call in (notears, sort_n_regress):
        with pytest.raises(TypeError, match="floating"):
            call(torch.ones(9, 2, dtype=torch.int64))
