"""Tests of wellposed.methods.training_dynamics.neural_collapse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.methods.training_dynamics.neural_collapse import (
    block_spectrum,
    central_path_flow,
    central_path_velocity,
    collapse_metrics,
    feature_sensitivity,
    joint_flow,
    optimal_classifier,
    orthogonal_frame,
    proximal_features,
)

F64 = torch.float64
LABELS = torch.tensor([2, 0, 1, 1, 2, 0])


def _features(g, n=6, d=4):
    return (torch.randn(n, d, generator=g),)


def _y(h):
    return LABELS.to(h.device)


def _sensitivity(h):
    w = optimal_classifier(h, _y(h), 0.5)
    return feature_sensitivity(h, _y(h), w, 0.5, 0.1, 5.0)


def _joint(h, w):
    return joint_flow(h, w, _y(h), 0.5, 0.1, [0.0, 0.1])


CASES = {
    "collapse_metrics": Case(
        inputs=lambda g: (torch.randn(2, 6, 4, generator=g),),
        call=lambda h: collapse_metrics(h, _y(h)),
    ),
    "optimal_classifier": Case(inputs=_features, call=lambda h: optimal_classifier(h, _y(h), 0.5)),
    "central_path_velocity": Case(
        inputs=_features, call=lambda h: central_path_velocity(h, _y(h), 0.5, 0.1)
    ),
    "central_path_flow": Case(
        inputs=_features, call=lambda h: central_path_flow(h, _y(h), 0.5, 0.1, [0.0, 0.2])
    ),
    "joint_flow": Case(
        inputs=lambda g: (*_features(g), torch.randn(3, 4, generator=g)), call=_joint
    ),
    "proximal_features": Case(
        inputs=_features, call=lambda h: proximal_features(h, _y(h), 0.5, 0.1, 5.0)
    ),
    "feature_sensitivity": Case(inputs=_features, call=_sensitivity),
    "orthogonal_frame": Case(
        inputs=lambda g: (torch.zeros(1),),
        call=lambda like: orthogonal_frame(
            3, 2, 4, 0.5, 0.1, torch.Generator().manual_seed(3), dtype=like.dtype
        ),
    ),
    "block_spectrum": Case(
        inputs=lambda g: (),
        call=lambda: block_spectrum(3, 2, 4, 0.5, 0.1, 5.0),
        keeps_dtype=False,
    ),
}


def _random(k=3, n=4, d=5, seed=0, shuffle=True):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(k * n, d, generator=g, dtype=F64)
    y = torch.arange(k).repeat_interleave(n)
    return h, y[torch.randperm(k * n, generator=g)] if shuffle else y


def _objective(h, w, y, weight_reg, feature_reg, beta=0.0, h0=None):
    """f of the paper's Eq. 2, one sample at a time."""
    k, count = w.shape[0], len(h)
    total = weight_reg / (2 * k) * (w * w).sum()
    for i in range(count):
        target = torch.zeros(k, dtype=h.dtype)
        target[y[i]] = 1
        total = total + ((w @ h[i] - target) ** 2).sum() / (2 * count)
        total = total + feature_reg / (2 * count) * (h[i] ** 2).sum()
        if h0 is not None:
            total = total + beta / (2 * count) * ((h[i] - h0[i]) ** 2).sum()
    return total


def _reduced(h, y, weight_reg, feature_reg):
    """L(H), with the head from the normal equations, class by class."""
    k, d = int(y.max()) + 1, h.shape[1]
    ridge = len(h) // k * weight_reg * torch.eye(d, dtype=h.dtype)
    w = torch.stack([torch.linalg.inv(h.T @ h + ridge) @ h[y == c].sum(0) for c in range(k)])
    return _objective(h, w, y, weight_reg, feature_reg)


def test_metrics_against_loops():
    """Fails with n instead of Kn in the within-class covariance, or without the 1/K of NC1."""
    h, y = _random()
    k, means = 3, [_random()[0][y == c].mean(0) for c in range(3)]
    center = sum(means) / k
    within = sum(torch.outer(h[i] - means[y[i]], h[i] - means[y[i]]) for i in range(12)) / 12
    between = sum(torch.outer(m - center, m - center) for m in means) / k
    found = collapse_metrics(h, y)
    torch.testing.assert_close(found.within, within.trace())
    torch.testing.assert_close(found.between, between.trace())
    torch.testing.assert_close(found.nc1_ratio, within.trace() / between.trace())
    pinv = torch.linalg.pinv(between, rtol=1e-10)
    torch.testing.assert_close(found.nc1_pinv, (within @ pinv).trace() / k)
    gram = torch.stack([m - center for m in means])
    gram = gram @ gram.T
    simplex = (torch.eye(k, dtype=F64) - 1 / k) / math.sqrt(k - 1)
    torch.testing.assert_close(found.nc2, (gram / gram.norm() - simplex).norm())


