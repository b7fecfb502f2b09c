"""Bag, instance and interpolating losses, their linear risk theory, and the private mechanism."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor

from contract import Case
from wellposed.methods.noisy_labels import aggregate_responses
from wellposed.methods.noisy_labels.aggregate_responses import (
    BaggedSplits,
    asymptotic_risk,
    bag_loss,
    bag_means,
    bagged_splits,
    fit_interpolating,
    instance_loss,
    interpolating_loss,
    leave_one_bag_out,
    optimal_bag_size,
    private_noise_var,
    privatize_bag_means,
    simulate_private_risk,
    simulate_risk,
    train_network,
)
from wellposed.nets import MLP


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n=24, d=3, bag_size=4, seed=0):
    """Features, responses and bag means in float64."""
    g = gen(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = torch.randn(n, generator=g, dtype=torch.float64)
    return X, y, bag_means(y, bag_size)


# --- losses ----------------------------------------------------------------------------------


def slow_losses(pred, bag_y, k):
    """Both losses from their definitions, bag by bag and row by row."""
    bag, instance = 0.0, 0.0
    for a in range(len(bag_y)):
        rows = [float(pred[a * k + j]) for j in range(k)]
        bag += (float(bag_y[a]) - sum(rows) / k) ** 2 / len(bag_y)
        instance += sum((float(bag_y[a]) - f) ** 2 for f in rows) / (len(bag_y) * k)
    return bag, instance


@pytest.mark.parametrize("bag_size", [1, 2, 3, 4, 12])
def test_losses_against_explicit_loops(bag_size):
    """Fails if the bag loss is divided by n, the instance loss by m, or bags are strided rows."""
    _, pred, _ = problem(seed=1)
    bag_y = problem(bag_size=bag_size)[2]
    bag, instance = slow_losses(pred, bag_y, bag_size)
    assert bag_loss(pred, bag_y, bag_size).item() == pytest.approx(bag, rel=1e-13)
    assert instance_loss(pred, bag_y, bag_size).item() == pytest.approx(instance, rel=1e-13)
    for rho in (0.0, 0.3, 1.0):
        mixed = (1 - rho) * bag + rho * instance
        value = interpolating_loss(pred, bag_y, bag_size, rho).item()
        assert value == pytest.approx(mixed, rel=1e-12)


def test_instance_loss_is_bag_loss_plus_spread():
    """The paper's lemma, with the spread over pairs; fails if the spread is divided by m, not n."""
    k = 4
    _, pred, _ = problem(seed=1)
    bag_y = problem(bag_size=k)[2]
    pairs = sum(
        float((pred[a * k + i] - pred[a * k + j]) ** 2)
        for a, i, j in itertools.product(range(6), range(k), range(k))
    )
    gap = instance_loss(pred, bag_y, k) - bag_loss(pred, bag_y, k)
    assert gap.item() == pytest.approx(pairs / (2 * len(pred) * k), rel=1e-12)
    assert gap > 0


def test_losses_agree_where_bags_have_one_row_or_one_value():
    pred, y = torch.randn(6, generator=gen()), torch.randn(6, generator=gen(1))
    torch.testing.assert_close(bag_loss(pred, y, 1), instance_loss(pred, y, 1))
    flat = torch.tensor([1.0, 1.0, 2.0, 2.0])
    bag_y = torch.tensor([3.0, 0.0])
    assert bag_loss(flat, bag_y, 2) == instance_loss(flat, bag_y, 2) == 4.0


def test_permuting_rows_inside_a_bag_changes_nothing():
    _, pred, _ = problem(seed=1)
    bag_y = problem()[2]
    inside = pred.reshape(6, 4)[:, [2, 0, 3, 1]].reshape(-1)
    across = pred.roll(1)
    for loss in (bag_loss, instance_loss):
        torch.testing.assert_close(loss(inside, bag_y, 4), loss(pred, bag_y, 4))
        assert not torch.isclose(loss(across, bag_y, 4), loss(pred, bag_y, 4))


def test_losses_keep_leading_axes():
    pred = torch.randn(2, 5, 12, generator=gen())
    bag_y = torch.randn(2, 1, 4, generator=gen(1))
    for loss in (bag_loss, instance_loss, lambda f, y, k: interpolating_loss(f, y, k, 0.3)):
        value = loss(pred, bag_y, 3)
        assert value.shape == (2, 5)
        torch.testing.assert_close(value[1, 2], loss(pred[1, 2], bag_y[1, 0], 3))


