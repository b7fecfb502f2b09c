"""Tests of wellposed.methods.language_models.scaling_crossover."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from contract import Case
from wellposed.methods.language_models.scaling_crossover import (
    PowerLaw,
    find_crossovers,
    fit_power_law,
    power_law_crossover,
    proposal_learning_rate,
    regularization_gain,
    rescale_gradients_,
    tuned_gain,
)


def rescaled(g):
    """The gradient after clipping."""
    w = torch.zeros_like(g, requires_grad=True)
    w.grad = g.clone()
    return rescale_gradients_([w], 0.5), w.grad


CASES = {
    "proposal_learning_rate": Case(
        inputs=lambda g: (32,), call=proposal_learning_rate, keeps_dtype=False
    ),
    "find_crossovers": Case(
        inputs=lambda g: ([1.0, 2.0, 4.0], [3.0, 2.0, 1.0], [2.5, 2.1, 2.0]),
        call=find_crossovers,
        keeps_dtype=False,
        on_device=False,
    ),
    "fit_power_law": Case(
        inputs=lambda g: ([1.0, 2.0, 4.0, 8.0], [3.0, 2.1, 1.7, 1.5]),
        call=fit_power_law,
        keeps_dtype=False,
        on_device=False,
    ),
    "power_law_crossover": Case(
        inputs=lambda g: (1.0, 100.0),
        call=lambda a, b: power_law_crossover(PowerLaw(0, 4, 1), PowerLaw(0, 1, 0.5), a, b),
        keeps_dtype=False,
        on_device=False,
    ),
    "rescale_gradients_": Case(
        inputs=lambda g: (torch.randn(3, 2, generator=g),),
        call=rescaled,
    ),
    "tuned_gain": Case(
        inputs=lambda g: (torch.rand(2, 3, 2, generator=g), torch.rand(2, 3, 2, generator=g)),
        call=lambda valid, test: tuned_gain([0.0, 0.1, 1.0], valid, test),
        keeps_dtype=False,
    ),
    "regularization_gain": Case(
        inputs=lambda g: ([0.0, 1.0], [2.0, 1.0]),
        call=regularization_gain,
        keeps_dtype=False,
        on_device=False,
    ),
}


def test_the_two_rules_agree_at_the_reference_width():
    """Fails if the reference is ignored, or if the scaled rule rises with the width."""
    fixed = [proposal_learning_rate(w, 3.0, 64) for w in (16, 64, 256)]
    scaled = [proposal_learning_rate(w, 3.0) for w in (16, 64, 256)]
    assert fixed == [3 / 64] * 3
    assert scaled == [3 / 16, 3 / 64, 3 / 256]
    assert proposal_learning_rate(16, 1.0) == scaled[0] / 3


@pytest.mark.parametrize("arguments", [(0,), (4, 0.0), (4, math.inf), (4, 1.0, 0)])
def test_bad_rules(arguments):
    with pytest.raises(ValueError, match="must be"):
        proposal_learning_rate(*arguments)


def test_crossovers_of_power_laws_are_found_where_they_are():
    """Interpolation in logarithms is exact for pure power laws; fails with linear scales."""
    a, b = PowerLaw(0.0, 5.0, 0.7), PowerLaw(0.0, 2.0, 0.3)
    scales = np.geomspace(1, 1000, 7)
    expected = (5.0 / 2.0) ** (1 / 0.4)
    found = find_crossovers(scales, a(scales), b(scales))
    assert found.tolist() == pytest.approx([expected], rel=1e-12)
    assert power_law_crossover(a, b, 1, 1000) == pytest.approx(expected, rel=1e-9)
    swapped = find_crossovers(scales, b(scales), a(scales))
    assert swapped.tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        ([1, 1, 1], []),
        ([1, 0, 1], []),  # a touch
        ([1, 0, -1], [2.0]),  # a zero with different signs on both sides
        ([0, 1, -1], [math.sqrt(8)]),
        ([1, 0, 0, -1], [math.sqrt(8)]),
        ([1, -1, 1], [math.sqrt(2), math.sqrt(8)]),
        ([0, 0, 0], []),
    ],
)
def test_crossovers_on_the_grid(difference, expected):
    """Fails if a zero counts twice, or a touch counts once."""
    scales = 2.0 ** np.arange(len(difference))
    found = find_crossovers(scales, np.exp(difference), np.ones(len(difference)))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected)


@given(st.lists(st.sampled_from([-2.0, -1.0, 1.0, 3.0]), min_size=2, max_size=9))
def test_there_are_as_many_crossovers_as_sign_changes(difference):
    """Each lies between its neighbors on the grid, and they ascend."""
    scales = np.geomspace(1e-3, 1e6, len(difference))
    found = find_crossovers(scales, np.exp(difference), np.ones(len(difference))).numpy()
    changes = np.flatnonzero(np.diff(np.sign(difference)))
    assert len(found) == len(changes)
    assert (found >= scales[changes] * (1 - 1e-9)).all()
    assert (found <= scales[changes + 1] * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("scales", "a", "b", "message"),
    [
        ([2, 1], [1, 2], [1, 2], "sorted"),
        ([0, 1], [1, 2], [1, 2], "scales must be positive"),
        ([1, 2], [1, 2, 3], [1, 2], "losses_a must have 2"),
        ([1, 2], [1, math.nan], [1, 2], "losses_a must be positive and finite"),
        ([1, 2], [1, 2], [1, -2], "losses_b must be positive"),
        ([1], [1], [1], "at least 2"),
    ],
)
def test_bad_curves(scales, a, b, message):
    with pytest.raises(ValueError, match=message):
        find_crossovers(scales, a, b)


@given(
    st.floats(0.0, 3.0), st.floats(0.1, 20.0), st.floats(0.1, 1.5), st.sampled_from([0.01, 1, 50])
)
def test_a_power_law_is_recovered(floor, coefficient, exponent, unit):
    """Exact data give the law back; fails if the floor is searched on too coarse a grid."""
    law = PowerLaw(floor, coefficient, exponent)
    scales = unit * np.geomspace(1, 100, 6)
    found = fit_power_law(scales, law(scales))
    np.testing.assert_allclose(found(scales), law(scales), rtol=2e-3)
    given_floor = fit_power_law(scales, law(scales), floor)
    assert given_floor.exponent == pytest.approx(exponent, rel=1e-5)
    assert given_floor.coefficient == pytest.approx(coefficient, rel=1e-4)


def test_the_fit_is_no_worse_than_scipys():
    """On noisy data, the same sum of squares in logarithms as a general optimizer, or less."""
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 300, 9)
    losses = PowerLaw(1.5, 3.0, 0.6)(scales) * np.exp(0.01 * rng.standard_normal(9))

    def residual(floor, a, b):
        return ((np.log(losses - floor) - a + b * np.log(scales)) ** 2).sum()

    ours = fit_power_law(scales, losses)
    (floor, coefficient, exponent), _ = curve_fit(
        lambda s, e, a, b: e + a * s**-b, scales, losses, p0=(1.4, 3.0, 0.5)
    )
    theirs = residual(floor, math.log(coefficient), exponent)
    assert residual(ours.irreducible, math.log(ours.coefficient), ours.exponent) <= theirs + 1e-9
    assert ours.irreducible == pytest.approx(1.5, abs=0.1)


def test_bad_fits():
    with pytest.raises(ValueError, match="at least 3"):
        fit_power_law([1, 2], [2, 1])
    with pytest.raises(ValueError, match=r"irreducible must be in \[0, 1\)"):
        fit_power_law([1, 2], [2, 1], 1.0)


def test_no_crossing_no_root():
    law = PowerLaw(1.0, 2.0, 0.5)
    assert power_law_crossover(law, PowerLaw(1.1, 2.0, 0.5), 1, 1e9) is None
    assert power_law_crossover(law, PowerLaw(0.0, 3.0, 0.5), 1.0, 10.0) == 1.0  # equal at a bound
    with pytest.raises(ValueError, match="lower < upper"):
        power_law_crossover(law, law, 2.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clipping_agrees_with_torch(dtype):
    """Fails if the norm is taken tensor by tensor, or if small gradients are scaled up."""
    g = torch.Generator().manual_seed(0)
    for bound in (0.1, 100.0):
        ours = [torch.zeros(3, 2, dtype=dtype), torch.zeros(5, dtype=dtype), torch.zeros(1)]
        for p in ours[:2]:
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
        theirs = [p.clone() for p in ours]
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(theirs, bound)
        norm = rescale_gradients_(ours, bound)
        torch.testing.assert_close(norm, expected)
        for p, q in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=0
            )
            assert p.grad.dtype == dtype


def test_normalizing_gives_the_norm_and_keeps_zero():
    w = [torch.zeros(2, 3, dtype=torch.float64) for _ in range(2)]
    for p in w:
        p.grad = torch.full_like(p, 1e-6)
    rescale_gradients_(w, 2.0, "normalize")
    assert torch.cat([p.grad.flatten() for p in w]).norm().item() == pytest.approx(2.0)
    w[0].grad.zero_()
    w[1].grad = None
    assert rescale_gradients_(w, 2.0, mode="normalize").item() == 0.0
    assert not w[0].grad.any()


def test_stacked_networks_are_rescaled_each_for_itself():
    """Fails if one norm is taken over all networks."""
    g = torch.Generator().manual_seed(1)
    together = [torch.zeros(3, 2, 2), torch.zeros(3, 4)]
    for p in together:
        p.grad = torch.randn(p.shape, generator=g) * torch.tensor([0.01, 1.0, 100.0]).view(
            3, *[1] * (p.ndim - 1)
        )
    alone = [[p.grad[i].clone() for p in together] for i in range(3)]
    norms = rescale_gradients_(together, 1.0, stacked=True)
    for i, grads in enumerate(alone):
        single = [torch.zeros_like(x) for x in grads]
        for p, x in zip(single, grads, strict=True):
            p.grad = x
        torch.testing.assert_close(rescale_gradients_(single, 1.0), norms[i])
        for p, q in zip(single, together, strict=True):
            torch.testing.assert_close(p.grad, q.grad[i])


def test_bad_rescaling():
    w = torch.zeros(2)
    with pytest.raises(ValueError, match="at least one tensor with a gradient"):
        rescale_gradients_([w], 1.0)
    w.grad = torch.ones(2)
    with pytest.raises(ValueError, match="max_norm must be positive"):
        rescale_gradients_([w], 0.0)
    with pytest.raises(ValueError, match="mode must be"):
        rescale_gradients_([w], 1.0, "scale")


def test_gain():
    """Order does not matter; no gain where every penalty hurts."""
    assert regularization_gain([1.0, 0.0], [1.5, 2.0]) == 0.25
    assert regularization_gain([0.0, 1.0], [1.0, 2.0]) == 0.0
    for strengths, losses, message in [
        ([0.1, 1.0], [1, 2], "exactly one 0"),
        ([0.0, -1.0], [1, 2], "at least 0"),
        ([0.0], [1, 2], "shape"),
        ([0.0, 1.0], [1, math.nan], "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            regularization_gain(strengths, losses)


def test_tuned_gain_chooses_by_validation():
    """Fails if rate or strength is chosen on what is reported."""
    valid = torch.tensor([[[2.0, 3.0], [1.0, 4.0], [5.0, 5.0]]]).repeat(2, 1, 1)
    test = torch.tensor(
        [[[8.0, 1.0], [6.0, 1.0], [1.0, 1.0]], [[4.0, 1.0], [5.0, 1.0], [1.0, 1.0]]]
    )
    assert tuned_gain([0.0, 0.1, 1.0], valid, test) == [0.25, 0.0]
    assert tuned_gain([0.1, 0.0, 1.0], valid, test) == [0.0, 0.0]  # 0 is the chosen one
    with pytest.raises(ValueError, match=r"shape \(seeds, 2, rates\)"):
        tuned_gain([0.0, 0.1], valid, test)
