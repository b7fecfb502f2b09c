"""The adaptive Runge-Kutta solver."""

import math

import pytest
import torch

from contract import Case, sizes
from wellposed.ops.ode import (
    ERROR,
    NODES,
    STAGES,
    Stepper,
    check_interval,
    odeint,
    odeint_rows,
    row_norm,
)

F64 = torch.float64


def _pendulum(t, y):
    return torch.stack([y[..., 1], -torch.sin(y[..., 0]) - 0.1 * t * y[..., 1]], -1)


def _start(*shape):
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(3), dtype=F64)


def test_coefficients_fulfill_the_order_conditions():
    """Trees up to order three, for the solution and (as differences) for the error weights."""
    weights = [*STAGES[-1], 0.0]
    nodes = [0.0, *NODES]
    rows = [[0.0] * 7] + [[*row, *[0.0] * (7 - len(row))] for row in STAGES]
    for row, node in zip(rows, nodes):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    for power in range(5):
        assert sum(w * c**power for w, c in zip(weights, nodes)) == pytest.approx(1 / (power + 1))
    inner = [sum(a * c for a, c in zip(row, nodes)) for row in rows]
    assert sum(w * v for w, v in zip(weights, inner)) == pytest.approx(1 / 6)
    for power in range(4):
        assert sum(e * c**power for e, c in zip(ERROR, nodes)) == pytest.approx(0, abs=1e-12)
    assert abs(sum(e * c**4 for e, c in zip(ERROR, nodes))) > 1e-5


def test_one_step_from_its_definition():
    """Explicit loops over the tableau; fails if the error weights lose a sign."""
    y, h, t = _start(3), 0.3, 0.4
    ks = []
    for i in range(7):
        row = STAGES[i - 1] if i else ()
        g = y + h * sum((a * k for a, k in zip(row, ks)), torch.zeros_like(y))
        if i == 5:
            sixth = g
        ks.append(_pendulum(t + (NODES[i - 1] if i else 0) * h, g))
    error = h * sum(e * k for e, k in zip(ERROR, ks))
    scale = 1e-3 + 1e-2 * torch.maximum(y.abs(), g.abs())
    q = (error / scale).square().mean().sqrt()
    s = (ks[6] - ks[5]).norm() / (g - sixth).norm()
    found = Stepper(_pendulum, 1e-2, 1e-3, rows=False).step(t, h, y, ks[0])
    for value, expected in zip(found, (g, ks[6], q, s)):
        torch.testing.assert_close(value, expected)


def test_order_five():
    """Fixed steps of the linear equation; the slope of the error is the order."""
    y = torch.ones(1, dtype=F64)
    errors = []
    for steps in (4, 8, 16):
        z, h = y, 2.0 / steps
        stepper = Stepper(lambda t, v: -v + math.sin(5 * t), 1.0, 1.0, rows=False)
        for j in range(steps):
            z = stepper.step(j * h, h, z, stepper.func(j * h, z))[0]
        exact = (math.exp(-2) * 31 + math.sin(10) - 5 * math.cos(10)) / 26
        errors.append(abs(float(z) - exact))
    assert 4.6 < math.log2(errors[1] / errors[2]) < 6


@pytest.mark.parametrize("tol", [1e-4, 1e-7, 1e-10])
def test_same_solution_as_torchdiffeq(tol):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    y0 = _start(5)
    exact = torchdiffeq.odeint(
        lambda t, y: _pendulum(float(t), y), y0, torch.tensor([0.0, 3.0], dtype=F64),
        rtol=1e-12, atol=1e-12,
    )[-1]  # fmt: skip
    found = odeint(_pendulum, y0, (0.0, 3.0), rtol=tol, atol=tol)
    assert (found.y - exact).abs().max() < 30 * tol
    rows = odeint_rows(lambda t, y: _pendulum(t, y), y0, (0.0, 3.0), rtol=tol, atol=tol)
    assert (rows.y - exact).abs().max() < 30 * tol