def test_gradients():
    pred = torch.randn(8, generator=gen(), dtype=torch.float64, requires_grad=True)
    bag_y = torch.randn(4, generator=gen(1), dtype=torch.float64, requires_grad=True)
    for loss in (bag_loss, instance_loss, lambda f, y, k: interpolating_loss(f, y, k, 0.3)):
        assert torch.autograd.gradcheck(lambda f, y, loss=loss: loss(f, y, 2), (pred, bag_y))


def test_bag_means_of_vectors_matrices_and_stacks():
    """Fails if a matrix is averaged along its features."""
    X, y, bag_y = problem(bag_size=4)
    assert bag_y.tolist() == pytest.approx([float(y[4 * a : 4 * a + 4].mean()) for a in range(6)])
    means = bag_means(X, 4)
    torch.testing.assert_close(means[2], X[8:12].mean(0))
    torch.testing.assert_close(bag_means(torch.stack([X, -X]), 4)[1], -means)


@pytest.mark.parametrize(("n", "bag_size"), [(10, 3), (0, 2), (2, 4)])
def test_bags_must_fit(n, bag_size):
    with pytest.raises(ValueError, match=f"rows must be a positive multiple of {bag_size}, got"):
        bag_means(torch.zeros(n), bag_size)
    with pytest.raises(ValueError, match="rows must be a positive multiple"):
        fit_interpolating(torch.zeros(n, 2), torch.zeros(3), bag_size, 0.5)


def test_bad_losses_are_refused():
    pred, bag_y = torch.zeros(6), torch.zeros(3)
    with pytest.raises(ValueError, match="bag_size must be at least 1, got 0"):
        bag_loss(pred, bag_y, 0)
    with pytest.raises(ValueError, match=r"bag_y must hold 2 bag means, got shape \(3,\)"):
        instance_loss(pred, bag_y, 3)
    for rho in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"rho must lie in \[0, 1\]"):
            interpolating_loss(pred, bag_y, 2, rho)


# --- linear regression -----------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.7, 1.0])
def test_fit_is_the_minimum_of_the_loss(rho):
    """The gradient of the loss itself; fails if the spread enters as rho / m."""
    X, _, bag_y = problem()
    theta = fit_interpolating(X, bag_y, 4, rho).requires_grad_()
    (grad,) = torch.autograd.grad(interpolating_loss(X @ theta, bag_y, 4, rho), theta)
    assert grad.abs().max() < 1e-14


def test_instance_end_is_least_squares_on_repeated_means():
    """A peer library on rows that each carry their bag's mean."""
    X, _, bag_y = problem()
    peer = LinearRegression(fit_intercept=False).fit(X, bag_y.repeat_interleave(4))
    np.testing.assert_allclose(fit_interpolating(X, bag_y, 4, 1.0), peer.coef_, rtol=1e-10)


def test_bag_end_with_ridge_is_ridge_on_bag_means():
    """A peer library; its penalty is not divided by the number of rows."""
    X, _, bag_y = problem()
    peer = Ridge(alpha=6 * 0.2, fit_intercept=False).fit(bag_means(X, 4), bag_y)
    np.testing.assert_allclose(fit_interpolating(X, bag_y, 4, 0.0, ridge=0.2), peer.coef_)


def test_singular_fit_has_the_least_norm():
    """More features than bags; numpy's least-norm solution. Fails with a jitter in the matrix."""
    X, _, bag_y = problem(n=24, d=10, bag_size=4)
    least = np.linalg.lstsq(bag_means(X, 4).numpy(), bag_y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit_interpolating(X, bag_y, 4, 0.0), least, rtol=1e-9)
    assert bag_loss(X @ torch.from_numpy(least), bag_y, 4) < 1e-25


def test_fit_of_a_stack_is_a_stack_of_fits():
    (X, _, b), (X2, _, b2) = problem(), problem(seed=5)
    both = fit_interpolating(torch.stack([X, X2]), torch.stack([b, b2]), 4, 0.3)
    torch.testing.assert_close(both[0], fit_interpolating(X, b, 4, 0.3))
    torch.testing.assert_close(both[1], fit_interpolating(X2, b2, 4, 0.3))
    many = fit_interpolating(X, torch.stack([b, b2, b]), 4, 0.3)
    torch.testing.assert_close(many[1], fit_interpolating(X, b2, 4, 0.3))


