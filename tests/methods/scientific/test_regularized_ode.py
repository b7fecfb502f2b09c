"""Tests of wellposed.methods.scientific.regularized_ode."""

import math

import pytest
import torch
import torch.nn.functional as F

from contract import Case
from wellposed.methods.scientific import regularized_ode as paper
from wellposed.methods.scientific.regularized_ode import (
    Arm,
    NeuralClassifier,
    NeuralODE,
    classifier_loss,
    error_regularizer,
    evaluate_classifiers,
    odeint,
    stiffness_regularizer,
    train_classifiers,
)
from wellposed.ops.ode import odeint_rows
from wellposed.ops.sde import brownian_path

F64 = torch.float64


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


def _task(rows=2, b=5, dim=3, seed=1):
    g = _gen(seed)
    x = torch.randn(rows, b, dim, generator=g, dtype=F64)
    return x, torch.randint(2, (rows, b), generator=g)


def _net(rows=2, dim=3, dtype=F64):
    return NeuralClassifier(list(range(rows)), (dim, 4, 2), dtype=dtype)


def _loss_case(x, y):
    loss, run = classifier_loss(
        _net(dtype=x.dtype), x, y, [Arm(error=1.0), Arm(stiffness=1.0)], tol=1e-3
    )
    return loss, run.error


def _train_case(x, y):
    arms = [Arm(), Arm(error=1.0)]
    runs = train_classifiers(x, y, x, y, arms=arms, seeds=[3], epochs=1, batch_size=4, tol=1e-2)
    return runs.nfe, runs.accuracy, runs.stiffness


CASES = {
    "odeint": Case(
        inputs=lambda g: (torch.randn(4, generator=g),),
        call=lambda y: odeint(lambda t, z: -z, y, rtol=1e-3, atol=1e-3).y,
    ),
    "error_regularizer": Case(
        inputs=lambda g: (torch.randn(4, generator=g),),
        call=lambda y: error_regularizer(odeint(lambda t, z: -z, y, rtol=1e-3, atol=1e-3)),
    ),
    "stiffness_regularizer": Case(
        inputs=lambda g: (torch.randn(4, generator=g),),
        call=lambda y: stiffness_regularizer(odeint(lambda t, z: -z, y, rtol=1e-3, atol=1e-3)),
    ),
    "NeuralODE": Case(
        inputs=lambda g: (torch.randn(4, generator=g),),
        call=lambda y: NeuralODE(lambda t, z: z.sin(), rtol=1e-3, atol=1e-3)(y).y,
    ),
    "NeuralClassifier": Case(
        inputs=lambda g: (torch.randn(2, 5, 3, generator=g),),
        call=lambda z: _net(dtype=z.dtype).to(z.device).drift(z.new_zeros(2), z),
    ),
    "classifier_loss": Case(
        inputs=lambda g: (torch.randn(2, 5, 3, generator=g), torch.ones(2, 5, dtype=torch.int64)),
        call=_loss_case,
        on_device=False,
    ),
    "evaluate_classifiers": Case(
        inputs=lambda g: (torch.randn(5, 3, generator=g), torch.ones(5, dtype=torch.int64)),
        call=lambda x, y: evaluate_classifiers(
            _net(dtype=x.dtype).to(x.device), x, y, tol=1e-3, batch_size=5
        ),
    ),
    "train_classifiers": Case(
        inputs=lambda g: (torch.randn(8, 3, generator=g), torch.arange(8) % 2),
        call=_train_case,
        on_device=False,
    ),
}


def _solution():
    return odeint(lambda t, z: torch.sin(9 * z), torch.tensor([0.3, 0.1], dtype=F64), rtol=1e-4)


def test_regularizers_from_their_sums():
    """Loops over steps; fails if the step sizes are forgotten or the maximum becomes a mean."""
    run = _solution()
    q, s, h = (v.tolist() for v in (run.error, run.stiffness, run.step_sizes))
    error, stiff = sum(a * b for a, b in zip(q, h)), sum(a * b for a, b in zip(s, h))
    for found, expected in (
        (error_regularizer(run), error),
        (error_regularizer(run, "mean"), error / len(h)),
        (stiffness_regularizer(run), stiff),
        (stiffness_regularizer(run, "mean"), stiff / len(h)),
        (stiffness_regularizer(run, "max"), max(s) / 3.5068),
    ):
        assert float(found) == pytest.approx(expected, rel=1e-12)


