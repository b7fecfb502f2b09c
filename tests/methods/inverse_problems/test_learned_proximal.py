"""Learned proximal networks: loss, training, the regularizer, plug-and-play ADMM."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.methods.inverse_problems.learned_proximal import (
    LPN,
    ConvLPN,
    PnPResult,
    StackedLPN,
    Stage,
    absolute_loss,
    invert_prox,
    matching_stages,
    pnp_admm,
    prior_value,
    prox_defects,
    proximal_matching_loss,
    squared_loss,
    train_denoisers,
)
from wellposed.ops.restoration import tikhonov, tv_restore
from wellposed.ops.scalar_bayes import bayes_estimators
from wellposed.train import seeded

F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=F64)


def lpn(*args, seed=0, **kwargs):
    with seeded(seed):
        return LPN(*args, **kwargs).double()


def soft(y, t=1.0):
    return y.sign() * (y.abs() - t).clamp(min=0)


# --- losses ----------------------------------------------------------------------------------


def test_matching_loss_by_loops():
    """The norm is over the whole example; fails if each pixel has its own exponential."""
    f, x = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    values = []
    for a, b in zip(f, x, strict=True):
        squared = sum((float(u) - float(v)) ** 2 for u, v in zip(a.ravel(), b.ravel(), strict=True))
        values.append(1 - math.exp(-squared / 1.7**2))
    got = proximal_matching_loss(f, x, 1.7, reduction="none")
    torch.testing.assert_close(got, torch.tensor(values, dtype=F64))
    assert proximal_matching_loss(f, x, 1.7).item() == pytest.approx(np.mean(values))
    assert proximal_matching_loss(f, x, 1.0) > proximal_matching_loss(f, x, 2.0)


def test_limits_of_gamma():
    """Large: the squared distance over gamma squared, without cancellation. Small: misses."""
    f, x = normal(5, 3), normal(5, 3, seed=1)
    wide = proximal_matching_loss(f, x, 1e6, reduction="none") * 1e12
    torch.testing.assert_close(wide, (f - x).square().sum(1), atol=0, rtol=1e-9)
    f[2:] = x[2:]
    assert proximal_matching_loss(f, x, 1e-3).item() == pytest.approx(2 / 5)


def test_losses_by_hand_and_their_gradients():
    f, x = normal(3, 4), normal(3, 4, seed=1)
    torch.testing.assert_close(squared_loss(f, x), ((f - x) ** 2).mean())
    torch.testing.assert_close(absolute_loss(f, x), (f - x).abs().mean())
    torch.testing.assert_close(absolute_loss(f, x, "none"), (f - x).abs().mean(1))
    f.requires_grad_()
    for loss in (squared_loss, absolute_loss, lambda a, b: proximal_matching_loss(a, b, 0.9)):
        assert torch.autograd.gradcheck(lambda a, loss=loss: loss(a, x), (f,))


def test_losses_refuse_bad_input():
    x = torch.zeros(2, 3)
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma must be positive and finite"):
            proximal_matching_loss(x, x, gamma)
    for loss in (squared_loss, absolute_loss, lambda a, b, **k: proximal_matching_loss(a, b, 1.0)):
        with pytest.raises(ValueError, match=r"one shape \(b, ...\), got \(2, 3\) and \(2, 2\)"):
            loss(x, x[:, :2])
    with pytest.raises(ValueError, match='reduction must be "mean" or "none"'):
        squared_loss(x, x, reduction="sum")


def test_stages_share_out_all_steps():
    stages = matching_stages(103, gammas=[2.0, 1.0], rates=[0.1, 0.2], warmup_share=0.25)
    assert [s.steps for s in stages] == [26, 38, 39]
    assert [s.lr for s in stages] == [3e-3, 0.1, 0.2]
    assert stages[0].loss is absolute_loss
    f, x = normal(2, 3), normal(2, 3, seed=1)
    assert stages[2].loss(f, x) == proximal_matching_loss(f, x, 1.0)
    assert matching_stages(103, warmup_rate=1.0)[0].lr == 1.0
    for options, message in [
        ({"gammas": [1.0]}, "one for each rate"),
        ({"gammas": [0.0] * 5}, "gammas must be positive"),
        ({"warmup_share": 1.0}, r"warmup_share must lie in \(0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            matching_stages(100, **options)
    with pytest.raises(ValueError, match="each of 6 stages one, got 5"):
        matching_stages(5)


# --- training --------------------------------------------------------------------------------


def test_training_side_by_side_is_training_alone():
    """Adam and the clamp of one network, written out; fails if losses are averaged."""
    nets = [lpn(2, 3, 2, alpha=0.1, seed=s) for s in range(2)]
    stages = matching_stages(8, gammas=[2.0], rates=[0.05], warmup_rate=0.1)
    other = [replace(s, loss=squared_loss) for s in stages]
    x = normal(2, 6, 2)
    stack = StackedLPN(nets)
    history = train_denoisers(
        stack, [stages, other], lambda: x, sigma=0.3, generator=gen(5), factors=[1.0, 0.5]
    )
    g, optimizer = gen(5), torch.optim.Adam(nets[1].parameters(), lr=1.0)
    for step in range(8):
        noisy = x + 0.3 * torch.randn(x.shape, generator=g, dtype=F64)
        optimizer.param_groups[0]["lr"] = 0.5 * (0.1 if step < 3 else 0.05)
        loss = squared_loss(nets[1](noisy[1]), x[1])
        assert history[step, 1].item() == pytest.approx(loss.item(), rel=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            nets[1].out.clamp_(min=0)
            nets[1].core[0].clamp_(min=0)
    trained = stack.networks()[1]
    for name, p in nets[1].named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), p, atol=1e-9, rtol=1e-7)
    assert stack.core[0].min() == 0


def test_each_loss_goes_to_its_network():
    """Fails if the groups of networks with one loss are cut at the wrong places."""
    nets = [lpn(1, 2, 1, seed=s) for s in range(4)]
    x = normal(4, 5, 1)
    losses = [squared_loss, absolute_loss, absolute_loss, squared_loss]
    plans = [[Stage(1, 0.1, loss)] for loss in losses]
    history = train_denoisers(StackedLPN(nets), plans, lambda: x, sigma=1e-9, generator=gen())
    for k, loss in enumerate(losses):
        assert history[0, k].item() == pytest.approx(loss(nets[k](x[k]), x[k]).item(), rel=1e-6)


def test_training_learns_the_posterior_mean_and_the_mode():
    """A few hundred steps on Laplace data; fails if the noise is not added to the input."""
    with seeded(0):
        stack = StackedLPN([LPN(1, 16, 1, alpha=0.01) for _ in range(2)])
    stages = matching_stages(
        600, gammas=[0.5, 0.3], rates=[1e-3, 5e-4], warmup_rate=1e-2, warmup_share=0.5
    )
    g = gen()

    def sample():
        e = torch.empty(2, 2, 256, 1).exponential_(generator=g)
        return e[0] - e[1]

    plans = [[replace(s, loss=squared_loss) for s in stages], stages]
    train_denoisers(stack, plans, sample, sigma=1.0, generator=g)
    y = torch.linspace(-3, 3, 61)
    f = stack(y[:, None].expand(2, -1, 1)).squeeze(-1).detach()
    grid = torch.linspace(-10, 10, 2001)
    mean = bayes_estimators(y, grid, -grid.abs()).mean

    def off(a, b):
        return (a - b).square().mean().sqrt()

    assert off(f[0], mean) < 0.1
    assert off(f[1], soft(y)) < off(f[0], soft(y))
    assert off(f[0], mean) < off(f[1], mean)


def test_training_refuses_bad_plans():
    net, x = StackedLPN([LPN(1, 2, 1)] * 2), torch.zeros(2, 3, 1)
    one = [Stage(1, 0.1, squared_loss)]
    with pytest.raises(ValueError, match="sigma must be positive and finite, got 0"):
        train_denoisers(net, [one, one], lambda: x, sigma=0.0, generator=gen())
    for plans in ([], [one, [Stage(2, 0.1, squared_loss)]], [one, [Stage(1, 0.2, squared_loss)]]):
        with pytest.raises(ValueError, match="with the same steps and rates"):
            train_denoisers(net, plans, lambda: x, sigma=1.0, generator=gen())


# --- the regularizer -------------------------------------------------------------------------


def quadratic(matrix):
    return lambda y: ((y @ matrix) * y).sum(-1) / 2


def spd(d, seed=0, least=0.2):
    root = normal(d, d, seed=seed)
    return root @ root.mT / d + least * torch.eye(d, dtype=F64)


def test_regularizer_of_a_quadratic_in_closed_form():
    """f = M y is the prox of (1/2) x'(inv(M) - I) x; fails without the half of the square."""
    m, x = spd(5), normal(7, 5, seed=1)
    y = invert_prox(quadratic(m), x, tol=1e-9)
    torch.testing.assert_close(y, torch.linalg.solve(m, x.mT).mT, atol=1e-7, rtol=0)
    want = ((x @ (torch.linalg.inv(m) - torch.eye(5, dtype=F64))) * x).sum(1) / 2
    torch.testing.assert_close(prior_value(quadratic(m), x, tol=1e-9), want, atol=1e-7, rtol=0)
    torch.testing.assert_close(prior_value(quadratic(m), x, y=y), want, atol=1e-7, rtol=0)


