"""Tests of wellposed.methods.training_dynamics.dynamical_stability."""

import itertools
import math

import pytest
import torch
from torch import nn

from contract import Case
from wellposed.methods.training_dynamics.dynamical_stability import (
    DiagonalLinearNet,
    TwoLayerReLU,
    critical_learning_rate,
    path_norm,
    per_sample_jacobian,
    second_moment_step,
    sharpness,
    train_runs,
    train_to_interpolation,
)
from wellposed.ops.hessian import hessian_vector_product

F64 = torch.float64
RATES = [1, 2, 3, 7, None]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _seeded_jacobian(g):
    return (torch.randn(5, 4, generator=g),)


def _net(kind, dtype=F64, seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DiagonalLinearNet(4) if kind is DiagonalLinearNet else TwoLayerReLU(4, 6)
    return net.to(dtype)


def _trained(kind, x, y):
    net = _net(kind, x.dtype).to(x.device)
    done = train_to_interpolation(net, x, y, lr=0.02, steps=50, generator=_generator(1))
    return done.loss, *(p.detach() for p in net.parameters())


def _output(kind, x):
    net = _net(kind, x.dtype).to(x.device)
    return net(x), per_sample_jacobian(net, x)


def _runs(a, b, x, lr):
    runs = train_runs(
        DiagonalLinearNet, (a, b), x, x[..., 0], lr=lr.abs() / 100, steps=20, generator=_generator()
    )
    return runs.parameters, runs.loss, runs.curve


CASES = {
    "sharpness": Case(inputs=_seeded_jacobian, call=sharpness),
    "critical_learning_rate": Case(
        inputs=_seeded_jacobian, call=lambda j: (critical_learning_rate(j, 2),)
    ),
    "second_moment_step": Case(
        inputs=lambda g: (torch.eye(4), *_seeded_jacobian(g)),
        call=lambda moment, j: second_moment_step(moment, j, 0.1, 3),
    ),
    "per_sample_jacobian": Case(
        inputs=lambda g: (torch.randn(5, 4, generator=g),),
        call=lambda x: per_sample_jacobian(_net(TwoLayerReLU, x.dtype).to(x.device), x),
    ),
    "path_norm": Case(
        inputs=lambda g: (torch.randn(3, generator=g), torch.randn(3, 2, generator=g)),
        call=path_norm,
    ),
    "DiagonalLinearNet": Case(
        inputs=lambda g: (torch.randn(5, 4, generator=g),),
        call=lambda x: _output(DiagonalLinearNet, x),
    ),
    "TwoLayerReLU": Case(
        inputs=lambda g: (torch.randn(5, 4, generator=g),),
        call=lambda x: _output(TwoLayerReLU, x),
    ),
    "train_to_interpolation": Case(
        inputs=lambda g: (torch.randn(5, 4, generator=g), torch.randn(5, generator=g)),
        call=lambda x, y: _trained(TwoLayerReLU, x, y),
    ),
    "train_runs": Case(
        inputs=lambda g: tuple(
            torch.randn(*shape, generator=g) for shape in ((2, 3, 4), (2, 3, 4), (2, 5, 4), (3,))
        ),
        call=_runs,
        nan_means="the run diverged",
    ),
}


def _jacobian(n=5, p=4, seed=0):
    return torch.randn(n, p, generator=_generator(seed), dtype=F64)


def _step_by_enumeration(moment, jacobian, lr, batch_size):
    """The mean over all n^B equally likely batches, one by one."""
    n, p = jacobian.shape
    total = torch.zeros(p, p, dtype=F64)
    for code in range(n**batch_size):
        h = torch.zeros(p, p, dtype=F64)
        for k in range(batch_size):
            g = jacobian[code // n**k % n]
            h += torch.outer(g, g) / batch_size
        t = torch.eye(p, dtype=F64) - lr * h
        total += t @ moment @ t
    return total / n**batch_size


def _dense_map(jacobian, lr, batch_size):
    """The map of `second_moment_step` as a p^2 x p^2 matrix."""
    p = jacobian.shape[1]
    basis = torch.eye(p * p, dtype=F64).view(p * p, p, p)
    return torch.stack(
        [second_moment_step(e, jacobian, lr, batch_size).flatten() for e in basis], 1
    )


# --- the second moment ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_second_moment_is_the_mean_over_all_batches(batch_size):
    """Fails if the noise term has the wrong sign or is not divided by the batch size."""
    jacobian, root = _jacobian(n=3), _jacobian(4, 4, seed=1)
    moment = root @ root.T
    expected = _step_by_enumeration(moment, jacobian, 0.3, batch_size)
    torch.testing.assert_close(second_moment_step(moment, jacobian, 0.3, batch_size), expected)


def test_full_batch_is_the_limit_of_large_batches():
    jacobian, moment = _jacobian(), torch.eye(4, dtype=F64)
    full = second_moment_step(moment, jacobian, 0.3, None)
    large = second_moment_step(moment, jacobian, 0.3, 10**9)
    torch.testing.assert_close(large, full, rtol=1e-7, atol=1e-7)
    shrink = torch.eye(4, dtype=F64) - 0.3 * jacobian.T @ jacobian / 5
    torch.testing.assert_close(full, shrink @ shrink)


def test_second_moment_is_what_simulated_sgd_has():
    """Twenty steps of linearized SGD, 20,000 copies."""
    g, jacobian, lr = _generator(2), _jacobian() / 2, 0.5
    start = torch.randn(4, generator=g, dtype=F64)
    delta, moment = start.repeat(20000, 1), torch.outer(start, start)
    for _ in range(20):
        rows = jacobian[torch.randint(5, (20000,), generator=g)]
        delta = delta - lr * (delta * rows).sum(1, keepdim=True) * rows
        moment = second_moment_step(moment, jacobian, lr)
    torch.testing.assert_close(delta.T @ delta / 20000, moment, rtol=0.05, atol=0.01)


# --- the critical rate ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", RATES)
@pytest.mark.parametrize(("n", "p"), [(5, 4), (3, 5), (6, 2)])
def test_critical_rate_is_where_the_dense_map_turns_unstable(n, p, batch_size):
    """Just below, the spectral radius is at most 1; just above, it is not."""
    jacobian = _jacobian(n, p)
    critical = critical_learning_rate(jacobian, batch_size).item()
    for factor, stable in ((1 - 1e-4, True), (1 + 1e-4, False)):
        radius = (
            torch.linalg.eigvals(_dense_map(jacobian, factor * critical, batch_size)).abs().max()
        )
        assert (radius.item() <= 1 + 1e-12) == stable


def test_critical_rate_of_single_examples_by_the_n_by_n_formula():
    """kappa is the largest eigenvalue of P_ij, a sum over pairs of eigendirections of G."""
    jacobian = _jacobian(6, 4)
    values, vectors = torch.linalg.eigh(jacobian.T @ jacobian / 6)
    u = jacobian @ vectors
    p = torch.zeros(6, 6, dtype=F64)
    for i in range(6):
        for j in range(6):
            for a in range(4):
                for b in range(4):
                    term = u[i, a] * u[j, a] * u[i, b] * u[j, b]
                    p[i, j] += term / (6 * (values[a] + values[b]))
    expected = 1 / torch.linalg.eigvalsh(p)[-1]
    torch.testing.assert_close(critical_learning_rate(jacobian), expected, rtol=1e-8, atol=0)


def test_sandwich_of_the_critical_rate():
    """2 / max |g|^2 <= critical rate <= 2 / trace, for many Jacobians."""
    for seed in range(20):
        jacobian = _jacobian(5, 8, seed)
        critical = critical_learning_rate(jacobian)
        assert 2 / jacobian.square().sum(1).max() <= critical * (1 + 1e-9)
        assert critical <= 2 / sharpness(jacobian).trace * (1 + 1e-9)


def test_equal_lengths_close_the_sandwich():
    jacobian = nn.functional.normalize(_jacobian(5, 8), dim=1) * 3
    critical = critical_learning_rate(jacobian)
    torch.testing.assert_close(critical, 2 / sharpness(jacobian).trace)
    torch.testing.assert_close(critical.item(), 2 / 9)


def test_rate_grows_with_the_batch_up_to_that_of_gradient_descent():
    """Changing the batch size changes the rate; fails if 1/B is lost."""
    jacobian = _jacobian()
    rates = [critical_learning_rate(jacobian, b).item() for b in (1, 2, 8, 64, None)]
    assert all(small < large for small, large in itertools.pairwise(rates))
    assert critical_learning_rate(jacobian, 10**7).item() == pytest.approx(rates[-1], rel=1e-5)
    assert rates[-1] == pytest.approx((2 / sharpness(jacobian).spectral).item())


def test_no_gradient_no_limit():
    assert critical_learning_rate(torch.zeros(2, 3)).item() == math.inf


# --- sharpness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p"), [(4, 7), (7, 4)])
def test_sharpness_from_the_eigenvalues_of_g(n, p):
    """Whichever of the two Gram matrices is formed."""
    jacobian = _jacobian(n, p)
    values = torch.linalg.eigvalsh(sum(torch.outer(g, g) for g in jacobian) / n)
    found = sharpness(jacobian)
    torch.testing.assert_close(found.trace, values.sum())
    torch.testing.assert_close(found.frobenius, values.square().sum().sqrt())
    torch.testing.assert_close(found.spectral, values[-1])


@pytest.mark.parametrize("kind", [DiagonalLinearNet, TwoLayerReLU])
def test_g_is_the_hessian_where_residuals_vanish(kind):
    """Fails without the factor 1/2 in the loss."""
    net, x = _net(kind), _jacobian(9, 4, seed=5)
    y = net(x).detach()
    jacobian = per_sample_jacobian(net, x)
    v = _jacobian(1, jacobian.shape[1], seed=6)[0]
    found = hessian_vector_product(lambda: (net(x) - y).square().mean() / 2, net, v)
    torch.testing.assert_close(found, jacobian.T @ (jacobian @ v) / 9)


def test_trace_of_the_diagonal_net_bounds_the_l1_norm():
    """Tr G = sum_j v_j (a_j^2 + b_j^2) >= 2 v |beta|_1, with equality where |a| = |b|."""
    net, x = _net(DiagonalLinearNet), _jacobian(9, 4, seed=5)
    x = x / x.square().mean(0).sqrt()  # v = 1
    a, b = net.a.detach(), net.b.detach()
    trace = sharpness(per_sample_jacobian(net, x)).trace
    torch.testing.assert_close(trace, (a**2 + b**2).sum())
    assert trace > 2 * (a * b).abs().sum()
    with torch.no_grad():
        net.b.copy_(net.a.flip(0).abs().flip(0))
    balanced = sharpness(per_sample_jacobian(net, x)).trace
    torch.testing.assert_close(balanced, 2 * (net.a * net.b).abs().sum().detach())


def test_trace_of_the_relu_net_bounds_the_path_norm():
    """Tr G = (sum |w|^2 + d a^2) / 2 on average over the sphere, at least sqrt(d) path norm."""
    net = _net(TwoLayerReLU)
    x = nn.functional.normalize(_jacobian(200000, 4, seed=5), dim=1) * 2
    w, a = net.weight.detach(), net.output_weight.detach()
    hidden = x @ w.T
    first = hidden.relu().square().sum(1)  # the gradient by a
    second = 4 * ((hidden > 0) * a**2).sum(1)  # by w
    mean = (first + second).mean()
    torch.testing.assert_close(
        mean, (w.square().sum() + 4 * a.square().sum()) / 2, rtol=1e-2, atol=0
    )
    assert mean >= 2 * path_norm(a, w)


def test_path_norm_by_loops_and_invariance():
    """Scaling w by c and a by 1/c changes neither the function nor the path norm."""
    a, w = _jacobian(3, 1)[:, 0], _jacobian(3, 2, seed=1)
    expected = sum(abs(a[j]) * math.hypot(*w[j].tolist()) for j in range(3))
    torch.testing.assert_close(path_norm(a, w), expected)
    c = torch.tensor([0.5, 2.0, 10.0], dtype=F64)
    torch.testing.assert_close(path_norm(a / c, w * c[:, None]), expected)
    stacked = path_norm(torch.stack([a, 2 * a]), torch.stack([w, w]))
    torch.testing.assert_close(stacked, torch.stack([expected, 2 * expected]))


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DiagonalLinearNet, TwoLayerReLU])
@pytest.mark.parametrize("n", [1, 5])
def test_hand_written_gradients_are_those_of_autograd(kind, n):
    """For every run of every data set; fails if a factor 1/n or relu' is lost."""
    nets = [[_net(kind, seed=10 * i + j) for j in range(3)] for i in range(2)]
    stacked = tuple(
        torch.stack(
            [torch.stack([list(net.parameters())[p].detach() for net in row]) for row in nets]
        )
        for p in range(2)
    )
    x, y = _jacobian(2 * n, 4).view(2, n, 4), _jacobian(2, n, seed=1)
    residual, found = kind.gradients(stacked, x, y)
    for i in range(2):
        for j in range(3):
            net = nets[i][j]
            off = net(x[i]) - y[i]
            torch.testing.assert_close(residual[i, j], off.detach())
            expected = torch.autograd.grad(off.square().mean() / 2, list(net.parameters()))
            for p in range(2):
                torch.testing.assert_close(found[p][i, j], expected[p])