def test_metrics_do_not_see_rotation_shift_or_scale():
    """Fails if the global mean is not subtracted. Traces scale with the square."""
    h, y = _random()
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=F64, generator=torch.Generator()))[0]
    one, two = collapse_metrics(h, y), collapse_metrics(3 * h @ turn + 2, y)
    for name in ("nc1_ratio", "nc1_pinv", "nc2"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name))
    torch.testing.assert_close(9 * one.within, two.within)


def test_head_is_the_minimizer():
    """Fails with the ridge lambda_W instead of n lambda_W."""
    h, y = _random()
    w = optimal_classifier(h, y, 0.3).requires_grad_()
    (slope,) = torch.autograd.grad(_objective(h, w, y, 0.3, 0.2), w)
    assert slope.abs().max() < 1e-14
    assert not torch.allclose(w, optimal_classifier(h, y, 0.31), rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 4),
    n=st.integers(1, 4),
    d=st.integers(1, 6),
    weight_reg=st.floats(1e-3, 1e3),
    feature_reg=st.floats(0, 10),
    seed=st.integers(0, 1000),
)
def test_velocity_is_the_gradient(k, n, d, weight_reg, feature_reg, seed):
    """-Kn times the gradient of L by autograd; fails if the sign of the decay flips."""
    h, y = _random(k, n, d, seed)
    h.requires_grad_()
    (slope,) = torch.autograd.grad(_reduced(h, y, weight_reg, feature_reg), h)
    found = central_path_velocity(h.detach(), y, weight_reg, feature_reg)
    torch.testing.assert_close(found, -k * n * slope, rtol=1e-6, atol=1e-8)


def test_gradcheck():
    """Velocity and metrics are differentiable in the features."""
    h, y = _random()
    h.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: central_path_velocity(v, y, 0.4, 0.2), h)
    assert torch.autograd.gradcheck(lambda v: tuple(vars(collapse_metrics(v, y)).values()), h)


def test_flow_matches_small_euler_steps():
    """Fails if the clock starts anew at each of the times."""
    h, y = _random()
    path = central_path_flow(h, y, 0.4, 0.2, [0.0, 0.05, 0.2])
    torch.testing.assert_close(path[0], h)
    step, state = 2e-5, h.clone()
    for _ in range(10000):
        state = state + step * central_path_velocity(state, y, 0.4, 0.2)
    torch.testing.assert_close(path[2], state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(central_path_flow(h, y, 0.4, 0.2, [0.2])[0], path[2])


@pytest.mark.parametrize("feature_reg", [0.0, 0.3])
def test_theorem_on_the_flow(feature_reg):
    """The three monotone quantities; fails if the scaling has the wrong sign."""
    h, y = _random(4, 5, 7)
    times = [0.1 * i for i in range(30)]
    found = collapse_metrics(central_path_flow(h, y, 0.5, feature_reg, times), y)
    grow = torch.tensor(times, dtype=F64).mul(2 * feature_reg).exp()
    assert (found.nc1_ratio.diff() < 0).all()
    assert ((grow * found.within).diff() < 0).all()
    assert ((grow * found.between).diff() > 0).all()


def test_traces_obey_the_derived_rates():
    """d/dt of the traces from P = M'(MM' + S + lambda_W)^-1 M, derived apart from the code."""
    h, y = _random(3, 4, 5)
    weight_reg, feature_reg, k = 0.4, 0.2, 3
    h.requires_grad_()
    found = collapse_metrics(h, y)
    speed = central_path_velocity(h.detach(), y, weight_reg, feature_reg)
    (up,) = torch.autograd.grad(found.between, h, retain_graph=True)
    (down,) = torch.autograd.grad(found.within, h)
    h = h.detach()
    means = torch.stack([h[y == c].mean(0) for c in range(k)]).T
    off = h - means.T[y]
    within = off.T @ off / 12
    inner = means @ means.T + k * within + weight_reg * torch.eye(5, dtype=F64)
    p = means.T @ torch.linalg.inv(inner) @ means
    center = torch.eye(k, dtype=F64) - 1 / k
    rate = 2 / k * (center @ p @ (torch.eye(k, dtype=F64) - p) @ center).trace()
    torch.testing.assert_close((up * speed).sum(), rate - 2 * feature_reg * found.between)
    w = optimal_classifier(h, y, weight_reg)
    rate = -2 * (w @ within @ w.T).trace() - 2 * feature_reg * within.trace()
    torch.testing.assert_close((down * speed).sum(), rate)


def test_joint_flow_is_the_gradient_and_tends_to_the_central_path():
    """Fails with the ridge lambda_W in the head's velocity; a fast head gives the central path."""
    h, y = _random()
    w = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    slopes = torch.autograd.grad(_objective(a, b, y, 0.4, 0.2), (a, b))
    path = joint_flow(h, w, y, 0.4, 0.2, [0.0, 1e-6], head_rate=2.0)
    for values, slope, rate in zip((path.features, path.classifier), slopes, (1, 2)):
        moved = (values[1] - values[0]) / 1e-6
        torch.testing.assert_close(moved, -12 * rate * slope, rtol=1e-3, atol=1e-3)
    aim = central_path_flow(h, y, 0.4, 0.2, [0.5])[0]
    best = optimal_classifier(h, y, 0.4)
    gaps = [
        (joint_flow(h, best, y, 0.4, 0.2, [0.5], head_rate=r).features[0] - aim).norm()
        for r in (1.0, 10.0, 100.0)
    ]
    assert gaps[2] < 0.2 * gaps[1] < 0.1 * gaps[0]


def test_a_ridge_lost_in_rounding():
    """Equal features c of length 4: each of W is 2 c / (24 c^2); a plain solve fails."""
    h = torch.full((6, 4), 1e8, dtype=F64)
    expected = torch.full((3, 4), 1e-8 / 12, dtype=F64)
    torch.testing.assert_close(optimal_classifier(h, LABELS, 0.5), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.3, 3.0, 300.0])