def test_regularizers_of_rows_ignore_rejected_and_waiting_steps():
    """The mean is over a row's own steps; fails if it divides by the number of rounds."""
    speed = torch.tensor([[1.0], [30.0]], dtype=F64)
    run = odeint_rows(lambda t, z: torch.sin(speed * z), torch.full((2, 1), 0.4, dtype=F64))
    for i in range(2):
        one = odeint(lambda t, z, i=i: torch.sin(speed[i] * z), torch.full((1,), 0.4, dtype=F64))
        for f, how in (
            (error_regularizer, "mean"), (error_regularizer, "sum"),
            (stiffness_regularizer, "mean"), (stiffness_regularizer, "max"),
        ):  # fmt: skip
            torch.testing.assert_close(f(run, how)[i], f(one, how), rtol=1e-6, atol=1e-9)


def test_constant_field_costs_nothing():
    run = odeint(lambda t, z: torch.ones_like(z), torch.zeros(2, dtype=F64))
    assert float(error_regularizer(run)) == pytest.approx(0, abs=1e-6)
    assert float(stiffness_regularizer(run)) == 0


def test_regularizers_do_not_call_the_field():
    calls = []
    y = torch.ones(2, dtype=F64, requires_grad=True)
    run = odeint(lambda t, z: calls.append(1) or z.sin(), y)
    (error_regularizer(run) + stiffness_regularizer(run, "max")).backward()
    assert len(calls) == run.nfe
    assert y.grad.abs().sum() > 0


def test_descending_the_error_regularizer_saves_steps():
    """The point of the paper in one test; fails if the sign of the gradient flips."""
    w = torch.tensor(6.0, dtype=F64, requires_grad=True)
    y = torch.linspace(-1, 1, 5, dtype=F64)
    field = lambda t, z: torch.sin(w * z)  # noqa: E731
    before = odeint(field, y)
    for _ in range(30):
        run = odeint(field, y)
        (slope,) = torch.autograd.grad(error_regularizer(run), w)
        with torch.no_grad():
            w -= 0.1 * slope.sign()
    assert run.nfe < 0.8 * before.nfe


def test_neural_ode_layer():
    layer = NeuralODE(lambda t, z: z * t)
    assert float(layer(torch.ones(1, dtype=F64)).y) == pytest.approx(math.exp(0.5), rel=1e-5)
    loose = NeuralODE(lambda t, z: z.sin(), rtol=1e-2, atol=1e-2)(torch.ones(1, dtype=F64))
    tight = NeuralODE(lambda t, z: z.sin(), rtol=1e-9, atol=1e-9)(torch.ones(1, dtype=F64))
    assert loose.nfe < tight.nfe
    first = NeuralODE(lambda t, z: z, t_span=(0.0, 0.1), first_step=1.0)(torch.ones(1, dtype=F64))
    assert first.nfe == 7
    with pytest.raises(RuntimeError, match="after 2 steps"):
        NeuralODE(lambda t, z: 50 * z, max_steps=2)(torch.ones(1, dtype=F64))
    with pytest.raises(TypeError, match="func must be callable"):
        NeuralODE(3.0)


def test_networks_from_their_formulas():
    net = _net(3)
    z, t = torch.randn(3, 5, 3, dtype=F64), torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    p = dict(net.named_parameters())
    for i in range(3):
        hidden = torch.tanh(z[i] @ p["w1"][i] + t[i] * p["u1"][i] + p["b1"][i])
        drift = hidden @ p["w2"][i] + t[i] * p["u2"][i] + p["b2"][i]
        torch.testing.assert_close(net.drift(t, z)[i], drift)
        torch.testing.assert_close(net.diffusion(t, z)[i], z[i] @ p["w4"][i] + p["b4"][i])
        torch.testing.assert_close(net.classify(z)[i], z[i] @ p["w3"][i] + p["b3"][i])
        torch.testing.assert_close(net.take(i).drift(t[i : i + 1], z[i : i + 1])[0], drift)


def test_second_derivative_is_the_total_derivative_of_the_field():
    """Fails if the part of the time is forgotten."""
    net, z, t = _net(2), torch.randn(2, 5, 3, dtype=F64), torch.tensor([0.2, 0.7], dtype=F64)
    f, second = net.bend(t, z)
    expected = torch.func.jvp(net.drift, (t, z), (torch.ones_like(t), f))
    torch.testing.assert_close(f, expected[0])
    torch.testing.assert_close(second, expected[1])


def test_equal_seeds_start_equal():
    net = NeuralClassifier([4, 5, 4], (3, 4, 2))
    for p in net.parameters():
        assert p[0].equal(p[2])
        assert not p[0].equal(p[1])


