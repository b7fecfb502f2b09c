"""Hessian products, trace and largest eigenvalue, against the exact Hessian in float64."""

import math

import pytest
import torch
from torch import nn

from contract import Case, sizes
from wellposed.ops.hessian import (
    hessian_trace,
    hessian_vector_product,
    lanczos,
    per_sample_jacobian,
    top_eigenvalue,
)

F64 = torch.float64


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _network(dtype=F64, seed=0):
    """A small net with a smooth loss, its parameters and the exact Hessian."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    x = torch.randn(7, 3, generator=_generator(seed), dtype=F64).to(dtype)
    y = torch.randint(2, (7,), generator=_generator(seed))

    def loss():
        return nn.functional.cross_entropy(net(x), y)

    sizes = [p.shape for p in net.parameters()]

    def of_vector(flat):
        pieces = flat.split([s.numel() for s in sizes])
        w1, b1, w2, b2 = (p.view(s) for p, s in zip(pieces, sizes))
        return nn.functional.cross_entropy((x @ w1.T + b1).tanh() @ w2.T + b2, y)

    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    return net, loss, torch.func.hessian(of_vector)(flat)


# --- products -------------------------------------------------------------------------------------


def test_product_is_that_of_the_exact_hessian():
    """Fails if the parameters are flattened in another order."""
    net, loss, exact = _network()
    for seed in range(3):
        v = torch.randn(len(exact), generator=_generator(seed), dtype=F64)
        torch.testing.assert_close(hessian_vector_product(loss, net, v), exact @ v)
        found = hessian_vector_product(loss, list(net.parameters()), v)
        torch.testing.assert_close(found, exact @ v)


def test_product_against_a_difference_of_gradients():
    """An independent route: (grad(x + h v) - grad(x - h v)) / 2 h."""
    net, loss, exact = _network(seed=3)
    v = torch.randn(len(exact), generator=_generator(5), dtype=F64)
    slopes, h = [], 1e-5
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * h * v, net.parameters())
        slopes.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(), net.parameters())])
        )
    nn.utils.vector_to_parameters(start, net.parameters())
    expected = (slopes[0] - slopes[1]) / (2 * h)
    torch.testing.assert_close(hessian_vector_product(loss, net, v), expected, rtol=1e-6, atol=1e-8)


def test_product_of_a_part_of_the_parameters_is_a_block():
    net, loss, exact = _network()
    v = torch.randn(10, generator=_generator(1), dtype=F64)
    found = hessian_vector_product(loss, [net[2].weight], v)
    torch.testing.assert_close(found, exact[20:30, 20:30] @ v)


def test_linear_and_unused_parameters_have_no_curvature():
    """Autograd has no second graph for them; fails without filling in zeros."""
    x = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    line, unused = (torch.ones(2, dtype=F64, requires_grad=True) for _ in range(2))
    v = torch.arange(1.0, 7.0, dtype=F64)
    found = hessian_vector_product(lambda: (x**3).sum() + line.sum(), [x, line, unused], v)
    assert found.tolist() == [6.0, 24.0, 0.0, 0.0, 0.0, 0.0]  # 6 x v
    assert hessian_vector_product(lambda: line.sum(), [line], v[:2]).tolist() == [0.0, 0.0]


def test_frozen_parameters_of_a_module_are_left_out():
    net, loss, exact = _network()
    net[0].requires_grad_(False)
    v = torch.randn(12, generator=_generator(1), dtype=F64)
    torch.testing.assert_close(hessian_vector_product(loss, net, v), exact[20:, 20:] @ v)


def test_nothing_is_left_behind():
    """No gradient on the parameters, no change of their values, no graph on the result."""
    net, loss, exact = _network()
    before = [p.detach().clone() for p in net.parameters()]
    found = hessian_vector_product(loss, net, torch.ones(len(exact), dtype=F64))
    assert not found.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))
    with torch.no_grad():
        again = hessian_vector_product(loss, net, torch.ones(len(exact), dtype=F64))
    assert torch.equal(found, again)


# --- trace ----------------------------------------------------------------------------------------


def test_trace_within_its_standard_error():
    """Over 40 estimates z has mean about 0 and spread about 1; fails if the error lacks sqrt(k)."""
    net, loss, exact = _network()
    z = []
    for seed in range(40):
        found = hessian_trace(loss, net, probes=20, generator=_generator(seed))
        z.append(((found.trace - exact.trace()) / found.standard_error).item())
    z = torch.tensor(z)
    assert abs(z.mean()) < 0.5
    assert 0.75 < z.std() < 1.35


def test_standard_error_is_that_of_random_signs():
    """The variance of v'Hv is twice the sum of squared entries off the diagonal."""
    net, loss, exact = _network()
    off = exact - exact.diag().diag()
    expected = math.sqrt(2 * off.square().sum() / 4000)
    found = hessian_trace(loss, net, probes=4000, generator=_generator())
    assert found.standard_error.item() == pytest.approx(expected, rel=0.1)
    assert found.trace.item() == pytest.approx(exact.trace().item(), abs=4 * expected)