def test_inverse_of_a_network_and_scipy():
    """Fails if the linear term of the objective has the wrong sign."""
    net, x = lpn(6, 8, 3, alpha=0.05), normal(9, 6, seed=2)
    y = invert_prox(net.potential, x)
    assert (net(y) - x).norm(dim=1).max() < 1e-5

    def objective(v):
        return (net.potential(torch.from_numpy(v)[None])[0] - x[0] @ torch.from_numpy(v)).item()

    peer = scipy.optimize.minimize(objective, x[0].numpy(), tol=1e-12)
    np.testing.assert_allclose(y[0].numpy(), peer.x, atol=1e-3)


def test_network_minimizes_its_own_objective():
    """The definition of the prox, by brute force in one dimension."""
    net = lpn(1, 12, 2, alpha=0.2)
    x = torch.linspace(-2, 2, 801, dtype=F64)[:, None]
    values = prior_value(net.potential, x, tol=1e-9)
    for y in (-1.0, 0.3, 2.0):
        f = net(torch.tensor([[y]], dtype=F64)).item()
        assert abs(f) < 2
        best = x[((x[:, 0] - y).square() / 2 + values).argmin(), 0].item()
        assert best == pytest.approx(f, abs=0.006)


def test_gradient_of_the_regularizer_is_the_displacement():
    """Where R is smooth, its gradient at f(y) is y - f(y)."""
    net, y = lpn(3, 6, 2, alpha=0.3), normal(4, 3)
    x, step = net(y).detach(), 1e-4
    for k in range(3):
        e = step * torch.eye(3, dtype=F64)[k]
        up, down = (prior_value(net.potential, x + s * e, tol=1e-10) for s in (1, -1))
        torch.testing.assert_close((up - down) / (2 * step), (y - x)[:, k], atol=1e-4, rtol=0)