def test_loss_is_the_sum_of_its_parts():
    """Each weight moves the loss of its own row by its own term, and by nothing else."""
    net, (x, y) = _net(), _task()
    plain, run = classifier_loss(net, x, y, [Arm(), Arm()])
    logits = net.classify(run.y)
    for i in range(2):
        assert float(plain[i].detach()) == pytest.approx(
            float(F.cross_entropy(logits[i], y[i]).detach())
        )
    error, _ = classifier_loss(net, x, y, [Arm(error=3.0), Arm()], progress=0.5)
    torch.testing.assert_close(
        error - plain,
        torch.stack([3 * 10**-0.5 * error_regularizer(run, "mean")[0], 0 * plain[1]]),
    )
    stiff, _ = classifier_loss(net, x, y, [Arm(), Arm(stiffness=2.0)])
    torch.testing.assert_close((stiff - plain)[1], 2 * stiffness_regularizer(run, "max")[1])
    assert float((stiff - plain)[0]) == 0


def test_taylor_penalty_is_the_integral_along_the_path():
    """A sum over fine steps of the solver's own path; fails if the penalty is not integrated."""
    net, (x, y) = _net(), _task()
    plain, _ = classifier_loss(net, x, y, [Arm()] * 2, tol=1e-8)
    taylor, _ = classifier_loss(net, x, y, [Arm(taylor=1.0)] * 2, tol=1e-8)
    total, z, n = torch.zeros(2, dtype=F64), x, 2000
    for j in range(n):
        f, second = net.bend(torch.full((2,), (j + 0.5) / n, dtype=F64), z)
        total += second.square().mean((1, 2)) / n
        z = z + f / n
    torch.testing.assert_close(taylor - plain, total, rtol=5e-3, atol=0)


def test_end_and_path_change_the_solution():
    net, (x, y) = _net(), _task()
    base, run = classifier_loss(net, x, y, [Arm()] * 2)
    later, longer = classifier_loss(net, x, y, [Arm()] * 2, end=torch.tensor([1.0, 1.5], dtype=F64))
    torch.testing.assert_close(longer.y[0], run.y[0], rtol=1e-5, atol=1e-6)
    assert not longer.y[1].allclose(run.y[1], rtol=1e-3)
    path = brownian_path((1, 5, 3), generator=_gen(2), like=x)
    noisy, _ = classifier_loss(net, x, y, [Arm()] * 2, path=path, tol=0.1)
    assert not noisy.allclose(base)
    assert not later.allclose(base)