def test_trace_of_a_diagonal_hessian_is_exact():
    """Fails with Gaussian probes, which are not exact here."""
    x = torch.arange(1.0, 5.0, dtype=F64, requires_grad=True)
    found = hessian_trace(lambda: (x**3).sum(), [x], probes=2, generator=_generator())
    assert found.trace.item() == pytest.approx(60.0)  # 6 (1 + 2 + 3 + 4)
    assert found.standard_error.item() == pytest.approx(0.0, abs=1e-12)


def test_more_probes_change_the_estimate_and_the_error():
    net, loss, _ = _network()
    few = hessian_trace(loss, net, probes=10, generator=_generator())
    many = hessian_trace(loss, net, probes=1000, generator=_generator())
    assert few.trace != many.trace
    assert 5 < few.standard_error / many.standard_error < 20  # sqrt(100)
    assert (few.probes, many.probes) == (10, 1000)


# --- largest eigenvalue ---------------------------------------------------------------------------


def test_top_eigenvalue_is_that_of_the_exact_hessian():
    net, loss, exact = _network()
    values, vectors = torch.linalg.eigh(exact)
    found = top_eigenvalue(loss, net, tol=1e-8, generator=_generator())
    assert found.converged
    assert found.value.item() == pytest.approx(values[-1].item(), rel=1e-10)
    assert abs(found.vector @ vectors[:, -1]).item() == pytest.approx(1.0, abs=1e-7)
    residual = (exact @ found.vector - found.value * found.vector).norm()
    assert found.residual.item() == pytest.approx(residual.item(), rel=1e-3, abs=1e-12)


def test_top_is_rightmost_not_largest_in_size():
    """Fails with power iteration, which would find -6."""
    x = torch.ones(3, dtype=F64, requires_grad=True)
    curvature = torch.tensor([2.0, -6.0, 1.0], dtype=F64)
    found = top_eigenvalue(lambda: (curvature * x**2).sum() / 2, [x], generator=_generator())
    assert found.value.item() == pytest.approx(2.0)


def test_negative_definite_and_zero_hessians():
    x = torch.ones(3, dtype=F64, requires_grad=True)
    down = top_eigenvalue(lambda: -(x**2).sum(), [x], generator=_generator())
    assert (down.value.item(), down.converged) == (pytest.approx(-2.0), True)
    flat = top_eigenvalue(lambda: x.sum(), [x], generator=_generator())
    assert (flat.value.item(), flat.converged) == (0.0, True)


def test_too_few_products_are_reported():
    """A residual above the tolerance is a field and a warning, never silence."""
    diagonal = torch.linspace(1, 2, 200, dtype=F64)
    with pytest.warns(RuntimeWarning, match="lanczos stopped at residual"):
        found = lanczos(lambda v: diagonal * v, torch.ones(200, dtype=F64), max_iter=5, tol=1e-10)
    assert not found.converged
    assert found.n_iter == 5
    near = (diagonal - found.value).abs().min()
    assert near <= found.residual  # the bound that a residual gives


