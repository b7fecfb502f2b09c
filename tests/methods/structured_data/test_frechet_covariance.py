"""The measure by sorting, by kernel and by definition; its loss; networks trained on it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from contract import Case
from wellposed.methods.structured_data import frechet_covariance
from wellposed.methods.structured_data.frechet_covariance import (
    FCCovLoss,
    ball_kernel,
    distance_correlation,
    fit_sdr,
    frechet_cumulative_covariance,
    frechet_cumulative_covariance_direct,
    martingale_divergence,
    rank_distances,
    reduction_loss,
    spd_distances,
    sphere_distances,
    train_reductions,
    wasserstein_distances,
)
from wellposed.nets import MLP
from wellposed.train import seeded


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def distances_of(y):
    return torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist")


def problem(n=12, d=2, *, ties=False, seed=0):
    """Features and distances; with ties the responses are three labels or a coarse grid."""
    u, y = randn(n, d, seed=seed), randn(n, 2, seed=seed + 50)
    return u, distances_of(y.round() if ties else y)


def slow(u, rho):
    """The definition with a loop for each index: center, radius, example, coordinates."""
    n, d = u.shape
    mean = [sum(float(u[i, a]) for i in range(n)) / n for a in range(d)]
    total = [[0.0] * d for _ in range(d)]
    for k, j in itertools.product(range(n), repeat=2):
        inside = [i for i in range(n) if rho[i, k] <= rho[j, k]]
        s = [sum(float(u[i, a]) - mean[a] for i in inside) / n for a in range(d)]
        for a, b in itertools.product(range(d), repeat=2):
            total[a][b] += s[a] * s[b] / n**2
    return torch.tensor(total, dtype=torch.float64)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("d", [1, 3])
def test_three_forms_against_explicit_loops(ties, d):
    """Sorting, broadcasting and the kernel give the loops' matrix.

    Fails if the first of tied positions is taken (``right=False``), or with ``<`` for ``<=``.
    """
    u, rho = problem(d=d, ties=ties)
    expected = slow(u, rho)
    u_c = u - u.mean(0)
    for found in (
        frechet_cumulative_covariance(u, rho),
        frechet_cumulative_covariance_direct(u, rho),
        u_c.T @ ball_kernel(rho) @ u_c / len(u) ** 2,
        -0.5 * u_c.T @ rank_distances(rho) @ u_c / len(u) ** 2,
    ):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-15)


def test_kernel_against_counting():
    """The kernel counts balls that hold both responses; rank distances are the mean gap of ranks.

    Fails if the maximum is replaced by the minimum.
    """
    _, rho = problem(n=7, ties=True)
    n = len(rho)
    kernel, ranks = ball_kernel(rho), rank_distances(rho)
    share = [
        [sum(float(rho[j, k] >= rho[i, k]) for j in range(n)) / n for k in range(n)]
        for i in range(n)
    ]
    for i, h in itertools.product(range(n), repeat=2):
        both = sum(
            float(rho[j, k] >= max(rho[i, k], rho[h, k])) for j in range(n) for k in range(n)
        )
        assert kernel[i, h].item() == pytest.approx(both / n**2)
        gap = sum(abs(share[i][k] - share[h][k]) for k in range(n)) / n
        assert ranks[i, h].item() == pytest.approx(gap)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-12


def test_only_ranks_around_each_center_matter():
    """Increasing transforms of the metric change nothing, nor does the place of an outlier.

    Fails if distances enter in any other way, for instance as weights.
    """
    u, rho = problem(n=15)
    base = frechet_cumulative_covariance(u, rho)
    for other in (rho.square(), rho / (1 + rho), torch.exp(rho) - 1):
        torch.testing.assert_close(frechet_cumulative_covariance(u, other), base)
    y = randn(15, 1)
    far = [y.clone(), y.clone()]
    far[0][3], far[1][3] = 1e2, 1e9
    near, remote = (frechet_cumulative_covariance(u, distances_of(v)) for v in far)
    torch.testing.assert_close(near, remote)
    raw = [martingale_divergence(u, distances_of(v)) for v in far]
    assert raw[1] > 1e5 * raw[0]  # which the metric itself does not withstand


def test_order_scale_and_shift_of_examples():
    """Permutations and shifts change nothing; a linear map of features acts on both sides."""
    u, rho = problem(ties=True)
    base, p, a = (
        frechet_cumulative_covariance(u, rho),
        torch.randperm(12, generator=gen(1)),
        randn(2, 2),
    )
    torch.testing.assert_close(frechet_cumulative_covariance(u[p], rho[p][:, p]), base)
    torch.testing.assert_close(frechet_cumulative_covariance(u @ a + 3, rho), a.T @ base @ a)


def test_labels_have_a_closed_form():
    """Discrete metric: a ball of radius 0 is a class, every other ball is everything.

    With shares p_c and class means m_c the trace is sum_c p_c^2 p_c^2 |m_c - m|^2.
    """
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    u = randn(6, 2)
    rho = (labels[:, None] != labels[None, :]).double()
    expected = 0.0
    for c in range(3):
        share = (labels == c).double().mean()
        expected += share**4 * (u[labels == c].mean(0) - u.mean(0)).square().sum()
    torch.testing.assert_close(frechet_cumulative_covariance(u, rho).trace(), expected)


def test_estimate_converges_to_a_known_value():
    """Scalar uniform response, u = y: large samples agree with the integral computed on a grid.

    For y in [0, 1] a ball is an interval (l, r); cov(y, 1{y in it}) = (r - l)((l + r) / 2 - 1/2).
    """
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    center, rim = grid[:, None], grid[None, :]
    radius = (center - rim).abs()
    low, high = (center - radius).clamp_min(0), (center + radius).clamp_max(1)
    limit = ((high - low) * ((low + high) / 2 - 0.5)).square().mean()
    y = torch.rand(1500, 1, generator=gen(3), dtype=torch.float64)
    found = frechet_cumulative_covariance(y, distances_of(y)).trace()
    assert found.item() == pytest.approx(limit.item(), rel=0.05)


def test_gradients():
    """Of the matrix, the loss and the divergence, ties included."""
    u, rho = problem(n=6, ties=True)
    u.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: frechet_cumulative_covariance(v, rho), u)
    assert torch.autograd.gradcheck(lambda v: FCCovLoss(0.3)(v, rho), u)
    assert torch.autograd.gradcheck(lambda v: martingale_divergence(v, rho), u)


def test_loss_is_minus_trace_plus_penalty():
    """Both terms from their definitions; fails if either sign flips."""
    u, rho = problem(n=9)
    cov = torch.cov(u.T, correction=0)
    whitening = (cov - torch.eye(2)).square().sum()
    for penalty in (0.0, 0.5):
        expected = penalty * whitening - slow(u, rho).trace()
        torch.testing.assert_close(FCCovLoss(penalty)(u, rho), expected)


def test_losses_side_by_side_are_those_of_one():
    """The stacked loss on rank distances is the FCCov loss of every problem."""
    parts = [problem(n=9, seed=s) for s in range(3)]
    u, rho = (torch.stack(list(side)) for side in zip(*parts))
    penalties = torch.tensor([0.0, 0.1, 1.0]).double()
    found = reduction_loss(u, rank_distances(rho), penalties)
    for i, p in enumerate(penalties.tolist()):
        torch.testing.assert_close(found[i], FCCovLoss(p)(*parts[i]))


@pytest.mark.parametrize("d", [1, 2])
def test_gradient_of_the_training_is_that_of_the_loss(d):
    """The closed form against automatic differentiation; fails without its second centering."""
    parts = [problem(n=9, d=d, seed=s) for s in range(3)]
    u, rho = (torch.stack(list(side)) for side in zip(*parts))
    penalties, u = torch.tensor([0.0, 0.1, 1.0]).double(), (u + 3.0).requires_grad_()
    ranks = rank_distances(rho)
    (expected,) = torch.autograd.grad(reduction_loss(u, ranks, penalties).sum(), u)
    found = frechet_covariance._loss_gradient(u.detach(), ranks, penalties)
    torch.testing.assert_close(found, expected)


def test_divergence_against_loops():
    """Fails without the minus sign or the centering."""
    u, rho = problem(n=6)
    mean, total = u.mean(0), 0.0
    for i, j in itertools.product(range(6), repeat=2):
        total -= float((u[i] - mean) @ (u[j] - mean) * rho[i, j]) / 36
    assert martingale_divergence(u, rho).item() == pytest.approx(total)


def parabola(n=80):
    x = randn(n, 2).float()
    return x, distances_of(x[:, :1].square())


def test_fit_finds_a_parabola_and_repeats_itself():
    """A network learns x_1^2 from distances; in place; the seed decides the order of examples."""
    x, rho = parabola()

    def run(**options):
        torch.manual_seed(0)
        network = MLP((2, 16, 1))
        assert fit_sdr(network, x, rho, **{"num_epochs": 4, "batch_size": 20, **options}) is network
        return network(x).detach()

    fitted = run(num_epochs=150, batch_size=80, lr=2e-2, penalty=0.005)
    assert distance_correlation(fitted, x[:, :1].square()) > 0.9
    base = run()
    assert torch.equal(base, run())
    for change in (
        {"seed": 1},
        {"lr": 1e-2},
        {"penalty": 1.0},
        {"batch_size": 40},
        {"num_epochs": 5},
    ):
        assert not torch.equal(base, run(**change)), change
    assert torch.equal(run(batch_size=80), run(batch_size=500))  # one full batch


def test_side_by_side_with_local_balls_is_fit():
    """One network of a stack with balls inside the batch follows the plain loop.

    Fails if the batches differ, or if rank distances of the batch are not those of its balls.
    """
    x, rho = (part.double() for part in parabola())
    nets = train_reductions(
        x[None], rho[None], seeds=[7], penalty=0.05, hidden=(8,), num_epochs=3, batch_size=20,
        local_balls=True,
    )  # fmt: skip
    with seeded(7):
        alone = MLP((2, 8, 1)).double()
    fit_sdr(alone, x, rho, num_epochs=3, batch_size=20, penalty=0.05, seed=7)
    torch.testing.assert_close(nets(x[None])[0], alone(x))


def test_stacked_options_change_the_result():
    """Each option of the stacked training matters, and each network has its own penalty."""
    x, rho = parabola(40)
    x, rho = x.expand(2, -1, -1), rank_distances(rho).expand(2, -1, -1)
    plain = {"seeds": [0, 0], "penalty": 0.03, "num_epochs": 3, "batch_size": 20, "hidden": (8,)}

    def run(**options):
        return train_reductions(x, rho, **(plain | options))(x).detach()

    base = run()
    assert torch.equal(base[0], base[1])
    for change in (
        {"seeds": [1, 0]}, {"penalty": [0.3, 0.03]}, {"num_epochs": 4}, {"batch_size": 10},
        {"hidden": (4,)}, {"lr": 1e-2}, {"local_balls": True},
    ):  # fmt: skip
        assert not torch.equal(base[0], run(**change)[0]), change
    assert run(num_features=2).shape == (2, 40, 2)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 3),
    levels=st.integers(1, 4),
    scale=st.sampled_from([1e-9, 1.0, 1e9]),
    seed=st.integers(0, 99),
)
def test_any_sample_gives_the_same_three_numbers(n, d, levels, scale, seed):
    """Sorting, definition and kernel agree for any ties and scales, and the matrix is PSD."""
    u = randn(n, d, seed=seed)
    rho = scale * distances_of((levels * randn(n, 1, seed=seed + 1)).round())
    fast = frechet_cumulative_covariance(u, rho)
    torch.testing.assert_close(fast, frechet_cumulative_covariance_direct(u, rho))
    half = 0.5 * martingale_divergence(u, rank_distances(rho))
    torch.testing.assert_close(fast.trace(), half, atol=1e-12, rtol=1e-9)
    assert torch.linalg.eigvalsh(fast).min() >= -1e-12


def test_errors_name_the_argument():
    """Bad shapes and numbers out of range."""
    u, rho = problem(n=6)
    x, net = u.float(), nn.Linear(2, 1)
    pair = (x[None], rho.float()[None])
    for bad, name in [
        (lambda: frechet_cumulative_covariance(u, rho[:5]), "distances must have shape"),
        (lambda: frechet_cumulative_covariance(u[None], rho), "must be matrices"),
        (lambda: frechet_cumulative_covariance(u.long(), rho), "features must be floating"),
        (lambda: frechet_cumulative_covariance_direct(u[:4], rho), "distances must have shape"),
        (lambda: rank_distances(rho[0]), "distances must have shape"),
        (lambda: ball_kernel(rho[:2]), "distances must have shape"),
        (lambda: martingale_divergence(u[0], rho), "features must be"),
        (lambda: FCCovLoss(-1.0), "penalty must be"),
        (lambda: FCCovLoss(math.nan), "penalty must be"),
        (lambda: fit_sdr(net, x, rho[:5, :5]), "distances must have shape"),
        (lambda: fit_sdr(net, x, rho[None]), "distances must be a matrix"),
        (lambda: fit_sdr(net, x, rho, penalty=-1.0), "penalty must be"),
        (lambda: fit_sdr(net, x, rho, batch_size=1), "batch_size must be"),
        (lambda: fit_sdr(net, x, rho, num_epochs=0), "num_epochs must be"),
        (lambda: reduction_loss(u, rho, torch.ones(1)), "features must have shape"),
        (lambda: train_reductions(x, rho, seeds=[0], penalty=0.1), "x must have shape"),
        (lambda: train_reductions(*pair, seeds=[0, 1], penalty=0.1), "seeds"),
        (lambda: train_reductions(pair[0], rho, seeds=[0], penalty=0.1), "distances must have"),
        (lambda: train_reductions(*pair, seeds=[0], penalty=[0.1, 0.2]), "penalty must be"),
        (lambda: train_reductions(*pair, seeds=[0], penalty=0.1, num_epochs=0), "num_epochs"),
        (lambda: train_reductions(*pair, seeds=[0], penalty=0.1, batch_size=1), "batch_size"),
    ]:
        with pytest.raises(ValueError, match=name):
            bad()


def _pair(g):
    return torch.randn(8, 2, generator=g), distances_of(torch.randn(8, 1, generator=g))


def _fitted(x, rho):
    torch.manual_seed(0)
    network = nn.Linear(2, 1).to(x.device, x.dtype)
    return fit_sdr(network, x, rho, num_epochs=2, batch_size=4)(x).detach()


def _trained(x, rho):
    nets = train_reductions(
        x[None], rho[None], seeds=[0], penalty=0.1, num_epochs=2, batch_size=4, hidden=(4,)
    )
    return nets(x[None]).detach()


def _spd_case(g):
    a = torch.randn(4, 3, 3, generator=g)
    return (a @ a.mT + torch.eye(3),)


CASES = {
    "FCCovLoss": Case(inputs=_pair, call=lambda u, rho: FCCovLoss()(u, rho)),
    "ball_kernel": Case(inputs=_pair, call=lambda u, rho: ball_kernel(rho)),
    "distance_correlation": Case(inputs=_pair, call=lambda u, rho: distance_correlation(u, rho)),
    "fit_sdr": Case(inputs=_pair, call=_fitted),
    "frechet_cumulative_covariance": Case(inputs=_pair, call=frechet_cumulative_covariance),
    "frechet_cumulative_covariance_direct": Case(
        inputs=_pair, call=frechet_covariance.frechet_cumulative_covariance_direct
    ),
    "martingale_divergence": Case(inputs=_pair, call=martingale_divergence),
    "rank_distances": Case(inputs=_pair, call=lambda u, rho: rank_distances(rho)),
    "reduction_loss": Case(
        inputs=_pair,
        call=lambda u, rho: reduction_loss(u[None], rank_distances(rho)[None], u.new_ones(1)),
    ),
    "spd_distances": Case(inputs=_spd_case, call=spd_distances),
    "sphere_distances": Case(
        inputs=lambda g: (nn.functional.normalize(torch.randn(5, 3, generator=g)),),
        call=sphere_distances,
    ),
    "train_reductions": Case(inputs=_pair, call=_trained),
    "wasserstein_distances": Case(
        inputs=lambda g: (torch.randn(5, 7, generator=g),), call=wasserstein_distances
    ),
}