def test_loss_gradients():
    """Against finite differences of the loss. Steps are constants for the gradient, so that the
    estimates, which depend on them most, stand back here; `test_discrete_adjoint` has those."""
    net, (x, y) = _net(), _task()
    arms = [Arm(), Arm(stiffness=0.1)]
    loss, _ = classifier_loss(net, x, y, arms, tol=1e-8)
    loss.sum().backward()
    for name in ("w1", "u2", "b3"):
        p, grad = net.get_parameter(name), net.get_parameter(name).grad
        with torch.no_grad():
            entry, eps = p[:, 0, 0].clone(), 1e-5
            values = []
            for sign in (1, -1):
                p[:, 0, 0] = entry + sign * eps
                values.append(classifier_loss(net, x, y, arms, tol=1e-8)[0])
            p[:, 0, 0] = entry
        slope = (values[0] - values[1]) / (2 * eps)
        torch.testing.assert_close(grad[:1, 0, 0], slope[:1], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(grad[1:, 0, 0], slope[1:], rtol=0.05, atol=1e-3)


def test_training_learns_and_arms_share_their_start():
    """A linear classifier cannot see which half of a band is meant."""
    x = torch.randn(120, 2, generator=_gen(3), dtype=F64)
    y = (x[:, 0].abs() > 0.7).long()
    arms = [Arm(), Arm(error=100.0), Arm(weight_decay=0.1), Arm(jitter=0.5)]
    runs = train_classifiers(
        x, y, x, y, arms=arms, seeds=[0, 1], epochs=12, batch_size=20, tol=1e-4
    )
    assert runs.accuracy[-1, 0].min() > 0.75
    assert (runs.nfe[0, 0] == runs.nfe[0, 1]).all()
    assert (runs.training_nfe[-1, 1] < runs.training_nfe[-1, 0]).all()
    assert (runs.stiffness[-1, 1] < runs.stiffness[-1, 0]).all()
    norm = runs.nets[-1].w1.square().sum((1, 2)).view(4, 2)
    assert (norm[2] < norm[0]).all()
    assert not norm[3].allclose(norm[0])
    assert len(runs.nets) == 13
    again = train_classifiers(
        x, y, x, y, arms=arms[:1], seeds=[1], epochs=12, batch_size=20, tol=1e-4
    )
    torch.testing.assert_close(again.nets[-1].w1[0], runs.nets[-1].w1[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "change", [{"lr": 0.05}, {"momentum": 0.5}, {"width": 5}, {"tol": 1e-2}, {"batch_size": 6}]
)
def test_options_of_the_training_matter(change):
    x = torch.randn(24, 2, generator=_gen(4), dtype=F64)
    y = (x[:, 0] > 0).long()
    base = {"arms": [Arm(error=1.0)], "seeds": [0], "epochs": 2, "batch_size": 8, "tol": 1e-4}
    one, two = (train_classifiers(x, y, x, y, **{**base, **c}) for c in ({}, change))
    assert one.nets[-1].w3.shape != two.nets[-1].w2.shape
    if "width" not in change:
        assert not one.nets[-1].w1.allclose(two.nets[-1].w1, rtol=1e-9, atol=0)


def test_stochastic_training():
    x = torch.randn(24, 2, generator=_gen(5), dtype=F64)
    y = (x[:, 0] > 0).long()
    arms = [Arm(), Arm(stiffness=5.0)]
    runs = train_classifiers(
        x, y, x, y, arms=arms, seeds=[0, 1], epochs=6, batch_size=12, tol=0.3, stochastic=True
    )
    assert runs.accuracy[-1].min() > 0.7
    assert (runs.stiffness[-1, 1] < runs.stiffness[-1, 0]).all()


def test_evaluation_from_single_batches():
    net, (x, y) = _net(), _task(rows=1, b=7)
    nfe, right, stiff = evaluate_classifiers(net, x[0], y[0], batch_size=3)
    for i in range(2):
        one = net.take(i)
        field = lambda t, z, net=one: net.drift(torch.tensor([t], dtype=F64), z)  # noqa: E731
        runs = [odeint(field, x[:, a : a + 3]) for a in (0, 3)]
        logits = torch.cat([net.take(i).classify(run.y)[0] for run in runs])
        assert float(nfe[i]) == sum(run.nfe for run in runs) / 2
        assert float(right[i]) == pytest.approx(
            float((logits.argmax(1) == y[0, :6]).double().mean())
        )
        assert float(stiff[i]) == pytest.approx(max(float(run.stiffness.max()) for run in runs))


def test_bad_input_is_named():
    run, net, (x, y) = _solution(), _net(), _task()
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        error_regularizer(run, "max")
    with pytest.raises(ValueError, match="reduction must be 'sum', 'mean' or 'max'"):
        stiffness_regularizer(run, "none")
    with pytest.raises(ValueError, match="seeds must hold"):
        NeuralClassifier([], (3, 4, 2))
    with pytest.raises(ValueError, match="sizes must be three positive numbers"):
        NeuralClassifier([0], (3, 0, 2))
    with pytest.raises(ValueError, match=r"row must be in \[0, 2\)"):
        net.take(2)
    with pytest.raises(ValueError, match="must agree in rows"):
        classifier_loss(net, x, y, [Arm()])
    with pytest.raises(ValueError, match="all have a Taylor weight, or none"):
        classifier_loss(net, x, y, [Arm(), Arm(taylor=1.0)])
    path = brownian_path((1, 5, 3), generator=_gen(), like=x)
    with pytest.raises(ValueError, match="path allows neither"):
        classifier_loss(net, x, y, [Arm(taylor=1.0)] * 2, path=path)
    with pytest.raises(ValueError, match="path allows neither"):
        classifier_loss(net, x, y, [Arm()] * 2, path=path, end=2.0)
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 5\]"):
        evaluate_classifiers(net, x[0], y[0], batch_size=6)
    good = {"arms": [Arm()], "seeds": [0], "batch_size": 5}
    for bad, text in (
        ({"arms": []}, "arms and seeds"),
        ({"seeds": []}, "arms and seeds"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 6}, "batch_size in"),
    ):
        with pytest.raises(ValueError, match=text):
            train_classifiers(x[0], y[0], x[0], y[0], **{**good, **bad})


def test_constants_are_those_of_the_paper():
    assert paper.STABILITY == 3.5068
    assert paper.FINAL_WEIGHT == 0.1


def test_labels_of_another_length_are_refused():
    x, y = torch.zeros(4, 3, dtype=F64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="same length"):
        evaluate_classifiers(_net(), x, y, batch_size=2)
    with pytest.raises(ValueError, match="pair up"):
        train_classifiers(x, y, x, y, arms=[Arm()], seeds=[0], epochs=1, batch_size=2)
