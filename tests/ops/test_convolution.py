"""Tests of wellposed.ops.convolution; the spectra are tested with the method that uses them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.ops.convolution import (
    conv_matrix,
    responses,
    singular_values,
)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 4),
    c=st.integers(1, 3),
    k=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    size=st.integers(1, 4),
    power=st.integers(-100, 100),
)
def test_spectrum_is_that_of_the_matrix(m, c, k, stride, size, power):
    """Every shape and scale. Fails if even or odd sizes count a frequency twice."""
    size = max(size, -(-k // stride))
    g = torch.Generator().manual_seed(m + 7 * c)
    kernel = torch.randn(m, c, k, k, generator=g, dtype=torch.float64) * 10.0**power
    values = singular_values(kernel, size, stride)
    expected = torch.linalg.svdvals(conv_matrix(kernel, size, stride))
    assert len(values) == min(m, c * stride**2) * size**2
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12 * 10.0**power)


def test_zero_padding_is_a_part_of_a_larger_circle():
    """The largest singular value cannot grow; fails if zeros wrap around."""
    kernels = torch.randn(3, 2, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    circle, zeros = (responses(kernels, n, 1, p) for n, p in ((7, "circular"), (5, "zeros")))
    kept = torch.arange(49).view(7, 7)[1:6, 1:6].flatten()
    kept = torch.cat([kept, kept + 49])
    torch.testing.assert_close(zeros, circle[:, kept][:, :, kept])


def draw(*shape):
    return lambda g: (torch.randn(*shape, generator=g),)


CASES = {
    "conv_matrix": Case(inputs=draw(3, 2, 3, 3), call=lambda k: conv_matrix(k, 2, 2)),
    "singular_values": Case(inputs=draw(3, 2, 3, 3), call=lambda k: singular_values(k, 2, 2)),
}