def test_fit_ignores_the_penalty_when_bags_have_one_row():
    X, y, _ = problem()
    a, b = (fit_interpolating(X, y, 1, rho) for rho in (0.0, 1.0))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change", [{"rho": 0.5}, {"bag_size": 2}, {"ridge": 0.1}])
def test_each_knob_of_the_fit_matters(change):
    X, y, _ = problem()
    for function in (fit_interpolating, leave_one_bag_out):
        settings = {"bag_size": 4, "rho": 0.1, "ridge": 0.0}
        first = function(X, bag_means(y, 4), **settings)
        settings |= change
        second = function(X, bag_means(y, settings["bag_size"]), **settings)
        assert not torch.allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize(("rho", "ridge"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (1.0, 0.1)])
def test_leave_one_bag_out_against_refitting(rho, ridge):
    """Explicit refits without one bag's response; fails if 1 - h is left out or squared twice."""
    X, _, bag_y = problem()
    k, m = 4, 6
    U = bag_means(X, k)
    V = X - U.repeat_interleave(k, 0)
    errors = []
    for a in range(m):
        keep = torch.arange(m) != a
        matrix = U[keep].T @ U[keep] / m + rho * V.T @ V / len(X) + ridge * torch.eye(3).double()
        theta = torch.linalg.solve(matrix, U[keep].T @ bag_y[keep] / m)
        errors.append(float((bag_y[a] - U[a] @ theta) ** 2))
    value = leave_one_bag_out(X, bag_y, k, rho, ridge=ridge)
    assert value.item() == pytest.approx(sum(errors) / m, rel=1e-9)


def test_leave_one_bag_out_is_infinite_for_an_exact_fit():
    X, _, bag_y = problem(n=24, d=10, bag_size=4)
    assert leave_one_bag_out(X, bag_y, 4, 0.0).item() == math.inf
    assert leave_one_bag_out(X, bag_y, 4, 0.1).isfinite()


def test_fits_refuse_bad_input():
    X, _, bag_y = problem()
    for function in (fit_interpolating, leave_one_bag_out):
        with pytest.raises(ValueError, match=r"rho must lie in \[0, 1\], got 2"):
            function(X, bag_y, 4, 2.0)
        with pytest.raises(ValueError, match="ridge must be finite and at least 0, got -1"):
            function(X, bag_y, 4, 0.5, ridge=-1.0)
        with pytest.raises(ValueError, match=r"bag_y must hold 6 bag means, got \(5,\)"):
            function(X, bag_y[:5], 4, 0.5)
        with pytest.raises(ValueError, match=r"X must have shape \(\.\.\., n, d\), got \(24,\)"):
            function(X[:, 0], bag_y, 4, 0.5)


# --- asymptotic risk -------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "k"), [(0.25, 2), (0.1, 7), (0.6, 3), (0.02, 40)])
def test_closed_ends(gamma, k):
    """The corollary for both ends; fails if bias and variance are swapped."""
    s2, r2, q = 1.7, 0.6, 1 - 1 / k
    ins = asymptotic_risk(gamma, k, 1.0, s2, r2)
    assert ins.bias == pytest.approx(q * q * r2 + gamma / (1 - gamma) / k * q * r2)
    assert ins.variance == pytest.approx(gamma / (1 - gamma) / k * s2)
    bag = asymptotic_risk(gamma, k, 0.0, s2, r2)
    load = gamma * k
    expected = (0.0, s2 * load / (1 - load)) if load < 1 else (r2 * (1 - 1 / load), s2 / (load - 1))
    assert (bag.bias, bag.variance) == pytest.approx(expected)
    for result in (ins, bag):
        assert result.risk == pytest.approx(result.bias + result.variance)


def test_small_rho_tends_to_the_bag_end_while_bags_outnumber_features():
    near = asymptotic_risk(0.25, 2, 1e-9, 1.3, 0.7)
    end = asymptotic_risk(0.25, 2, 0.0, 1.3, 0.7)
    assert (near.bias, near.variance) == pytest.approx((end.bias, end.variance), abs=1e-6)