def test_model_is_stationary_and_contracts(beta):
    """Gradient of f by autograd, and the exact law; fails if lambda_H is left out of the solve."""
    h0, y = _random()
    found = proximal_features(h0, y, 0.4, 0.2, beta, tol=1e-13)
    assert found.converged
    h, w = (t.clone().requires_grad_() for t in (found.features, found.classifier))
    value = _objective(h, w, y, 0.4, 0.2, beta, h0)
    for slope in torch.autograd.grad(value, (h, w)):
        assert slope.abs().max() < 1e-11
    gram = w.T @ w + (0.2 + beta) * torch.eye(5, dtype=F64)
    for c in range(3):
        off = [t[y == c] - t[y == c].mean(0) for t in (found.features, h0)]
        torch.testing.assert_close(off[0] @ gram, beta * off[1], rtol=1e-8, atol=1e-9)


def test_model_is_an_implicit_euler_step():
    """For a large beta the move is the velocity over beta, with an error that falls as 1/beta^2."""
    h0, y = _random()
    speed = central_path_velocity(h0, y, 0.4, 0.2)
    errors = [
        (proximal_features(h0, y, 0.4, 0.2, b, tol=1e-14).features - h0 - speed / b).norm()
        for b in (1e2, 1e3)
    ]
    assert 80 < errors[0] / errors[1] < 120


def test_model_from_zero_is_unconstrained():
    """H0 = 0 recovers the model without a leash, with lambda_H + beta."""
    h, y, _ = orthogonal_frame(3, 2, 4, 0.3, 0.5)
    gone = proximal_features(torch.zeros_like(h), y, 0.3, 0.5, 1.0)
    assert gone.features.abs().max() == 0
    again = proximal_features(h, y, 0.3, 0.5, 7.0)
    torch.testing.assert_close(again.features, h)


def test_unfinished_is_said():
    """Too few updates: a warning and a field."""
    h, y = _random()
    with pytest.warns(RuntimeWarning, match="not converged after 3"):
        found = proximal_features(h, y, 0.4, 0.2, 0.1, max_iter=3)
    assert not found.converged
    assert found.iterations == 3
    assert proximal_features(h, y, 0.4, 0.2, 0.1, tol=1e-2).iterations < 100


def test_frame_is_a_minimum_of_the_model():
    """Stationary for f without a leash, and better than its neighbors."""
    g = torch.Generator().manual_seed(0)
    h, y, w = orthogonal_frame(3, 4, 5, 0.7, 0.2, g)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    value = _objective(a, b, y, 0.7, 0.2)
    for slope in torch.autograd.grad(value, (a, b)):
        assert slope.abs().max() < 1e-15
    for _ in range(5):
        near = (t + 0.1 * torch.randn(t.shape, generator=g, dtype=F64) for t in (h, w))
        assert _objective(*near, y, 0.7, 0.2) > value
    assert collapse_metrics(h, y).nc1_ratio < 1e-28
    assert collapse_metrics(h, y).nc2 < 1e-14
    other = orthogonal_frame(3, 4, 5, 0.7, 0.2, torch.Generator().manual_seed(1))[0]
    assert not torch.allclose(h, other)


