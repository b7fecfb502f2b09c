"""Quantizers and the noise that stands in for them, against loops and torch's fake quantization."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case, sizes
from wellposed.ops.quantize import (
    HWGQ_STEPS,
    check_bits,
    hwgq_quantize,
    hwgq_step,
    lsq_initial_step,
    lsq_quantize,
    minmax_quantize,
    mixed_noise,
    quantization_noise,
)

F64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_by_hand(bits, signed):
    """Entry by entry; fails if the lowest level is that of a symmetric quantizer."""
    x, s = draws(40) * 3, 0.21
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    expected = [s * round(min(max(v / s, low), high)) for v in x.tolist()]
    found = lsq_quantize(x, torch.tensor(s, dtype=F64), bits, signed)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_gradients_are_those_of_torch(bits):
    """torch's learnable fake quantization; fails without the scale 1/sqrt(Qp numel).

    Half a step beyond the outer levels torch passes the gradient, LSQ does not: no entry there.
    """
    x = draws(6, 5).float() * 2
    rest = (x / 0.3).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * 0.3 - x
    x = torch.where((rest != 0) & (rest.abs() < 0.16), torch.zeros(()), x).requires_grad_()
    step = torch.tensor([0.3], requires_grad=True)
    away = draws(6, 5, seed=1).float()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    factor = 1 / math.sqrt(high * x.numel())
    peer = torch._fake_quantize_learnable_per_tensor_affine(
        x, step, torch.zeros(1), low, high, factor
    )
    expected = torch.autograd.grad((peer * away).sum(), (x, step))
    ours = lsq_quantize(x, step, bits)
    found = torch.autograd.grad((ours * away).sum(), (x, step))
    torch.testing.assert_close(ours, peer)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_lsq_per_channel_is_torch_per_channel():
    x, step = draws(3, 8).float(), torch.tensor([[0.1], [0.3], [0.7]])
    peer = torch.fake_quantize_per_channel_affine(
        x, step.flatten(), torch.zeros(3, dtype=torch.int32), 0, -8, 7
    )
    torch.testing.assert_close(lsq_quantize(x, step, 4), peer)


def test_lsq_for_networks_side_by_side():
    """Bits as a tensor; fails if all networks get the levels of the first."""
    x, step = draws(2, 7), torch.tensor([[0.2], [0.05]], dtype=F64)
    both = lsq_quantize(x, step, torch.tensor([[2], [8]]), numel=7)
    for row, s, b, found in zip(x, step, (2, 8), both):
        torch.testing.assert_close(found, lsq_quantize(row, s, b))


def test_lsq_numel_scales_the_gradient():
    x, slopes = draws(10), []
    for numel in (10, 1000):
        step = torch.tensor(0.5, dtype=F64, requires_grad=True)
        lsq_quantize(x, step, 4, numel=numel).square().sum().backward()
        slopes.append(step.grad)
    torch.testing.assert_close(slopes[0], slopes[1] * 10)


@pytest.mark.parametrize("per_channel", [True, False])
def test_initial_step(per_channel):
    """Fails if the factor two is missing, or the channels are taken along another axis."""
    x = draws(3, 4, 2, 2)
    rows = [r.flatten().tolist() for r in x] if per_channel else [x.flatten().tolist()]
    expected = [2 * sum(map(abs, r)) / len(r) / math.sqrt(7) for r in rows]
    found = lsq_initial_step(x, 4, per_channel=per_channel)
    assert found.flatten().tolist() == pytest.approx(expected)
    assert found.shape == ((3, 1, 1, 1) if per_channel else ())
    unsigned = lsq_initial_step(x, 4, signed=False, per_channel=per_channel)
    torch.testing.assert_close(unsigned * math.sqrt(15 / 7), found)


def test_initial_step_of_zeros_is_positive():
    x = torch.zeros(3, 2)
    assert lsq_quantize(x, lsq_initial_step(x, 4), 4).tolist() == x.tolist()


@pytest.mark.parametrize("bits", sorted(HWGQ_STEPS))
def test_hwgq_by_hand(bits):
    """Fails if the clamp is one level too high."""
    x, s = draws(50) * 4, HWGQ_STEPS[bits]
    expected = [s * round(min(max(v, 0.0), s * (2**bits - 1)) / s) for v in x.tolist()]
    torch.testing.assert_close(hwgq_quantize(x, bits), torch.tensor(expected, dtype=F64))


def test_hwgq_side_by_side_and_its_gradient():
    """Fails if gradients pass where the input is clamped."""
    x = (draws(4, 2, 6) * 5).requires_grad_()
    both = hwgq_quantize(x, [2, 8], dim=1)
    torch.testing.assert_close(both[:, 0], hwgq_quantize(x[:, 0], 2))
    torch.testing.assert_close(both[:, 1], hwgq_quantize(x[:, 1], 8))
    both.sum().backward()
    tops = torch.tensor([3 * hwgq_step(2), 255 * hwgq_step(8)], dtype=F64).view(1, 2, 1)
    inside = (x.detach() > 0) & (x.detach() < tops)
    assert torch.equal(x.grad, inside.to(F64))


def test_minmax_has_the_levels_of_torch():
    """Fails if the range is divided by 2^b instead of 2^b - 1."""
    x = draws(60).float()
    step = (x.max() - x.min()) / 15
    index = ((x - x.min()) / step).round()
    assert int(index.max()) == 15
    torch.testing.assert_close(minmax_quantize(x, 4), index * step + x.min())
    rows = minmax_quantize(x.view(3, 20), 4, dim=(1,))
    torch.testing.assert_close(rows[1], minmax_quantize(x[20:40], 4))


@pytest.mark.parametrize(("kind", "variance"), [("gaussian", 1 / 4), ("uniform", 1 / 12)])
def test_noise_has_mean_zero_and_its_variance(kind, variance):
    """Fails if the gaussian has the variance of a rounding error."""
    x = torch.linspace(-1, 2, 40_000, dtype=F64)
    noise = quantization_noise(x, 3, kind, torch.Generator().manual_seed(0)) - x
    step = 3 / 7
    assert noise.mean().item() / step == pytest.approx(0, abs=0.01)
    assert noise.var().item() / step**2 == pytest.approx(variance, rel=0.03)
    assert kind == "gaussian" or noise.abs().max() <= step / 2


def test_noise_shrinks_with_bits_and_with_the_range_of_a_slice():
    x = torch.stack([torch.linspace(0, 1, 50), torch.linspace(0, 8, 50)]).double()
    g = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    noise = {b: quantization_noise(x, b, generator=g()) - x for b in (2, 4)}
    torch.testing.assert_close(noise[2] / 5, noise[4])
    rows = quantization_noise(x, 2, generator=g(), dim=(1,)) - x
    torch.testing.assert_close(rows[0] * 8, noise[2][0])
    torch.testing.assert_close(rows[1], noise[2][1])


def test_the_gradient_of_noise_is_the_identity():
    """Fails if the range is differentiated."""
    x = draws(12).requires_grad_()
    quantization_noise(x, 3, generator=torch.Generator().manual_seed(0)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_mixed_noise_adds_the_noises_of_the_same_generator():
    x, shares = draws(9), torch.tensor([0.3, 0.7], dtype=F64)
    width = x.max() - x.min()
    g = torch.Generator().manual_seed(4)
    parts = [quantization_noise(x, b, "uniform", g) - x for b in (2, 5)]
    g = torch.Generator().manual_seed(4)
    found = mixed_noise(x, shares, [2, 5], width, "uniform", g)
    torch.testing.assert_close(found, x + 0.3 * parts[0] + 0.7 * parts[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_dtypes_are_kept(dtype):
    x, g = draws(8).to(dtype), torch.Generator().manual_seed(0)
    assert quantization_noise(x, 4, generator=g).dtype == dtype
    assert minmax_quantize(x, 4).dtype == dtype
    assert hwgq_quantize(x, 4).dtype == dtype
    assert lsq_quantize(x, lsq_initial_step(x, 4), 4).dtype == dtype


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8),
    bits=st.integers(2, 16),
)
def test_any_values_give_finite_results_within_half_a_step(values, bits):
    x = torch.tensor(values, dtype=F64)
    step = (x.max() - x.min()) / (2**bits - 1)
    rounded = minmax_quantize(x, bits)
    assert (rounded - x).abs().max() <= step / 2 * (1 + 1e-6) + 1e-9
    noisy = quantization_noise(x, bits, "uniform", torch.Generator().manual_seed(0))
    assert noisy.isfinite().all()
    assert (noisy - x).abs().max() <= step / 2 * (1 + 1e-6) + 1e-9
    assert lsq_quantize(x, lsq_initial_step(x, bits), bits).isfinite().all()


def test_bad_input():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="kind must be 'gaussian' or 'uniform', got 'laplace'"):
        quantization_noise(x, 4, "laplace")
    for bits in (0, 33, 2.5, True):
        with pytest.raises(ValueError, match="bits must be a whole number from 1 to 32"):
            quantization_noise(x, bits)
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 32"):
        lsq_quantize(x, x[0], 1)
    with pytest.raises(ValueError, match="x must not be empty"):
        minmax_quantize(torch.ones(0), 4)
    with pytest.raises(ValueError, match="step must broadcast to x"):
        lsq_quantize(x, torch.ones(2), 4)
    with pytest.raises(ValueError, match="x must hold values"):
        lsq_initial_step(torch.ones(0), 4)
    with pytest.raises(ValueError, match="bits must be one of 1, 2, 3, 4, 8, got 5"):
        hwgq_quantize(x, 5)
    with pytest.raises(ValueError, match="bits must be one for each of 3 slices"):
        hwgq_quantize(x, [4, 8])
    with pytest.raises(ValueError, match="at least one"):
        check_bits([])


def test_a_step_of_zero_quantizes_to_nearly_zero():
    found = lsq_quantize(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(0.0), 4)
    torch.testing.assert_close(found, torch.zeros(3))


def _any(g):
    return (torch.randn(sizes(g, 2), generator=g),)


CASES = {
    "check_bits": Case(inputs=lambda g: ([4, 8],), call=check_bits),
    "quantization_noise": Case(
        inputs=_any,
        call=lambda x: quantization_noise(x, 4, generator=torch.Generator(x.device).manual_seed(0)),
        on_device=False,
    ),
    "mixed_noise": Case(
        inputs=lambda g: (*_any(g), torch.rand(2, generator=g), torch.rand((), generator=g)),
        call=lambda x, p, width: mixed_noise(
            x, p, [4, 8], width, generator=torch.Generator(x.device).manual_seed(0)
        ),
        on_device=False,
    ),
    "minmax_quantize": Case(inputs=_any, call=lambda x: minmax_quantize(x, 4)),
    "lsq_quantize": Case(
        inputs=lambda g: (*_any(g), torch.rand((), generator=g)),
        call=lambda x, step: (lsq_quantize(x, step, 4), lsq_quantize(x, step, 2, signed=False)),
    ),
    "lsq_initial_step": Case(
        inputs=_any, call=lambda x: (lsq_initial_step(x, 4), lsq_initial_step(x, 4, True, True))
    ),
    "hwgq_step": Case(inputs=lambda g: (), call=lambda: hwgq_step(4)),
    "hwgq_quantize": Case(
        inputs=lambda g: (torch.randn(2, *sizes(g, 2), generator=g),),
        call=lambda x: (hwgq_quantize(x, 4), hwgq_quantize(x, [2, 8])),
    ),
}