def test_small_rho_jumps_where_features_outnumber_bags():
    """Many fits then pass through all bag means. A trace of rho picks the one with the least
    spread inside bags, rho = 0 the one of least norm: two risks, in theory and in fact."""
    near, end = (asymptotic_risk(0.6, 3, rho, 1.0).risk for rho in (1e-6, 0.0))
    assert near > 1.5 * end
    risk = simulate_risk(
        150, 90, 3, rhos=[1e-6, 0.0], noise_vars=[1.0], draws=40, generator=gen(8)
    ).mean(0)[0]
    assert risk.tolist() == pytest.approx([near, end], rel=0.15)


def test_one_row_a_bag_is_ordinary_least_squares():
    for rho in (0.0, 0.4, 1.0):
        assert asymptotic_risk(0.3, 1, rho, 2.0).risk == pytest.approx(2.0 * 0.3 / 0.7)


@pytest.mark.parametrize(("k", "rho"), [(2, 0.3), (3, 0.05), (5, 0.7)])
def test_theory_against_exact_traces(k, rho):
    """One large matrix whose conditional bias and variance are traces; they average themselves.
    Fails if c2 loses its square or alpha its 1 + delta."""
    d, n = 500, 1500
    X = torch.randn(n, d, generator=gen(3), dtype=torch.float64).numpy()
    m = n // k
    U = X.reshape(m, k, d).mean(1)
    V = X - U.repeat(k, 0)
    between = U.T @ U / m
    inverse = np.linalg.inv(between + rho * V.T @ V / n)
    variance = np.trace(inverse @ between @ inverse) / (k * m)
    bias = ((inverse @ between - np.eye(d)) ** 2).sum() / d
    theory = asymptotic_risk(d / n, k, rho, 1.0)
    assert theory.variance == pytest.approx(variance, rel=0.02)
    assert theory.bias == pytest.approx(bias, rel=0.02)


def test_risk_is_linear_in_noise_and_signal():
    one = asymptotic_risk(0.3, 3, 0.2, 1.0, 1.0)
    other = asymptotic_risk(0.3, 3, 0.2, 5.0, 2.0)
    assert (other.bias, other.variance) == pytest.approx((2 * one.bias, 5 * one.variance))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 2, 0.5, 1.0), "gamma must be positive and finite"),
        ((1.0, 2, 0.5, 1.0), "gamma must be below 1 for rho > 0, got 1"),
        ((0.25, 4, 0.0, 1.0), "must differ from 1 for rho = 0"),
        ((0.1, 10, 0.0, 1.0), "must differ from 1 for rho = 0"),
        ((0.2, 0, 0.5, 1.0), "bag_size must be at least 1"),
        ((0.2, 2, 1.5, 1.0), r"rho must lie in \[0, 1\]"),
        ((0.2, 2, 0.5, -1.0), "noise_var and signal must be at least 0"),
        ((0.2, 2, 0.5, 1.0, -1.0), "noise_var and signal must be at least 0"),
    ],
)
def test_theory_refuses_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        asymptotic_risk(*arguments)
    assert asymptotic_risk(1.5, 2, 0.0, 1.0).risk > 0


# --- privacy ---------------------------------------------------------------------------------


def test_laplace_noise_has_the_stated_law():
    """Quantiles against scipy's Laplace (4 standard errors); fails if the scale loses its 2."""
    from scipy import stats

    n, k, bound, epsilon = 40_000, 5, 1.5, 0.7
    noise = privatize_bag_means(torch.zeros(n, dtype=torch.float64), k, bound, epsilon, gen())
    scale = 2 * bound / (k * epsilon)
    assert stats.kstest(noise.numpy(), stats.laplace(scale=scale).cdf).statistic < 2 / math.sqrt(n)
    assert noise.var().item() == pytest.approx(2 * scale**2, rel=0.05)