def test_networks_start_as_the_paper_says():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        relu, diagonal = TwoLayerReLU(100, 400), DiagonalLinearNet(4000, scale=3.0)
    assert relu.weight.var().item() == pytest.approx(0.1, rel=0.05)  # 1 / sqrt(100)
    assert relu.output_weight.var().item() == pytest.approx(1.0, rel=0.2)
    assert path_norm(relu.output_weight, relu.weight).item() / 400 > 1  # of the order of the width
    assert diagonal.a.std().item() == pytest.approx(3.0, rel=0.1)
    assert diagonal.b.std().item() == pytest.approx(3.0, rel=0.1)


# --- training -------------------------------------------------------------------------------------


def _problem(n=4, d=10, s=1, seed=0):
    x = torch.randn(s, n, d, generator=_generator(seed), dtype=F64)
    return x, x[..., :2].sum(-1)


def _start(kind, s=1, k=1, d=10, width=6, seed=5):
    g = _generator(seed)
    shapes = [(d,), (d,)] if kind is DiagonalLinearNet else [(width, d), (width,)]
    return tuple(torch.randn(s, k, *shape, generator=g, dtype=F64) for shape in shapes)


@pytest.mark.parametrize("kind", [DiagonalLinearNet, TwoLayerReLU])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_both_trainers_walk_the_same_way(kind, batch_size):
    """Autograd against hand-written gradients, over 1500 steps of the same batches."""
    x, y = _problem()
    start = _start(kind)
    net = DiagonalLinearNet(10) if kind is DiagonalLinearNet else TwoLayerReLU(10, 6)
    net = net.to(F64)
    for parameter, value in zip(net.parameters(), start):
        parameter.data.copy_(value[0, 0])
    options = {"steps": 1500, "batch_size": batch_size, "max_grad_norm": 5.0, "tolerance": 1e-14}
    done = train_to_interpolation(net, x[0], y[0], lr=0.002, generator=_generator(7), **options)
    lr = torch.tensor([0.002], dtype=F64)
    runs = train_runs(kind, start, x, y, lr=lr, generator=_generator(7), **options)
    for parameter, value in zip(net.parameters(), runs.parameters):
        torch.testing.assert_close(parameter.detach(), value[0, 0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(done.loss, runs.loss[0, 0], rtol=1e-6, atol=1e-20)
    assert done.steps == runs.steps[-1] == 1500


def test_runs_do_not_touch_each_other():
    """A run beside others, one of which diverges, ends where it ends alone (full batch)."""
    x, y = _problem(s=2)
    start = _start(DiagonalLinearNet, s=2, k=3)
    lr = torch.tensor([0.01, 50.0, 0.02], dtype=F64)
    options = {"steps": 300, "batch_size": None, "max_grad_norm": math.inf}
    together = train_runs(DiagonalLinearNet, start, x, y, lr=lr, **options)
    for i in range(2):
        for j in (0, 2):
            own = tuple(p[i : i + 1, j : j + 1] for p in start)
            alone = train_runs(
                DiagonalLinearNet, own, x[i : i + 1], y[i : i + 1], lr=lr[j : j + 1], **options
            )
            torch.testing.assert_close(together.parameters[0][i, j], alone.parameters[0][0, 0])
    assert not together.converged[:, 1].any()
    assert not together.loss[:, 1].isfinite().any()


def test_batches_stay_inside_their_data_set():
    """Run 1 learns the second data set; fails if the offset into the stacked data is lost."""
    x, y = _problem(s=2)
    runs = train_runs(
        DiagonalLinearNet, _start(DiagonalLinearNet, s=2), x, y * torch.tensor([[1.0], [-3.0]]),
        lr=torch.tensor([0.03], dtype=F64), steps=8000, generator=_generator(),
    )  # fmt: skip
    assert runs.converged.all()
    beta = runs.parameters[0] * runs.parameters[1]
    torch.testing.assert_close(x[1] @ beta[1, 0], -3 * y[1], rtol=1e-3, atol=1e-3)


def test_training_ends_early_and_says_so():
    x, y = _problem()
    lr = torch.tensor([0.03], dtype=F64)
    runs = train_runs(DiagonalLinearNet, _start(DiagonalLinearNet), x, y, lr=lr, steps=50000,
                      record_every=100, generator=_generator())  # fmt: skip
    assert runs.converged.all()
    assert runs.steps[-1] < 20000
    assert len(runs.steps) == len(runs.curve)
    residual = x[0] @ (runs.parameters[0] * runs.parameters[1])[0, 0] - y[0]
    torch.testing.assert_close(runs.loss[0, 0], residual.square().mean() / 2)
    assert residual.abs().max() <= 1e-4
    short = train_runs(
        DiagonalLinearNet, _start(DiagonalLinearNet), x, y, lr=lr, steps=5, generator=_generator()
    )
    assert (bool(short.converged), short.steps) == (False, [0, 5])
    assert short.loss < short.curve[0]


def test_stable_minima_stay_and_unstable_ones_are_left():
    """SGD from a minimum: at 0.8 critical rates it returns, at 1.25 it leaves."""
    x, y = _problem(n=10, d=40)
    flow = train_runs(DiagonalLinearNet, _start(DiagonalLinearNet, d=40), x, y, batch_size=None,
                      lr=torch.tensor([0.005], dtype=F64), steps=20000, tolerance=1e-9)  # fmt: skip
    a, b = (p[0, 0] for p in flow.parameters)
    critical = critical_learning_rate(torch.cat([x[0] * b, x[0] * a], 1))
    g = _generator(3)
    start = tuple(p.repeat(1, 60, 1) for p in flow.parameters)
    start = tuple(p + 1e-4 * torch.randn(p.shape, generator=g, dtype=F64) for p in start)
    lr = critical * torch.tensor([0.8, 1.25], dtype=F64).repeat_interleave(30)
    runs = train_runs(DiagonalLinearNet, start, x, y, lr=lr, steps=1000, record_every=20,
                      tolerance=1e-12, generator=g)  # fmt: skip
    curve = runs.curve[:, 0].unflatten(1, (2, 30)).median(-1).values
    assert curve[-1, 0] < 0.01 * curve[0, 0]
    assert curve[:, 1].max() > 100 * curve[0, 1]


@pytest.mark.parametrize("change", [{"lr": 0.02}, {"batch_size": 2}, {"max_grad_norm": 0.5}])
def test_every_knob_of_training_matters(change):
    x, y = _problem()
    options = {"lr": 0.01, "batch_size": 1, "max_grad_norm": 100.0, "steps": 30} | change
    base = {"lr": 0.01, "batch_size": 1, "max_grad_norm": 100.0, "steps": 30}
    ends = []
    for option in (base, options):
        option = option | {"lr": torch.tensor([option["lr"]], dtype=F64)}
        runs = train_runs(
            DiagonalLinearNet, _start(DiagonalLinearNet), x, y, generator=_generator(), **option
        )
        ends.append(runs.parameters[0])
    assert not torch.allclose(*ends)


def test_clipping_limits_the_step():
    x, y = _problem()
    start = _start(DiagonalLinearNet)
    runs = train_runs(DiagonalLinearNet, start, x, 1e6 * y, lr=torch.tensor([0.1]), steps=1,
                      max_grad_norm=2.0, generator=_generator())  # fmt: skip
    moved = torch.cat([(new - old).flatten() for new, old in zip(runs.parameters, start)])
    assert moved.norm().item() == pytest.approx(0.2)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_jacobians():
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 2, 2)):
        for function in (sharpness, critical_learning_rate):
            with pytest.raises(ValueError, match="jacobian must have shape"):
                function(bad)
    with pytest.raises(ValueError, match="jacobian must be finite"):
        sharpness(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        critical_learning_rate(torch.eye(2), 0)
    with pytest.raises(ValueError, match="lr must be positive, got -1"):
        second_moment_step(torch.eye(2), torch.eye(2), -1.0)
    with pytest.raises(ValueError, match=r"moment must have shape \(2, 2\), got \(3, 3\)"):
        second_moment_step(torch.eye(3), torch.eye(2), 0.1)
    with pytest.raises(ValueError, match="batch_size must be positive, got -2"):
        second_moment_step(torch.eye(2), torch.eye(2), 0.1, -2)


def test_bad_networks_and_training():
    with pytest.raises(ValueError, match="in_features must be positive, got 0"):
        DiagonalLinearNet(0)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        DiagonalLinearNet(2, scale=0.0)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        TwoLayerReLU(2, 0)
    with pytest.raises(ValueError, match="output_weights"):
        path_norm(torch.ones(2), torch.ones(3, 2))
    net, x = DiagonalLinearNet(2), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"targets must have shape \(3,\), got \(2,\)"):
        train_to_interpolation(net, x, torch.ones(2), lr=0.1, steps=1)
    for name in ("lr", "steps", "batch_size", "max_grad_norm", "tolerance"):
        options = {"lr": 0.1, "steps": 1} | {name: 0}
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            train_to_interpolation(net, x, torch.ones(3), **options)