def test_targets_out_of_range_are_reported():
    """A bounded gradient never reaches 5; fails if the residual is not looked at."""

    def bounded(y):
        return torch.log(torch.cosh(y)).sum(-1)

    with pytest.warns(UserWarning, match="1 of 2 rows have no preimage within 1e-06"):
        invert_prox(bounded, torch.tensor([[0.5], [5.0]], dtype=F64), max_iter=30)
    net, x = lpn(4, 6, 2, alpha=0.05), normal(3, 4)
    with pytest.warns(UserWarning, match="no preimage"):
        invert_prox(net.potential, x, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loose = invert_prox(net.potential, x, tol=1.0)
    assert (net(loose) - x).norm(dim=1).max() > (net(invert_prox(net.potential, x)) - x).norm(
        dim=1
    ).max()


def test_inversion_refuses_bad_input():
    bowl = quadratic(torch.eye(2, dtype=F64))
    with pytest.raises(ValueError, match="x must be finite, of shape"):
        invert_prox(bowl, torch.zeros(2, dtype=F64))
    with pytest.raises(ValueError, match="x must be finite"):
        invert_prox(bowl, torch.full((1, 2), math.nan, dtype=F64))
    for options in ({"tol": 0.0}, {"max_iter": 0}):
        with pytest.raises(ValueError, match="tol must be positive and max_iter at least 1"):
            prior_value(bowl, torch.zeros(1, 2, dtype=F64), **options)
    with pytest.raises(ValueError, match=r"y must have shape \(1, 2\), got \(2, 2\)"):
        prior_value(bowl, torch.zeros(1, 2), y=torch.zeros(2, 2))


# --- plug-and-play ---------------------------------------------------------------------------


def slow_admm(denoiser, a, b, rho, num_iters, z):
    """A linear solve for each image and iteration."""
    u = torch.zeros_like(z)
    moves = []
    for _ in range(num_iters):
        matrix = a.mT @ a + rho * torch.eye(a.shape[1], dtype=F64)
        rows = [
            torch.linalg.solve(matrix, a.mT @ m + rho * (p - q))
            for m, p, q in zip(b, z, u, strict=True)
        ]
        x = torch.stack(rows)
        u = u + x - z
        new = denoiser(x + u)
        moves.append((new - z).norm(dim=1))
        z = new
    return z, torch.stack(moves)


@pytest.mark.parametrize("given_init", [False, True])
def test_admm_step_by_step(given_init):
    """Fails if u is updated after z, or starts from zero instead of A'b."""
    a, b, net = normal(3, 5), normal(4, 3, seed=1), lpn(5, 6, 2, alpha=0.1)
    init = normal(4, 5, seed=2) if given_init else b @ a
    got = pnp_admm(net, a, b, rho=0.7, num_iters=6, init=init if given_init else None)
    z, moves = slow_admm(net, a, b, 0.7, 6, init)
    torch.testing.assert_close(got.x, z.detach())
    torch.testing.assert_close(got.residuals, moves.detach())
    assert not torch.allclose(got.x, pnp_admm(net, a, b, rho=0.9, num_iters=6).x)


def test_limit_is_tikhonov():
    """The prox of |x|^2 / 2 halves; the limit solves the penalized problem exactly."""
    a, b = normal(6, 4), normal(3, 6, seed=1)
    got = pnp_admm(lambda v: v / 2, a, b, rho=0.4, num_iters=400)
    torch.testing.assert_close(got.x, tikhonov(a, b, weight=0.4), atol=1e-9, rtol=0)
    assert got.converged(1e-9).all()


def test_limit_is_the_lasso():
    """Soft thresholding gives the lasso; scikit-learn has its solution."""
    from sklearn.linear_model import Lasso

    a, b = normal(20, 6), normal(2, 20, seed=1)
    got = pnp_admm(soft, a, b, rho=2.0, num_iters=3000).x
    for row, target in zip(got, b, strict=True):
        peer = Lasso(alpha=2.0 / 20, fit_intercept=False, tol=1e-12, max_iter=100_000)
        peer.fit(a.numpy(), target.numpy())
        np.testing.assert_allclose(row.numpy(), peer.coef_, atol=1e-8)


def test_limit_is_total_variation():
    """A total-variation denoiser plugged in gives total-variation deblurring."""
    b = normal(2, 12)
    a = torch.eye(12, dtype=F64) + 0.1 * normal(12, 12, seed=1)
    options = {"height": 3, "width": 4, "tol": 1e-6, "max_iter": 20_000}
    eye = torch.eye(12, dtype=F64)
    got = pnp_admm(
        lambda v: tv_restore(eye, v, weight=0.5, **options).x, a, b, rho=0.6, num_iters=40
    )
    want = tv_restore(a, b, weight=0.3, **options).x
    torch.testing.assert_close(got.x, want, atol=2e-4, rtol=0)


def test_networks_converge_where_the_theorem_says_so():
    """Random networks, alpha < 1 and rho > |A'A|: the change goes to zero, for each image."""
    for seed in range(5):
        net = lpn(8, 12, 2, alpha=0.1, seed=seed)
        a = normal(5, 8, seed=seed)
        a = a / torch.linalg.matrix_norm(a, 2)
        run = pnp_admm(net, a, normal(4, 5, seed=seed), rho=1.05, num_iters=2000)
        assert run.converged(1e-10).all()
        assert (run.residuals[1000] < run.residuals[2] / 100).all()


def test_an_expanding_denoiser_does_not_converge():
    run = pnp_admm(lambda v: -3 * v, torch.eye(2), torch.ones(1, 2), rho=9.0, num_iters=20)
    assert not run.converged().any()
    tolerant = PnPResult(run.x, torch.full((1, 1), 0.1))
    assert tolerant.converged(0.1).all()
    assert not tolerant.converged(0.05).any()


def test_admm_refuses_bad_input():
    eye, b = torch.eye(3), torch.zeros(2, 3)
    for operator, measurement, message in [
        (eye[0], b, r"operator must have shape \(m, d\), got \(3,\)"),
        (eye, b[:, :2], r"measurement must have shape \(b, 3\), got \(2, 2\)"),
        (eye, b[0], r"measurement must have shape \(b, 3\), got \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            pnp_admm(soft, operator, measurement, rho=1.0)
    for options in ({"rho": 0.0}, {"rho": math.nan}, {"rho": 1.0, "num_iters": 0}):
        with pytest.raises(ValueError, match="rho must be positive, num_iters at least 1"):
            pnp_admm(soft, eye, b, **options)
    with pytest.raises(ValueError, match=r"init must have shape \(2, 3\), got \(3,\)"):
        pnp_admm(soft, eye, b, rho=1.0, init=b[0])


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 6),
    d=st.integers(1, 6),
    rho=st.sampled_from([1e-6, 1e-2, 1.0, 1e6]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_any_finite_problem_gives_a_finite_image(m, d, rho, scale, seed):
    """Random operators, ranks and sizes; a nonexpansive denoiser never yields nan."""
    a, b = scale * normal(m, d, seed=seed), normal(3, m, seed=seed + 1)
    run = pnp_admm(soft, a, b, rho=rho, num_iters=20)
    assert run.x.shape == (3, d)
    assert run.x.isfinite().all()
    assert run.residuals.isfinite().all()


def test_a_huge_operator_has_an_answer():
    """Rounding eats the ridge: a Cholesky factorization alone fails."""
    operator = 1e20 * torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.1]], dtype=torch.float64)
    run = pnp_admm(soft, operator, operator[:, :2].T, rho=1.0, num_iters=3)
    assert run.x.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(1, 6),
    layers=st.integers(1, 3),
    alpha=st.floats(0.05, 2.0),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_every_strongly_convex_network_can_be_inverted(d, layers, alpha, scale, seed):
    """Nothing to warn about, and the way back is right, for targets of any size."""
    net, x = lpn(d, 5, layers, alpha=alpha, seed=seed), scale * normal(4, d, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = invert_prox(net.potential, x, tol=1e-6)
    assert (net(y) - x).norm(dim=1).max() < 1e-5 * (1 + scale)
    assert prior_value(net.potential, x, y=y).isfinite().all()


# --- one small case a public name, for the contract sweep ------------------------------------


def _two(g):
    return torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)