def test_rows_step_as_torchode_and_solve_alike():
    """Both have one step size a row; a hard row must not cost an easy one."""
    torchode = pytest.importorskip("torchode")
    y0, rate = torch.ones(2, 3, dtype=F64), torch.tensor([[-1.0], [-40.0]], dtype=F64)
    f = lambda t, y: rate * (y - torch.cos(t)[:, None])  # noqa: E731
    term = torchode.ODETerm(f)
    method = torchode.Tsit5(term=term)
    control = torchode.IntegralController(atol=1e-9, rtol=1e-9, term=term)
    problem = torchode.InitialValueProblem(
        y0=y0, t_start=torch.zeros(2, dtype=F64), t_end=torch.full((2,), 2.0, dtype=F64)
    )
    peer = torchode.AutoDiffAdjoint(method, control).solve(problem)
    found = odeint_rows(f, y0, (0.0, 2.0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.y, peer.ys[:, -1], rtol=0, atol=1e-7)
    assert found.nfe[0] < found.nfe[1] / 2
    alone = odeint_rows(lambda t, y: f(t, y)[:1] if len(y) == 1 else f(t, y), y0, (0.0, 2.0))
    assert alone.nfe.tolist() != found.nfe.tolist()


def test_rows_are_the_solver_alone():
    """Steps, errors, counts of each row; fails if a norm is taken over all rows."""
    speed = torch.tensor([0.5, 3.0, 9.0], dtype=F64).view(3, 1, 1)
    y0 = _start(3, 4)
    together = odeint_rows(
        lambda t, y: speed * _pendulum((t * 0).view(-1, 1), y), y0, (0.0, 2.0), rtol=1e-5
    )
    for i in range(3):
        one = odeint(lambda t, y, i=i: speed[i] * _pendulum(0.0, y), y0[i], (0.0, 2.0), rtol=1e-5)
        keep = together.step_sizes[:, i] > 0
        torch.testing.assert_close(together.y[i], one.y)
        torch.testing.assert_close(together.error[keep, i], one.error, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(together.stiffness[keep, i], one.stiffness, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(together.step_sizes[keep, i], one.step_sizes)
        counts = (together.nfe[i], together.num_accepted[i], together.num_rejected[i])
        assert tuple(int(c) for c in counts) == (one.nfe, one.num_accepted, one.num_rejected)


def test_each_row_may_have_its_own_end():
    end = torch.tensor([0.5, 2.0], dtype=F64)
    found = odeint_rows(lambda t, y: -y, torch.ones(2, 1, dtype=F64), (0.0, end))
    torch.testing.assert_close(found.y[:, 0], torch.exp(-end), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.step_sizes.sum(0), end)


def test_every_call_is_counted():
    for first, expected in ((None, 2), (0.5, 1)):
        calls: list[float] = []
        field = lambda t, y, seen=calls: seen.append(t) or -50 * y  # noqa: E731
        found = odeint(field, _start(2), first_step=first)
        assert found.nfe == len(calls) == expected + 6 * (found.num_accepted + found.num_rejected)
        assert found.num_accepted == len(found.step_sizes) == len(found.error)
        assert float(found.step_sizes.sum()) == pytest.approx(1.0, abs=1e-12)
    assert found.num_rejected > 0
    assert (found.error <= 1).all()
    single = odeint(lambda t, y: -y, _start(2), (0.0, 1e-3), first_step=1.0)
    assert single.nfe == 7


@pytest.mark.parametrize("rate", [-3.0, 7.5])
def test_stiffness_of_a_linear_equation_is_its_rate(rate):
    """Exact, whatever the step; fails if stages five and seven are compared."""
    found = odeint(lambda t, y: rate * y, _start(4))
    torch.testing.assert_close(found.stiffness, torch.full_like(found.stiffness, abs(rate)))


def test_stiffness_of_a_constant_field_is_zero_not_rounding():
    found = odeint(lambda t, y: torch.ones_like(y), _start(4))
    assert found.stiffness.abs().max() == 0
    assert found.y.isfinite().all()


def test_tolerances_change_the_steps():
    base = odeint(_pendulum, _start(3), (0.0, 5.0), rtol=1e-5, atol=1e-5)
    for change in ({"rtol": 1e-9, "atol": 1e-5}, {"rtol": 1e-5, "atol": 1e-9}):
        assert odeint(_pendulum, _start(3), (0.0, 5.0), **change).nfe > base.nfe


@pytest.mark.parametrize("solver", ["one", "rows"])
def test_discrete_adjoint(solver):
    """Gradients of state, error and stiffness; steps are constants, so one step is compared."""
    y0 = _start(1, 2)

    def run(y, w):
        if solver == "rows":
            f = lambda t, z: torch.tanh(z * w) + t.view(-1, 1, 1)  # noqa: E731
            s = odeint_rows(f, y, (0.0, 0.2), first_step=1.0, rtol=1e-2, atol=1e-2)
        else:
            f = lambda t, z: torch.tanh(z * w) + t  # noqa: E731
            s = odeint(f, y, (0.0, 0.2), first_step=1.0, rtol=1e-2, atol=1e-2)
        return s.y, 1e3 * s.error, s.stiffness

    w = torch.tensor([1.3, -0.7], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (y0.requires_grad_(), w))


def test_gradient_matches_the_exact_sensitivity():
    rate = torch.tensor(-1.5, dtype=F64, requires_grad=True)
    for solve in (odeint, odeint_rows):
        y = solve(lambda t, z: rate * z, torch.ones(1, 1, dtype=F64), rtol=1e-9, atol=1e-9).y
        (slope,) = torch.autograd.grad(y.sum(), rate)
        assert float(slope) == pytest.approx(math.exp(-1.5), rel=1e-6)


def test_steps_carry_no_gradient_and_float32_is_kept():
    y0 = _start(2, 3).float().requires_grad_()
    for solve in (odeint, odeint_rows):
        found = solve(lambda t, y: -5 * y, y0, rtol=1e-3, atol=1e-3)
        assert not found.step_sizes.requires_grad
        assert {found.y.dtype, found.error.dtype, found.step_sizes.dtype} == {torch.float32}
        assert found.error.requires_grad


def test_row_norm():
    x = _start(3, 4)
    torch.testing.assert_close(row_norm(x, False), x.square().mean().sqrt())
    torch.testing.assert_close(row_norm(x, True), x.square().mean((1, 2)).sqrt())


@pytest.mark.parametrize("solve", [odeint, odeint_rows])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rtol": 0.0}, ValueError, "rtol and atol must be positive"),
        ({"atol": -1.0}, ValueError, "rtol and atol must be positive"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ({"first_step": 0.0}, ValueError, "first_step must be positive"),
        ({"t_span": (1.0, 1.0)}, ValueError, "t_span must be an interval"),
        ({"y0": torch.ones(2, 2, dtype=torch.int64)}, ValueError, "y0 must be a float tensor"),
        ({"y0": torch.ones(0, 2)}, ValueError, "y0 must be a float tensor"),
        ({"max_steps": 2}, RuntimeError, "2 steps"),
        ({"func": lambda t, y: y * math.nan}, RuntimeError, "not finite"),
    ],
)
def test_bad_input(solve, change, error, text):
    arguments = {"func": lambda t, y: -30 * y, "y0": torch.ones(2, 2, dtype=F64), **change}
    with pytest.raises(error, match=text):
        solve(arguments.pop("func"), arguments.pop("y0"), **arguments)


def test_rows_need_two_axes():
    with pytest.raises(ValueError, match=r"y0 must be \(rows, ...\)"):
        odeint_rows(lambda t, y: y, torch.ones(3, dtype=F64))


def _state(g):
    return (torch.randn(sizes(g, 2), generator=g),)


CASES = {
    "check_interval": Case(lambda g: (), lambda: check_interval(1e-3, 1e-3, 5)),
    "odeint": Case(_state, lambda y: odeint(lambda t, z: -z, y, rtol=1e-3, atol=1e-3)),
    "odeint_rows": Case(
        _state, lambda y: odeint_rows(lambda t, z: z.sin(), y, rtol=1e-3, atol=1e-3)
    ),
    "row_norm": Case(_state, lambda y: (row_norm(y, True), row_norm(y, False))),
}


def test_nothing_has_no_norm():
    with pytest.raises(ValueError, match="not be empty"):
        row_norm(torch.zeros(0, 3), True)