def test_loose_tolerance_stops_earlier():
    """Fails too if new vectors are made orthogonal only once: rounding brings copies."""
    diagonal = torch.linspace(1, 2, 200, dtype=F64)
    start = torch.ones(200, dtype=F64)
    loose, tight = (lanczos(lambda v: diagonal * v, start, tol=t) for t in (1e-2, 1e-8))
    assert loose.n_iter < tight.n_iter
    assert tight.value.item() == pytest.approx(2.0, rel=1e-12)


def test_lanczos_against_eigh_on_random_matrices():
    """Clustered eigenvalues too."""
    for seed in range(5):
        q, _ = torch.linalg.qr(torch.randn(40, 40, generator=_generator(seed), dtype=F64))
        values = torch.cat([torch.tensor([3.0, 3.0, 2.999]), torch.linspace(-5, 2, 37)]).to(F64)
        matrix = (q * values) @ q.T
        start = torch.randn(40, generator=_generator(seed + 9), dtype=F64)
        found = lanczos(lambda v, a=matrix: a @ v, start, tol=1e-9)
        assert found.converged
        assert found.value.item() == pytest.approx(3.0, rel=1e-9)


# --- Jacobian -------------------------------------------------------------------------------------


def test_jacobian_against_one_backward_pass_an_example():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).to(F64)
    x = torch.randn(6, 3, generator=_generator(), dtype=F64)
    rows = []
    for one in x:
        gradients = torch.autograd.grad(net(one[None])[0], list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    found = per_sample_jacobian(net, x)
    torch.testing.assert_close(found, torch.stack(rows))
    assert not found.requires_grad


def test_jacobian_of_unused_and_frozen_parameters():
    """A column a parameter, whether or not it is used or trained; the model stays as it was."""
    net = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).to(F64)
    net.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=F64)))
    net[0].bias.requires_grad_(False)
    found = per_sample_jacobian(net, torch.ones(4, 3, dtype=F64))
    assert found.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 1.0]] * 4  # "idle" comes first
    assert not net[0].bias.requires_grad
    assert net.idle.grad is None