def _net(like, kind=LPN, *args, **kwargs):
    with seeded(0):
        return kind(*args, **kwargs).to(like)


def _trained(x):
    model = _net(x, lambda: StackedLPN([LPN(3, 4, 2)] * 2))
    stages = matching_stages(4, gammas=[1.0], rates=[0.1])
    losses = train_denoisers(
        model,
        [stages, stages],
        lambda: torch.stack([x, x]),
        sigma=0.1,
        generator=torch.Generator(x.device).manual_seed(0),
    )
    return losses[0, 0] * 0, losses.shape[0]  # the noise differs between devices


def _bowl(y):
    return y.square().sum(-1)


_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

CASES = {
    "LPN": Case(inputs=_two, call=lambda y, _: _net(y, LPN, 3, 4, 2, alpha=0.1)(y).detach()),
    "StackedLPN": Case(
        inputs=_two,
        call=lambda y, x: _net(y, lambda: StackedLPN([LPN(3, 4)] * 2))(
            torch.stack([y, x])
        ).detach(),
    ),
    "ConvLPN": Case(
        inputs=lambda g: (torch.randn(2, 16, generator=g),),
        call=lambda y: _net(y, ConvLPN, (1, 4, 4), 2, 3)(y).detach(),
    ),
    "proximal_matching_loss": Case(
        inputs=_two, call=lambda f, x: proximal_matching_loss(f, x, 1.0), dtypes=_WIDE
    ),
    "squared_loss": Case(inputs=_two, call=squared_loss, dtypes=_WIDE),
    "absolute_loss": Case(inputs=_two, call=absolute_loss, dtypes=_WIDE),
    "matching_stages": Case(
        inputs=lambda g: (),
        call=lambda: tuple(float(s.steps) * s.lr for s in matching_stages(50)),
    ),
    "train_denoisers": Case(inputs=_two, call=lambda x, _: _trained(x)),
    "invert_prox": Case(inputs=_two, call=lambda x, _: invert_prox(_bowl, x)),
    "prior_value": Case(inputs=_two, call=lambda x, _: prior_value(_bowl, x)),
    "prox_defects": Case(
        inputs=_two, call=lambda y, _: prox_defects(_net(y, LPN, 3, 4, 2, alpha=0.1), y)
    ),
    "pnp_admm": Case(
        inputs=lambda g: (torch.randn(2, 3, generator=g), torch.randn(4, 2, generator=g)),
        call=lambda a, b: pnp_admm(soft, a, b, rho=1.0, num_iters=5),
    ),
}