def test_release_is_private():
    """An audit: two bags that differ in one extreme response. No outcome may be more than
    e^epsilon times as likely under one; fails with half the scale, which is only 2 epsilon."""
    n, k, bound, epsilon = 400_000, 2, 1.0, 1.0
    first = torch.full((n,), bound, dtype=torch.float64)  # both responses at the bound
    second = torch.zeros(n, dtype=torch.float64)  # one of the two at the other end
    a = privatize_bag_means(first, k, bound, epsilon, gen(1))
    b = privatize_bag_means(second, k, bound, epsilon, gen(2))
    for cut in (-0.5, 0.0, 0.5, 1.0, 1.5):
        above = [(t > cut).double().mean().item() for t in (a, b)]
        below = [1 - share for share in above]
        assert math.log(above[0] / above[1]) < epsilon + 0.05
        assert math.log(below[1] / below[0]) < epsilon + 0.05
    tail = math.log((a > 1.2).double().mean() / (b > 1.2).double().mean())
    assert tail == pytest.approx(epsilon, abs=0.05)  # and the budget is used in full


def test_noise_depends_on_every_argument():
    bag_y = torch.zeros(5)
    base = privatize_bag_means(bag_y, 2, 1.0, 1.0, gen())
    assert torch.equal(base, privatize_bag_means(bag_y, 2, 1.0, 1.0, gen()))
    for k, bound, epsilon in ((4, 1.0, 1.0), (2, 0.5, 1.0), (2, 1.0, 2.0)):
        torch.testing.assert_close(
            privatize_bag_means(bag_y, k, bound, epsilon, gen()), base / 2, rtol=1e-5, atol=0
        )
    assert not torch.equal(privatize_bag_means(bag_y, 2, 1.0, 1.0, gen(1)), base)


def test_private_noise_var_matches_the_mechanism():
    """k times the variance of a private bag mean of noise alone; fails without the factor k."""
    n, k, bound, epsilon = 60_000, 3, 2.0, 1.5
    noise = 0.5 * torch.randn(n * k, generator=gen(), dtype=torch.float64)
    means = privatize_bag_means(bag_means(noise, k), k, bound, epsilon, gen(1))
    expected = private_noise_var(0.25, k, bound, epsilon)
    assert expected == pytest.approx(0.25 + 8 * bound**2 / (k * epsilon**2))
    assert k * means.var().item() == pytest.approx(expected, rel=0.03)


def test_optimal_bag_size():
    """A search by hand; the bag loss always wants single rows, the instance loss need not."""
    for epsilon in (0.5, 1.0, 2.0, 5.0):
        assert optimal_bag_size(0.02, epsilon, bound=3.0, rho=0.0) == 1
    gamma, bound, epsilon = 0.02, 3.0, 1.0
    risks = {
        k: (1 - 1 / k) ** 2
        + gamma / (1 - gamma) / k * ((1 - 1 / k) + 1 + 8 * bound**2 / (k * epsilon**2))
        for k in range(1, 41)
    }
    assert optimal_bag_size(gamma, epsilon, bound=bound) == min(risks, key=risks.get) == 3
    base = {"bound": 3.0}
    for change in ({"bound": 6.0}, {"rho": 0.2}, {"noise_var": 200.0}, {"signal": 0.1}):
        assert optimal_bag_size(gamma, epsilon, **(base | change)) != 3
    assert optimal_bag_size(gamma, epsilon, bound=3.0, bag_sizes=[1, 9]) == 9
    assert optimal_bag_size(0.25, 1.0, bound=3.0, rho=0.0, bag_sizes=[4, 2]) == 2


@pytest.mark.parametrize(("k", "bound", "epsilon"), [(0, 1.0, 1.0), (2, 0.0, 1.0), (2, 1.0, 0.0)])
def test_privacy_refuses_bad_input(k, bound, epsilon):
    message = "bag_size must be at least 1" if k < 1 else "bound and epsilon must be positive"
    with pytest.raises(ValueError, match=message):
        privatize_bag_means(torch.zeros(2), k, bound, epsilon)
    with pytest.raises(ValueError, match=message):
        private_noise_var(1.0, k, bound, epsilon)


def test_other_bad_privacy_input():
    with pytest.raises(ValueError, match="noise_var must be at least 0, got -1"):
        private_noise_var(-1.0, 2, 1.0, 1.0)
    with pytest.raises(ValueError, match="bag_sizes must hold a size with finite risk"):
        optimal_bag_size(0.25, 1.0, bound=1.0, rho=0.0, bag_sizes=[4])


# --- experiments -----------------------------------------------------------------------------