def test_bad_runs():
    x, y = _problem()
    start, lr = _start(DiagonalLinearNet), torch.tensor([0.1])
    good = {"lr": lr, "steps": 1}
    for parameters, inputs, targets, rate in (
        (start, x[0], y, lr),
        (start, x, y[0], lr),
        (start, x[..., :3], y, lr),
        (start, x.repeat(2, 1, 1), y.repeat(2, 1), lr),
        ((start[0], start[1].repeat(1, 2, 1)), x, y, lr),
        (start, x, y, torch.tensor([0.1, 0.2])),
    ):
        with pytest.raises(ValueError, match="shapes must fit"):
            train_runs(DiagonalLinearNet, parameters, inputs, targets, lr=rate, steps=1)
    with pytest.raises(ValueError, match="lr must be positive in every run"):
        train_runs(DiagonalLinearNet, start, x, y, lr=-lr, steps=1)
    for name in ("steps", "batch_size", "record_every", "max_grad_norm", "tolerance"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            train_runs(DiagonalLinearNet, start, x, y, **(good | {name: 0}))


@pytest.mark.parametrize("batch_size", [1, None])
def test_threshold_of_huge_gradients(batch_size):
    """Of degree -2 in the gradients; at 1e78 the eigenvalue solver used to give up."""
    (jacobian,) = _seeded_jacobian(_generator())
    here = critical_learning_rate(jacobian.to(F64), batch_size)
    for scale in (1e78, 1e-78):
        there = critical_learning_rate(scale * jacobian.to(F64), batch_size)
        assert (there * scale * scale).item() == pytest.approx(here.item(), rel=1e-6)


def test_a_moment_that_overflows_says_so():
    (jacobian,) = _seeded_jacobian(_generator())
    with pytest.warns(RuntimeWarning, match="second_moment_step diverged"):
        after = second_moment_step(1e30 * torch.eye(4), 1e10 * jacobian, 0.1, 3)
    assert after.isnan().any()