def test_sensitivity_against_finite_differences():
    """At a solution that is not collapsed, labels shuffled; fails without the coupling term."""
    h0, y = _random(2, 3, 3)
    base = proximal_features(h0, y, 0.4, 0.2, 1.5, tol=1e-14)
    f = feature_sensitivity(base.features, y, base.classifier, 0.4, 0.2, 1.5)
    columns = []
    for j in range(18):
        e = torch.zeros(18, dtype=F64)
        e[j] = 1e-5
        ends = [
            proximal_features(h0 + s * e.view(6, 3), y, 0.4, 0.2, 1.5, tol=1e-14).features
            for s in (1, -1)
        ]
        columns.append((ends[0] - ends[1]).flatten() / 2e-5)
    torch.testing.assert_close(f, torch.stack(columns, 1), rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 4),
    n=st.integers(1, 4),
    free=st.integers(0, 3),
    c=st.floats(0.01, 0.99),
    ratio=st.floats(0.05, 20),
    beta=st.floats(0.1, 1e4),
)
def test_spectrum_of_the_blocks(k, n, free, c, ratio, beta):
    """The exact singular values; fails if q/2 is q, or if r is inverted."""
    feature_reg, weight_reg = c * ratio, c / ratio  # r = ratio
    h, y, w = orthogonal_frame(k, n, k + free, weight_reg, feature_reg)
    f = feature_sensitivity(h, y, w, weight_reg, feature_reg, beta)
    size = n * (k + free)
    expected = block_spectrum(k, n, k + free, weight_reg, feature_reg, beta)
    found = torch.linalg.svdvals(f[:size, :size])
    torch.testing.assert_close(found, expected.diagonal, rtol=1e-7, atol=1e-8)
    if n > 1:
        torch.testing.assert_close(expected.diagonal[-1].item(), beta / (beta + ratio))
    if k > 1:
        cross = torch.linalg.svdvals(f[:size, size : 2 * size])
        torch.testing.assert_close(cross[0], expected.off_diagonal, rtol=1e-6, atol=1e-8)
        assert (cross[1:] < 1e-8).all()


def test_dossier_values():
    """K=3, d=5, n=4, lambda_W=.7, lambda_H=.2, beta=200, computed independently before."""
    found = block_spectrum(3, 4, 5, 0.7, 0.2, 200.0)
    assert abs(found.diagonal[-1].item() - 0.9973345) < 1e-7
    assert abs(found.off_diagonal.item() - 0.0012485) < 1e-7


Y = torch.tensor([0, 0, 1, 1])
H = torch.ones(4, 2)
W = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal_classifier(H, Y, 0.0), "weight_reg must be positive"),
        (lambda: central_path_velocity(H, Y, 1.0, -1.0), "feature_reg must be finite"),
        (lambda: central_path_velocity(H, Y[:3], 1.0, 1.0), "labels must be int64 of shape"),
        (lambda: central_path_flow(H, Y, 1.0, 1.0, [0.2, 0.1]), "times must increase"),
        (lambda: central_path_flow(H, Y, 1.0, 1.0, []), "times must increase"),
        (lambda: central_path_flow(H, Y, 1.0, 1.0, [-0.1]), "times must increase"),
        (lambda: central_path_flow(H, Y, 1.0, 1.0, [math.inf]), "times must increase"),
        (lambda: joint_flow(H, W[:1], Y, 1.0, 1.0, [1.0]), "classifier must have shape"),
        (lambda: joint_flow(H, W, Y, 1.0, 1.0, [1.0], head_rate=0), "head_rate must be"),
        (lambda: proximal_features(H, Y, 1.0, 1.0, 0.0), "beta must be positive"),
        (lambda: proximal_features(H, Y, 1.0, 1.0, 1.0, max_iter=0), "tol and max_iter must"),
        (lambda: proximal_features(H, Y, 1.0, 1.0, 1.0, tol=0.0), "tol and max_iter must"),
        (lambda: feature_sensitivity(H, Y, W, 1.0, 1.0, -1.0), "beta must be positive"),
        (lambda: feature_sensitivity(H[None], Y, W[None], 1, 1, 1), r"features must be \(N, d\)"),
        (lambda: orthogonal_frame(3, 2, 2, 0.1, 0.1), "in_features at least num_classes"),
        (lambda: orthogonal_frame(0, 2, 2, 0.1, 0.1), "num_classes and per_class"),
        (lambda: orthogonal_frame(2, 2, 2, 1.0, 1.0), "weight_reg \\* feature_reg below 1"),
        (lambda: block_spectrum(2, 2, 2, 1.0, 0.0, 1.0), "feature_reg must be positive"),
        (lambda: block_spectrum(2, 2, 2, 0.1, 0.1, math.inf), "beta must be positive"),
    ],
)
def test_bad_input(call, message):
    """The text names the argument."""
    with pytest.raises(ValueError, match=message):
        call()