def test_simulation_agrees_with_theory():
    """Mean of 60 draws within 10 %; fails if noise is scaled by its variance."""
    rhos, noises = [0.1, 1.0], [0.25, 4.0]
    risk = simulate_risk(
        240, 60, 3, rhos=rhos, noise_vars=noises, signal=2.0, draws=60, generator=gen(4)
    )
    assert risk.shape == (60, 2, 2)
    for i, j in itertools.product(range(2), range(2)):
        theory = asymptotic_risk(0.25, 3, rhos[j], noises[i], 2.0).risk
        assert risk[:, i, j].mean().item() == pytest.approx(theory, rel=0.1)


def test_sorting_bags_along_the_signal_frees_the_instance_loss_from_bias():
    """Fails if rows are sorted after the responses were averaged."""
    settings = {"rhos": [1.0], "noise_vars": [0.01], "draws": 10}
    random, neutral, along = (
        simulate_risk(400, 20, 4, sort_cosine=c, generator=gen(5), **settings).mean()
        for c in (None, 0.0, 1.0)
    )
    assert neutral == pytest.approx(float(random), rel=0.2)
    assert along < random / 10


def test_private_simulation_agrees_with_theory():
    """Clipping aside (the bound is far out); fails if one noise serves all bag sizes."""
    n, d, bags = 600, 12, [1, 3]
    risk = simulate_private_risk(
        n, d, bags, epsilons=[2.0], bound=5.0, rho=0.5, draws=100, generator=gen(6)
    )
    assert risk.shape == (100, 2, 1)
    for j, k in enumerate(bags):
        theory = asymptotic_risk(d / n, k, 0.5, private_noise_var(1.0, k, 5.0, 2.0)).risk
        assert risk[:, j, 0].mean().item() == pytest.approx(theory, rel=0.12)


def test_clipping_shrinks_and_ridge_is_chosen():
    """A bound below the responses biases the fit; of two strengths the better one is taken."""
    lenient = {"epsilons": [1e9], "draws": 5, "noise_var": 0.0, "rho": 0.0}
    clipped = simulate_private_risk(200, 4, [1], bound=0.5, generator=gen(7), **lenient)
    assert clipped.min() > 0.05
    chosen = simulate_private_risk(
        200, 4, [1], bound=9.0, ridges=[10.0, 0.0], generator=gen(7), **lenient
    )
    assert chosen.max() < 1e-8