def test_gauss_newton_part_is_the_hessian_without_residuals():
    """At an interpolating minimum of half the mean square; elsewhere it is not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).to(F64)
    x = torch.randn(6, 3, generator=_generator(), dtype=F64)
    g = per_sample_jacobian(net, x).T @ per_sample_jacobian(net, x) / 6
    v = torch.randn(len(g), generator=_generator(1), dtype=F64)
    fitted = net(x).detach()
    found = hessian_vector_product(lambda: (net(x) - fitted).square().mean() / 2, net, v)
    torch.testing.assert_close(found, g @ v)
    off = hessian_vector_product(lambda: (net(x) - fitted - 1).square().mean() / 2, net, v)
    assert (off - g @ v).norm() > 0.01 * off.norm()


# --- dtypes, determinism, bad input ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtype_is_kept_and_runs_repeat(dtype):
    net, loss, exact = _network(dtype)
    assert hessian_vector_product(loss, net, torch.ones(len(exact), dtype=dtype)).dtype == dtype
    traces = [hessian_trace(loss, net, probes=5, generator=_generator(4)) for _ in range(2)]
    tops = [top_eigenvalue(loss, net, tol=1e-3, generator=_generator(4)) for _ in range(2)]
    assert traces[0].trace.dtype == traces[0].standard_error.dtype == dtype
    assert tops[0].value.dtype == tops[0].vector.dtype == tops[0].residual.dtype == dtype
    assert traces[0] == traces[1]
    assert torch.equal(tops[0].vector, tops[1].vector)


def test_bad_parameters_and_losses():
    x = torch.ones(2, requires_grad=True)
    v = torch.ones(2)
    with pytest.raises(ValueError, match="loss must return a 0-d tensor, got \\(2,\\)"):
        hessian_vector_product(lambda: x**2, [x], v)
    with pytest.raises(ValueError, match="loss must return a 0-d tensor, got float"):
        hessian_vector_product(lambda: 1.0, [x], v)
    with pytest.raises(ValueError, match="got a constant"):
        hessian_vector_product(lambda: torch.zeros(()), [x], v)
    other, y = torch.ones(2, requires_grad=True), torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match="uses none of them"):
        hessian_vector_product(lambda: (other**2).sum(), [x], v)
    with pytest.raises(ValueError, match="at least one tensor"):
        hessian_trace(lambda: (x**2).sum(), [])
    with pytest.raises(ValueError, match=r"parameters\[0\] must require a gradient"):
        hessian_trace(lambda: (x**2).sum(), [torch.ones(2)])
    with pytest.raises(TypeError, match="got one tensor"):
        hessian_trace(lambda: (x**2).sum(), x)
    with pytest.raises(TypeError, match=r"parameters\[1\] must be a floating-point tensor"):
        hessian_trace(lambda: (x**2).sum(), [x, torch.ones(2, dtype=torch.int64)])
    with pytest.raises(TypeError, match="share a dtype"):
        hessian_trace(lambda: (x**2).sum(), [x, y])


def test_bad_vectors_and_numbers():
    x = torch.ones(2, requires_grad=True)

    def loss():
        return (x**2).sum()

    with pytest.raises(ValueError, match="vector must have shape \\(2,\\), got \\(3,\\)"):
        hessian_vector_product(loss, [x], torch.ones(3))
    with pytest.raises(TypeError, match=r"vector must be torch\.float32"):
        hessian_vector_product(loss, [x], torch.ones(2, dtype=F64))
    with pytest.raises(ValueError, match="probes must be at least 2, got 1"):
        hessian_trace(loss, [x], probes=1)
    with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
        top_eigenvalue(loss, [x], max_iter=0)
    with pytest.raises(ValueError, match="tol must be positive, got 0"):
        top_eigenvalue(loss, [x], tol=0.0)
    with pytest.raises(ValueError, match="start must be a finite nonzero vector"):
        lanczos(lambda v: v, torch.zeros(3))
    with pytest.raises(ValueError, match="inputs must hold at least one example"):
        per_sample_jacobian(nn.Linear(2, 1), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="model must return shape \\(3,\\), got \\(3, 1\\)"):
        per_sample_jacobian(nn.Linear(2, 1), torch.zeros(3, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_a_gpu():
    net, loss, exact = _network()
    v = torch.ones(len(exact), dtype=F64)
    here = hessian_vector_product(loss, net, v)
    x = torch.arange(1.0, 4.0, dtype=F64, device="cuda", requires_grad=True)
    there = hessian_vector_product(lambda: (x**3).sum(), [x], torch.ones_like(x))
    assert there.tolist() == [6.0, 12.0, 18.0]
    assert here.device.type == "cpu"
    found = top_eigenvalue(lambda: (x**3).sum(), [x], generator=_generator())
    assert found.value.item() == pytest.approx(18.0)


def _quartic(x):
    """Parameters at x, and a loss of them."""
    leaf = x.clone().requires_grad_()
    return [leaf], lambda: (leaf**4).sum() + leaf.sum().square()


def _vectors(g):
    (n,) = sizes(g, 1)
    return torch.randn(n, generator=g), torch.randn(n, generator=g)


def _gen():
    return torch.Generator().manual_seed(0)


def _hessian(call):
    def run(x):
        parameters, loss = _quartic(x)
        return call(loss, parameters)

    return Case(lambda g: _vectors(g)[:1], run)


def _linear(x):
    net = nn.Sequential(nn.Linear(x.shape[1], 1), nn.Flatten(0)).to(x)
    nn.init.ones_(net[0].weight), nn.init.zeros_(net[0].bias)
    return per_sample_jacobian(net, x)


CASES = {
    "hessian_trace": _hessian(lambda loss, p: hessian_trace(loss, p, probes=3, generator=_gen())),
    "hessian_vector_product": Case(
        _vectors, lambda x, v: hessian_vector_product(*_quartic(x)[::-1], v)
    ),
    "lanczos": Case(
        lambda g: (torch.randn(*sizes(g, 1), 2, generator=g),),
        lambda both: lanczos(lambda u: both[:, 0] * u, both[:, 1], max_iter=20),
    ),
    "per_sample_jacobian": Case(lambda g: (torch.randn(*sizes(g, 2), generator=g),), _linear),
    "top_eigenvalue": _hessian(lambda loss, p: top_eigenvalue(loss, p, generator=_gen())),
}
