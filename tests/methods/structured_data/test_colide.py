"""CoLiDE: scores, the solver, and the law of scale."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.methods.structured_data.colide import (
    colide,
    concomitant_score,
    dagma,
    logdet_acyclicity,
    noise_scale,
    simulate_linear_sem,
    structural_hamming_distance,
    threshold_dag,
)
from wellposed.ops.dag import random_dag

F64 = torch.float64
SHORT = {"warm_iters": 300, "max_iters": 500, "check_every": 100}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _cov(g, d=4):
    root = torch.randn(d + 3, d, generator=g)
    return root.T @ root / (d + 3)


def _weights_and_cov(g):
    return 0.3 * torch.randn(4, 4, generator=g), _cov(g)


def _problem(seed=0, *, d=6, batch=3, noise_std=1.0, num_samples=200):
    truth = random_dag(d, d, batch=batch, generator=_generator(seed))
    x = simulate_linear_sem(
        truth, num_samples, noise_std=noise_std, generator=_generator(seed + 100)
    )
    return truth, x


CASES = {
    "logdet_acyclicity": Case(
        inputs=lambda g: (0.3 * torch.rand(2, 4, 4, generator=g),), call=logdet_acyclicity
    ),
    "noise_scale": Case(inputs=_weights_and_cov, call=lambda w, c: noise_scale(w, c, "unequal")),
    "concomitant_score": Case(
        inputs=lambda g: (*_weights_and_cov(g), 0.5 + torch.rand(4, generator=g)),
        call=concomitant_score,
        nan_means="0 / 0: a level of zero",
    ),
    "colide": Case(
        inputs=lambda g: (torch.randn(2, 20, 3, generator=g),),
        call=lambda x: colide(x, noise="unequal", warm_iters=20, max_iters=40, check_every=10),
    ),
    "dagma": Case(
        inputs=lambda g: (torch.randn(20, 3, generator=g),),
        call=lambda x: dagma(x, warm_iters=20, max_iters=40, check_every=10),
    ),
    "simulate_linear_sem": Case(
        inputs=lambda g: (torch.randn(5, 5, generator=g).triu(1),),
        call=lambda w: simulate_linear_sem(
            w, 4, noise_std=0.5, generator=torch.Generator(w.device).manual_seed(0)
        ),
        on_device=False,
    ),
    "structural_hamming_distance": Case(
        inputs=lambda g: (torch.eye(3), torch.ones(3, 3)), call=structural_hamming_distance
    ),
    "threshold_dag": Case(inputs=lambda g: (torch.randn(5, 5, generator=g),), call=threshold_dag),
}


# --- scores and penalty ---------------------------------------------------------------------------


def _energy_by_loops(w, x):
    """Mean squared residual of each node, from the samples."""
    n, d = x.shape
    out = torch.zeros(d, dtype=F64)
    for j in range(d):
        for row in x:
            out[j] += (row[j] - sum(w[i, j] * row[i] for i in range(d))) ** 2 / n
    return out


def test_scores_and_levels_from_the_samples():
    """Fails if rows take the place of columns, or variances that of deviations."""
    g = _generator(3)
    x, w = torch.randn(8, 4, generator=g, dtype=F64), torch.randn(4, 4, generator=g, dtype=F64)
    cov, q = x.T @ x / 8, _energy_by_loops(w, x)
    torch.testing.assert_close(noise_scale(w, cov), (q.sum() / 4).sqrt())
    torch.testing.assert_close(noise_scale(w, cov, "unequal"), q.sqrt())
    sigma = torch.tensor(1.7, dtype=F64)
    torch.testing.assert_close(
        concomitant_score(w, cov, sigma), q.sum() / (2 * sigma) + 4 * sigma / 2
    )
    levels = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64)
    expected = sum(q[j] / (2 * levels[j]) + levels[j] / 2 for j in range(4))
    torch.testing.assert_close(concomitant_score(w, cov, levels), expected)


def test_profiled_score_is_a_square_root_lasso():
    """At the closed-form level both halves are equal; fails if it is off by a factor d."""
    w, cov = (t.double() for t in _weights_and_cov(_generator(4)))
    for noise in ("equal", "unequal"):
        scale = noise_scale(w, cov, noise)
        best = concomitant_score(w, cov, scale)
        torch.testing.assert_close(best, 4 * scale if noise == "equal" else scale.sum())
        for factor in (0.9, 1.1):
            assert concomitant_score(w, cov, factor * scale) > best


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_score_is_jointly_convex(seed, part, equal):
    """Fails for levels that enter as variances times a squared root."""
    g = _generator(seed)
    cov = _cov(g).double()
    w = torch.randn(2, 4, 4, generator=g, dtype=F64)
    levels = 0.1 + 3 * torch.rand(2, *([] if equal else [4]), generator=g, dtype=F64)
    middle = concomitant_score(
        part * w[0] + (1 - part) * w[1], cov, part * levels[0] + (1 - part) * levels[1]
    )
    ends = [concomitant_score(a, cov, b) for a, b in zip(w, levels)]
    assert middle <= part * ends[0] + (1 - part) * ends[1] + 1e-9


def test_penalty_is_zero_exactly_for_dags():
    truth = random_dag(7, 10, batch=4, generator=_generator(5))
    torch.testing.assert_close(logdet_acyclicity(truth, 0.7), torch.zeros(4, dtype=F64))
    back = truth.clone()
    back[:, 0, 0] = 0.5
    torch.testing.assert_close(
        logdet_acyclicity(back, 1.0), torch.full((4,), -math.log(0.75), dtype=F64)
    )
    outside = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    assert logdet_acyclicity(outside, 1.0).isinf()
    assert logdet_acyclicity(outside, 5.0) > 0


def test_gradients():
    """The gradient of h is that of the solver: fails if the inverse is not transposed."""
    g = _generator(6)
    w = 0.4 * torch.rand(2, 4, 4, generator=g, dtype=F64)
    w.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: logdet_acyclicity(v, 1.5), [w])
    expected = 2 * w * torch.linalg.inv(1.5 * torch.eye(4, dtype=F64) - w * w).mT
    (grad,) = torch.autograd.grad(logdet_acyclicity(w, 1.5).sum(), w)
    torch.testing.assert_close(grad, expected)
    cov = _cov(g).double()
    levels = (0.5 + torch.rand(2, 4, generator=g, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, s: concomitant_score(v, cov, s), [w, levels])
    (grad,) = torch.autograd.grad(concomitant_score(w, cov, levels).sum(), w)
    rest = torch.eye(4, dtype=F64) - w
    torch.testing.assert_close(grad, -(cov @ rest) / levels[:, None])


# --- the solver -----------------------------------------------------------------------------------


def _reference(x, noise, lam, *, mu, s, warm, most, lr=3e-3, tol=1e-6, every=200):
    """One problem in numpy, step by step from the paper and the description of its guard."""
    x = x - x.mean(0)
    n, d = x.shape
    cov, eye = x.T @ x / n, np.eye(d)
    std = np.sqrt(np.diag(cov))
    floor = 0.01 * std.min()
    level = {"equal": np.full(d, std.min()), "unequal": std, "none": np.ones(d)}[noise]

    def closed(w):
        q = np.diag((eye - w).T @ cov @ (eye - w))
        if noise == "none":
            return np.ones(d)
        return np.maximum(np.sqrt(q if noise == "unequal" else np.full(d, q.mean())), floor)

    def value(w, level, m, dom):
        q = np.diag((eye - w).T @ cov @ (eye - w))
        fit = (q / level).sum() / 2 + (0 if noise == "none" else level.sum() / 2)
        h = d * np.log(dom) - np.linalg.slogdet(dom * eye - w * w)[1]
        return m * (fit + lam * abs(w).sum()) + h

    def attempt(w, level, m, dom, rate, iters):
        first = second = step = 0
        before = None
        for it in range(1, iters + 1):
            inverse = np.linalg.inv(dom * eye - w * w)
            while (inverse < -1e-6).any():
                if it == 1 or dom <= 0.9:
                    return None
                w = w + rate * step
                rate /= 2
                w = w - rate * step
                level = closed(w)
                inverse = np.linalg.inv(dom * eye - w * w)
            grad = m * (-cov @ (eye - w) / level + lam * np.sign(w)) + 2 * w * inverse.T
            first, second = 0.99 * first + 0.01 * grad, 0.999 * second + 0.001 * grad**2
            step = first / (1 - 0.99**it) / (np.sqrt(second / (1 - 0.999**it)) + 1e-8)
            w = w - rate * step
            level = closed(w)
            if it % every == 0 or it == iters:
                now = value(w, level, m, dom)
                if before is not None and abs(before - now) <= tol * abs(before):
                    break
                before = now
        return w, level, it

    w, total, restarts = np.zeros((d, d)), 0, 0
    for k, (m, dom) in enumerate(zip(mu, s)):
        rate, found = lr, None
        while (
            found := attempt(w, level, m, dom, rate, most if k == len(mu) - 1 else warm)
        ) is None:
            rate, dom, restarts = rate / 2, dom + 0.1, restarts + 1
        w, level, steps = found
        total += steps
    return w, level, total, restarts


@pytest.mark.parametrize(
    ("noise", "factor", "s"),
    [
        ("equal", 1.0, (1.0, 0.9, 0.8, 0.7)),
        ("unequal", 1.0, (1.0, 0.9, 0.8, 0.7)),
        ("none", 1.0, (1.0, 0.9, 0.8, 0.7)),
        ("none", 30.0, (1.0, 0.9, 0.8, 0.7)),  # leaves the domain: steps are undone
        ("none", 30.0, (0.4, 0.9, 0.8, 0.7)),  # starts anew with larger s
    ],
)
def test_batched_solver_against_one_at_a_time(noise, factor, s):
    """Fails if Adam is not reset between stages, the guard does nothing, or lambda is lost."""
    _, x = _problem(7, d=5)
    x = factor * x
    mu = (1.0, 0.1, 0.01, 0.001)
    call = dagma if noise == "none" else colide
    extra = {} if noise == "none" else {"noise": noise}
    found = call(x, s=s, **SHORT, **extra)
    restarts = 0
    for b in range(3):
        w, level, total, more = _reference(
            x[b].numpy(), noise, 0.05, mu=mu, s=s, warm=300, most=500, every=100
        )
        restarts += more
        torch.testing.assert_close(found.weights[b], torch.from_numpy(w), rtol=1e-5, atol=1e-7)
        assert found.num_iters[b] == total
        if noise != "none":
            peer = torch.from_numpy(level if noise == "unequal" else level[:1].squeeze())
            torch.testing.assert_close(found.scale[b], peer, rtol=1e-5, atol=1e-8)
    if s[0] < 0.9:
        assert restarts > 0


def test_the_dagma_package_finds_the_same_weights():
    linear = pytest.importorskip("dagma.linear")
    _, x = _problem(8, d=6, batch=2, num_samples=300)
    ours = dagma(x, warm_iters=400, max_iters=800, check_every=100)
    for b in range(2):
        peer = linear.DagmaLinear(loss_type="l2")
        peer.fit(
            x[b].numpy().copy(), lambda1=0.05, w_threshold=0.0, T=4, s=[1.0, 0.9, 0.8, 0.7],
            lr=3e-3, warm_iter=400, max_iter=800, checkpoint=100,
        )  # fmt: skip
        torch.testing.assert_close(
            ours.weights[b], torch.from_numpy(peer.W_est), rtol=1e-6, atol=1e-8
        )
        loss, _ = peer._score(ours.weights[b].numpy())
        cov = torch.from_numpy(peer.cov)
        one = concomitant_score(ours.weights[b], cov, torch.ones((), dtype=F64))
        assert (one - 6 / 2).item() == pytest.approx(loss)
        h, _ = peer._h(ours.weights[b].numpy(), 0.9)
        assert logdet_acyclicity(ours.weights[b], 0.9).item() == pytest.approx(h, abs=1e-12)


def test_a_batch_equals_its_parts():
    """Fails if finished problems go on, or results return to the wrong place."""
    _, x = _problem(9, noise_std=0.3)
    x = x * torch.tensor([1.0, 5.0, 0.2], dtype=F64)[:, None, None]
    loose = {**SHORT, "tol": 3e-2}
    together = colide(x, lambda1=[0.02, 0.05, 0.2], **loose)
    assert len(set(together.num_iters.tolist())) > 1
    for b, lam in enumerate([0.02, 0.05, 0.2]):
        alone = colide(x[b], lambda1=lam, **loose)
        assert alone.weights.shape == (6, 6)
        assert alone.scale.shape == alone.num_iters.shape == alone.converged.shape == ()
        torch.testing.assert_close(together.weights[b], alone.weights, rtol=1e-5, atol=1e-7)
        assert together.num_iters[b] == alone.num_iters


@pytest.mark.parametrize("noise", ["equal", "unequal"])
def test_recovers_an_easy_graph_and_its_noise(noise):
    """Fails if weights are transposed."""
    truth, x = _problem(10, noise_std=2.0, num_samples=2000)
    found = colide(x, noise=noise)
    for w, estimate in zip(truth, threshold_dag(found.weights)):
        assert structural_hamming_distance(w, estimate) == 0
    torch.testing.assert_close(found.scale, torch.full_like(found.scale, 2.0), rtol=0.1, atol=0)
    assert found.converged.all()


@pytest.mark.parametrize("t", [0.25, 3.0])
def test_law_of_scale(t):
    """Fails if lambda of DAGMA is scaled by t instead of its square."""
    _, x = _problem(11)
    mu = (1.0, 0.1)
    short = {**SHORT, "s": (1.0, 0.9)}
    one = dagma(x, mu=mu, **short)
    two = dagma(t * x, lambda1=0.05 * t**2, mu=[m / t**2 for m in mu], **short)
    torch.testing.assert_close(two.weights, one.weights, rtol=0, atol=1e-7)
    assert not torch.allclose(dagma(t * x, mu=mu, **short).weights, one.weights, atol=1e-3)
    for noise in ("equal", "unequal"):
        one = colide(x, noise=noise, mu=mu, **short)
        two = colide(t * x, noise=noise, lambda1=0.05 * t, mu=[m / t for m in mu], **short)
        torch.testing.assert_close(two.weights, one.weights, rtol=0, atol=1e-7)
        torch.testing.assert_close(two.scale, t * one.scale, rtol=1e-6, atol=0)


def test_first_checkpoint_never_stops():
    """Comparing with an infinite objective would end each stage at once."""
    _, x = _problem(12, d=3)
    found = colide(x, mu=(1.0,), s=(1.0,), tol=1e6, check_every=50)
    assert (found.num_iters == 100).all()


def test_levels_stop_at_the_floor():
    """The second column is twice the first: no noise is left."""
    one = torch.randn(50, 1, generator=_generator(13), dtype=F64)
    x = torch.cat([one, 2 * one], 1)
    found = colide(x, noise="unequal", lambda1=0.0)
    expected = 0.01 * (one - one.mean()).square().mean().sqrt()
    torch.testing.assert_close(found.scale.min(), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"lambda1": 0.3},
        {"mu": (1.0, 0.2, 0.01, 0.001)},
        {"s": (1.1, 0.9, 0.8, 0.7)},
        {"warm_iters": 200},
        {"max_iters": 300},
        {"lr": 2e-3},
        {"betas": (0.9, 0.999)},
        {"betas": (0.99, 0.9)},
        {"tol": 1e-5},
        {"check_every": 150},
    ],
)
def test_every_option_matters(change):
    _, x = _problem(14)
    stops = "tol" in change or "check_every" in change  # only then is the tolerance met
    base = {**SHORT, "tol": 3e-2 if stops else 0.0}
    for call in (colide, dagma):
        before, after = call(x, **base), call(x, **{**base, **change})
        assert not torch.equal(before.weights, after.weights)


def test_float32_is_solved_in_float64():
    _, x = _problem(15)
    found = colide(x.float(), **SHORT)
    assert found.weights.dtype == found.scale.dtype == torch.float32
    assert torch.equal(found.weights, colide(x.float().double(), **SHORT).weights.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: colide(x, noise="some"), "noise must be"),
        (lambda x: colide(x[:, :1]), "at least 2 samples"),
        (lambda x: colide(x, mu=(1.0,)), "mu and s"),
        (lambda x: colide(x / 0), "finite"),
        (lambda x: colide(x * 0), "constant"),
        (lambda x: colide(x, lambda1=-1.0), "lambda1"),
        (lambda x: dagma(x, lambda1=[0.1, 0.2]), "lambda1"),
        (lambda x: colide(x, lr=0.0), "lr"),
        (lambda x: colide(x, check_every=0), "check_every"),
        (lambda x: colide(x, betas=(1.0, 0.9)), "betas"),
        (lambda x: colide(x, tol=-1.0), "tol"),
        (lambda x: colide(x[0, 0]), "shape"),
        (lambda x: noise_scale(x, x), "weights"),
        (lambda x: noise_scale(torch.eye(2), torch.eye(3)), "cov"),
        (lambda x: concomitant_score(torch.eye(2), torch.eye(2), torch.ones(3)), "scale"),
        (lambda x: logdet_acyclicity(torch.eye(2), 0.0), "s must"),
        (lambda x: logdet_acyclicity(torch.eye(2).long()), "floating"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(_problem()[1])


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating"):
        colide(torch.ones(3, 2, dtype=torch.int64))
