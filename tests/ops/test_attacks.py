"""Tests of wellposed.ops.attacks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.ops.attacks import pgd_l2


def linear(weight):
    return lambda x: x.flatten(-3) @ weight


def drawn(n=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 2, 3, generator=g, dtype=dtype)
    return x, torch.randint(0, 2, (n,), generator=g), torch.randn(6, 2, generator=g, dtype=dtype)


def test_two_classes_have_a_closed_form():
    """A linear model is attacked along the difference of its columns; fails if it descends."""
    x, y, weight = drawn()
    direction = weight[:, 1] - weight[:, 0]
    direction = torch.where((y == 0)[:, None], direction, -direction) / direction.norm()
    for steps, reach in ((2, 0.4), (30, 1.0)):
        out = pgd_l2(linear(weight), x, y, radius=0.7, steps=steps, step_size=0.2)
        torch.testing.assert_close((out - x).flatten(1), 0.7 * reach * direction)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0, 100), st.integers(-30, 30), st.sampled_from([0.1, 5.0]))
def test_stays_in_the_ball_and_is_finite(seed, radius, power, step_size):
    """At any scale of the gradient. Fails without the projection, or if tiny gradients vanish."""
    x, y, weight = drawn(seed=seed, dtype=torch.float32)
    model = linear(weight * 10.0**power)
    out = pgd_l2(model, x, y, radius=radius, steps=4, step_size=step_size)
    assert out.isfinite().all()
    assert ((out - x).flatten(1).norm(dim=1) <= radius * 1.001 + 1e-5).all()


def test_networks_side_by_side_are_attacked_alone():
    """Fails if the norm runs over networks, or a later step starts from the clean input."""
    x, y, weight = drawn()
    weights = torch.stack([weight, weight.flip(0)])

    def many(x):
        return torch.tanh(x.flatten(-3) @ weights)

    out = pgd_l2(many, x.expand(2, *x.shape), y.expand(2, -1), radius=0.5)
    for i in range(2):
        one = pgd_l2(lambda x, i=i: torch.tanh(x.flatten(-3) @ weights[i]), x, y, radius=0.5)
        torch.testing.assert_close(out[i], one)


def test_no_steps_and_a_flat_model_leave_the_input():
    x, y, weight = drawn()
    assert torch.equal(pgd_l2(linear(weight), x, y, radius=1.0, steps=0), x)
    assert torch.equal(pgd_l2(linear(0 * weight), x, y, radius=1.0), x)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"radius": -1.0}, "radius must be"),
        ({"radius": 1.0, "steps": -1}, "steps must be"),
        ({"radius": 1.0, "step_size": 0.0}, "step_size must be"),
    ],
)
def test_bad_input(changes, text):
    x, y, weight = drawn()
    with pytest.raises(ValueError, match=text):
        pgd_l2(linear(weight), x, y, **changes)
    with pytest.raises(ValueError, match="target must"):
        pgd_l2(linear(weight), x, y[:-1], radius=1.0)


def attacked(x, y):
    weight = torch.linspace(-1, 1, 12).view(6, 2).to(x)
    return pgd_l2(linear(weight), x, y, radius=0.5, steps=3)


CASES = {
    "pgd_l2": Case(
        inputs=lambda g: (
            torch.randn(4, 1, 2, 3, generator=g),
            torch.randint(0, 2, (4,), generator=g),
        ),
        call=attacked,
    )
}