def test_simulations_refuse_bad_input():
    settings = {"rhos": [0.5], "noise_vars": [1.0], "draws": 2, "generator": gen()}
    for change, message in [
        ({"draws": 0}, "draws, n and dim must be at least 1"),
        ({"signal": 0.0}, "signal must be positive"),
        ({"noise_vars": [-1.0]}, "noise_vars must be at least 0"),
        ({"sort_cosine": 2.0}, r"sort_cosine must lie in \[-1, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            simulate_risk(8, 2, 2, **(settings | change))
    with pytest.raises(ValueError, match="noise_var must be at least 0"):
        simulate_private_risk(
            8, 2, [2], epsilons=[1.0], bound=1.0, noise_var=-1.0, draws=1, generator=gen()
        )


def splits(bag_size=4, num_train=24, count=3, seed=0, **kwargs):
    g = gen(seed)
    x = 3 * torch.randn(40, 2, generator=g, dtype=torch.float64) + 1
    y = x.sum(1) + torch.randn(40, generator=g, dtype=torch.float64)
    return x, bagged_splits(
        x, y, bag_size, num_train=num_train, splits=count, generator=g, **kwargs
    )


def test_splits_are_disjoint_standardized_and_bagged():
    """Every row appears once; fails if the test rows are standardized by themselves."""
    x, task = splits()
    assert task.x.shape == (3, 24, 2)
    assert task.x_test.shape == (3, 16, 2)
    for s in range(3):
        scaled = torch.cat([task.x[s], task.x_test[s]])
        slope = x[:, 0].std() / scaled[:, 0].std()
        order = scaled[:, 0].argsort()
        torch.testing.assert_close(
            scaled[order, 0] * slope - x[x[:, 0].argsort(), 0],
            torch.full(
                (40,), (scaled[order, 0] * slope - x[:, 0].sort().values)[0].item()
            ).double(),
        )
        assert task.x[s].mean(0).abs().max() < 1e-12
        assert (task.x[s].square().mean(0) - 1).abs().max() < 1e-12
        assert task.y[s].mean().abs() < 1e-12
        torch.testing.assert_close(task.bag_y[s], bag_means(task.y[s], 4))
    assert task.x_test.mean(1).abs().min() > 1e-6
    assert not torch.equal(task.x[0], task.x[1])


def test_sorted_splits_are_sorted_by_their_feature():
    _, task = splits(sort_by=1)
    assert (task.x[..., 1].diff(dim=1) >= 0).all()
    assert not (task.x[..., 0].diff(dim=1) >= 0).all()


def test_test_error_by_hand():
    task = BaggedSplits(
        x=torch.zeros(1, 2, 1),
        y=torch.zeros(1, 2),
        bag_y=torch.zeros(1, 1),
        x_test=torch.tensor([[[1.0], [2.0]]]),
        y_test=torch.tensor([[1.0, 0.0]]),
    )
    assert task.test_error(torch.tensor([[2.0]])).tolist() == [(1.0 + 16.0) / 2]


def test_splits_refuse_bad_input():
    x, y, g = torch.zeros(10, 2), torch.zeros(10), gen()
    with pytest.raises(ValueError, match=r"x \(n, d\) and y \(n,\), got \(10, 2\) and \(9,\)"):
        bagged_splits(x, y[:9], 2, num_train=4, splits=1, generator=g)
    for num_train, count in ((10, 1), (1, 1), (4, 0)):
        with pytest.raises(ValueError, match=r"num_train must lie in 2\.\.9"):
            bagged_splits(x, y, 2, num_train=num_train, splits=count, generator=g)
    with pytest.raises(ValueError, match="multiple of 3, got 4"):
        bagged_splits(x, y, 3, num_train=4, splits=1, generator=g)


def test_network_is_plain_adam_with_early_stopping():
    """One split, one rho, as a module with its own loop; fails if held-out bags are trained on."""
    _, task = splits(bag_size=2, count=2, seed=3)
    rho, steps = 0.3, 30
    run = train_network(
        task, 2, [0.0, rho], generator=gen(9), width=5, steps=steps, lr=0.05, check_every=5
    )
    g = gen(9)
    first = torch.randn(2, 1, 2, 5, generator=g)[1, 0] * 1.0
    second = torch.randn(2, 1, 5, 1, generator=g)[1, 0] * (1 / 5) ** 0.5
    net = MLP((2, 5, 1)).double()
    with torch.no_grad():
        net[1].weight.copy_(first.T)
        net[3].weight.copy_(second.T)
        net[1].bias.zero_()
        net[3].bias.zero_()
    x, bag_y = task.x[1], task.bag_y[1]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    checks = []
    for step in range(steps + 1):
        if step % 5 == 0:
            with torch.no_grad():
                val = bag_loss(net(x[20:]).squeeze(1), bag_y[10:], 2).item()
                test = (net(task.x_test[1]).squeeze(1) - task.y_test[1]).square().mean().item()
            checks.append((val, test, step))
        loss = interpolating_loss(net(x[:20]).squeeze(1), bag_y[:10], 2, rho)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    val, test, step = min(checks)
    assert run.val_error[1, 1].item() == pytest.approx(val, rel=1e-5)
    assert run.test_error[1, 1].item() == pytest.approx(test, rel=1e-5)
    assert run.step[1, 1].item() == step


@pytest.mark.parametrize(
    "change",
    [{"width": 7}, {"steps": 3}, {"lr": 0.03}, {"val_share": 0.5}, {"check_every": 7}],
)
def test_each_knob_of_the_network_matters(change):
    _, task = splits(bag_size=2)
    base = {"width": 5, "steps": 40, "lr": 0.02, "val_share": 0.2, "check_every": 4}
    one = train_network(task, 2, [0.0, 0.5], generator=gen(), **base)
    two = train_network(task, 2, [0.0, 0.5], generator=gen(), **(base | change))
    assert not torch.equal(one.val_error, two.val_error)
    assert not torch.equal(one.test_error[:, 0], one.test_error[:, 1])


def test_network_refuses_bad_input():
    _, task = splits(bag_size=2)
    for change in ({"width": 0}, {"steps": 0}, {"lr": 0.0}, {"val_share": 1.0}):
        with pytest.raises(ValueError, match="width, steps, check_every and lr must be positive"):
            train_network(task, 2, [0.5], generator=gen(), **change)
    with pytest.raises(ValueError, match=r"rho must lie in \[0, 1\], got 3"):
        train_network(task, 2, [3.0], generator=gen())
    _, one = splits(bag_size=24)
    with pytest.raises(ValueError, match="training needs at least two bags, got 1"):
        train_network(one, 24, [0.5], generator=gen())


# --- one small case a public name, for the contract sweep ------------------------------------


def _rows(g):
    return torch.randn(8, 3, generator=g), torch.randn(8, generator=g), torch.randn(4, generator=g)


def _task(x: Tensor, y: Tensor) -> BaggedSplits:
    return bagged_splits(x, y, 2, num_train=6, splits=2, generator=gen())


_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

CASES = {
    "bag_means": Case(inputs=_rows, call=lambda X, y, b: (bag_means(X, 2), bag_means(y, 2))),
    "bag_loss": Case(inputs=_rows, call=lambda X, y, b: bag_loss(y, b, 2), dtypes=_WIDE),
    "instance_loss": Case(inputs=_rows, call=lambda X, y, b: instance_loss(y, b, 2), dtypes=_WIDE),
    "interpolating_loss": Case(
        inputs=_rows, call=lambda X, y, b: interpolating_loss(y, b, 2, 0.3), dtypes=_WIDE
    ),
    "fit_interpolating": Case(inputs=_rows, call=lambda X, y, b: fit_interpolating(X, b, 2, 0.3)),
    "leave_one_bag_out": Case(inputs=_rows, call=lambda X, y, b: leave_one_bag_out(X, b, 2, 0.3)),
    "asymptotic_risk": Case(inputs=lambda g: (), call=lambda: asymptotic_risk(0.3, 2, 0.3, 1.0)),
    "privatize_bag_means": Case(
        inputs=_rows, call=lambda X, y, b: privatize_bag_means(b, 2, 1.0, 1.0, gen())
    ),
    "private_noise_var": Case(
        inputs=lambda g: (), call=lambda: private_noise_var(1.0, 2, 1.0, 1.0)
    ),
    "optimal_bag_size": Case(
        inputs=lambda g: (), call=lambda: optimal_bag_size(0.02, 1.0, bound=3.0)
    ),
    "simulate_risk": Case(
        inputs=lambda g: (torch.zeros(1),),
        call=lambda like: simulate_risk(
            12,
            3,
            2,
            rhos=[0.3],
            noise_vars=[1.0],
            draws=2,
            sort_cosine=0.5,
            generator=gen(),
            dtype=like.dtype,
            device=like.device,
        ),
    ),
    "simulate_private_risk": Case(
        inputs=lambda g: (torch.zeros(1),),
        call=lambda like: simulate_private_risk(
            12,
            3,
            [1, 2],
            epsilons=[1.0],
            bound=2.0,
            ridges=(0.0, 0.1),
            draws=2,
            generator=gen(),
            dtype=like.dtype,
            device=like.device,
        ),
    ),
    "bagged_splits": Case(inputs=_rows, call=lambda X, y, b: _task(X, y)),
    "train_network": Case(
        inputs=_rows,
        call=lambda X, y, b: train_network(_task(X, y), 2, [0.0, 0.5], generator=gen(), steps=5),
    ),
}


def test_cases_cover_the_module():
    """A guard for this file alone: the sweep itself checks all modules."""
    functions = {n for n in aggregate_responses.__all__ if n[0].islower()}
    assert set(CASES) == functions


def test_constant_features_are_only_centered():
    """Fails if they are divided by their standard deviation, zero."""
    x = torch.stack([torch.full((9,), 3.0), torch.arange(9.0)], 1)
    task = bagged_splits(x, torch.ones(9), 2, num_train=6, splits=2, generator=gen())
    assert task.x[..., 0].abs().max() == 0
    assert task.x[..., 1].std(1, correction=0) == pytest.approx([1.0, 1.0])
    assert task.y.abs().max() == task.bag_y.abs().max() == task.y_test.abs().max() == 0
