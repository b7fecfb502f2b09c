"""Orthogonal convolutions: regularizer, existence, spectra, descent."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from contract import Case
from wellposed.methods.regularizers import orthogonal_convolution as oc
from wellposed.train import generator

CONFIGURATIONS = [
    (3, 4, 3, 1),  # RO
    (5, 2, 3, 1),  # CO
    (3, 3, 3, 1),  # square
    (2, 3, 5, 1),
    (5, 2, 3, 2),
    (9, 2, 3, 2),
    (8, 2, 5, 2),
    (4, 1, 5, 3),
    (11, 1, 3, 3),
    (10, 1, 3, 4),  # no orthogonal layer
]
"""Out, in, kernel size, stride."""


def random_kernel(m, c, k, seed=0, dtype=torch.float64):
    return torch.randn(m, c, k, k, generator=generator(seed), dtype=dtype) / (c * k * k) ** 0.5


def matrix_by_loops(kernel, size, stride):
    """The layer's matrix from the definition, entry by entry."""
    m, c, k, _ = kernel.shape
    side, half = size * stride, k // 2
    matrix = torch.zeros(m * size**2, c * side**2, dtype=kernel.dtype)
    for o, i, u, v in itertools.product(range(m), range(c), range(size), range(size)):
        for a, b in itertools.product(range(k), range(k)):
            row, column = (u * stride + a - half) % side, (v * stride + b - half) % side
            matrix[(o * size + u) * size + v, (i * side + row) * side + column] += kernel[
                o, i, a, b
            ]
    return matrix


def residual_of(matrix):
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return gram - torch.eye(len(gram), dtype=gram.dtype)


def smallest_size(k, stride):
    return -(-(2 * k - 1) // stride)


# --- matrices and spectra ------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_matrix_and_singular_values_against_loops(config):
    """Fails if the padding is off by one, frequencies are grouped wrongly, or 1 / S is dropped."""
    m, c, k, s = config
    kernel = random_kernel(m, c, k)
    for size in (-(-k // s), 4, 5):
        if size * s < k:
            continue
        matrix = matrix_by_loops(kernel, size, s)
        torch.testing.assert_close(oc.conv_matrix(kernel, size, s), matrix)
        values = oc.singular_values(kernel, size, s)
        torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=1e-10, atol=1e-9)
        for norm, order in (("fro", "fro"), ("spectral", 2)):
            expected = torch.linalg.matrix_norm(residual_of(matrix), order)
            torch.testing.assert_close(oc.orthogonality_residual(kernel, size, s, norm), expected)


@pytest.mark.parametrize("padding_mode", ["circular", "zeros", "valid"])
def test_matrix_computes_what_torch_computes(padding_mode):
    """Fails if rows and columns, or channels and pixels, are confused."""
    kernel = random_kernel(3, 2, 3)
    mode = "circular" if padding_mode == "circular" else "zeros"
    layer = nn.Conv2d(2, 3, 3, 2, int(padding_mode != "valid"), bias=False, padding_mode=mode)
    layer.weight.data = kernel
    side = 4 * 2 if padding_mode != "valid" else 3 * 2 + 3
    image = torch.randn(1, 2, side, side, generator=generator(1), dtype=torch.float64)
    out = oc.conv_matrix(kernel, 4, 2, padding_mode=padding_mode) @ image.flatten()
    torch.testing.assert_close(out, layer(image).flatten().detach())


# --- the regularizer ---------------------------------------------------------------------------


def lorth_by_loops(kernel, stride):
    m, c, k, _ = kernel.shape
    reach = (k - 1) // stride
    total = 0.0
    for i, j in itertools.product(range(m), range(m)):
        for p, q in itertools.product(range(-reach, reach + 1), repeat=2):
            inner = 0.0
            for channel, a, b in itertools.product(range(c), range(k), range(k)):
                a2, b2 = a + p * stride, b + q * stride
                if 0 <= a2 < k and 0 <= b2 < k:
                    inner += float(kernel[i, channel, a, b] * kernel[j, channel, a2, b2])
            total += (inner - float(i == j and p == q == 0)) ** 2
    return total - max(0, m - c * stride**2)


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_lorth_against_loops_and_the_theorem(config):
    """Fails with padding k - 1, without the constant, or with zero padding of the image."""
    m, c, k, s = config
    kernel = random_kernel(m, c, k, seed=1)
    value = oc.lorth(kernel, s)
    assert value.item() == pytest.approx(lorth_by_loops(kernel, s), rel=1e-12)
    for size in (smallest_size(k, s), smallest_size(k, s) + 1):
        residual = residual_of(matrix_by_loops(kernel, size, s))
        torch.testing.assert_close(residual.square().sum(), size**2 * value, rtol=1e-11, atol=0)
    stack = torch.stack([kernel, 2 * kernel, kernel.flip(0)])
    expected = torch.stack([oc.lorth(one, s) for one in stack])
    torch.testing.assert_close(oc.lorth_each(stack, s), expected)


def test_below_the_theorem_the_wrap_counts():
    """The theorem needs 2k - 1 pixels. Fails if the residual is computed from L_orth."""
    kernel = random_kernel(3, 4, 3, seed=2)
    residual = oc.orthogonality_residual(kernel, 4) ** 2
    assert abs(residual / (16 * oc.lorth(kernel)) - 1) > 1e-3


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_spectral_bound_and_a_tighter_one(config):
    """Fails if the two factors are exchanged; the one without channels is proved in exercise 4."""
    m, c, k, s = config
    alpha = oc.spectral_bound_factor(*config)
    rows, columns = (2 * ((k - 1) // s) + 1) ** 2, (2 * k - 1) ** 2
    if m < c * s * s:
        assert alpha == m * rows
        tight = rows
    elif m > c * s * s:
        assert alpha == c * columns
        tight = columns
    else:
        assert alpha == min(m * rows, c * columns)
        tight = rows
    for seed in range(3):
        kernel = random_kernel(m, c, k, seed=seed) * (0.5 + seed)
        err = oc.orthogonality_residual(kernel, smallest_size(k, s), s, norm="spectral")
        assert err**2 <= tight * oc.lorth(kernel, s) * (1 + 1e-9)
        assert tight <= alpha


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_gradient(stride):
    """Also of the mean of two kernels. Fails if a part of the graph is cut."""
    kernels = torch.stack([random_kernel(3, 2, 3, seed=s) for s in (3, 4)]).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: oc.lorth_each(k, stride), kernels)
    assert torch.autograd.gradcheck(lambda k: oc.lorth(k[0], stride), kernels)


def test_what_leaves_the_regularizer_alone():
    """Orthogonal changes of output and of input channels, and flips; a scale does not."""
    kernel, value = random_kernel(5, 3, 3), oc.lorth(random_kernel(5, 3, 3))
    out, into = (torch.linalg.qr(random_kernel(n, n, 1)[:, :, 0, 0]).Q for n in (5, 3))
    torch.testing.assert_close(oc.lorth(torch.einsum("om,mcab->ocab", out, kernel)), value)
    torch.testing.assert_close(oc.lorth(torch.einsum("ic,mcab->miab", into, kernel)), value)
    torch.testing.assert_close(oc.lorth(kernel.flip(2)), value)
    assert (oc.lorth(1.1 * kernel) - value).abs() > 0.01
    assert (oc.lorth(kernel, 2) - value).abs() > 0.01


def test_regularizer_of_a_network():
    """Fails if strides are ignored, skipped layers count, or the weight is applied twice."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 2),
        nn.Conv2d(4, 4, (3, 1)),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, (1, 2)),
        nn.Linear(4, 4),
        nn.Conv2d(4, 3, 5),
    )
    expected = oc.lorth(net[0].weight, 2) + oc.lorth(net[7].weight)
    torch.testing.assert_close(oc.LOrthRegularizer(net, weight=3.0)(), 3 * expected)
    oc.LOrthRegularizer(net)().backward()
    assert net[0].weight.grad.abs().sum() > 0
    assert net[1].weight.grad is None


# --- existence ---------------------------------------------------------------------------


SHAPES = list(itertools.product([1, 2, 5, 9, 10, 19, 33], [1, 2], [1, 3, 5], [1, 2, 3, 4, 6]))


def test_existence_by_construction():
    """The constructed kernel is orthogonal exactly where the theorem says so.

    Fails if CO asks for M <= C k² too, taps of one residue collide, or the bound drops a term.
    """
    seen = set()
    for m, c, k, s in SHAPES:
        kernel = oc.optimal_kernel(m, c, k, s, generator=generator(m))
        value, exists = oc.lorth(kernel, s).item(), oc.orthogonal_exists(m, c, k, s)
        assert value == pytest.approx(oc.lorth_minimum(m, c, k, s), abs=1e-9)
        assert exists == (value < 1e-9)
        if exists:
            values = oc.singular_values(kernel, smallest_size(k, s), s)
            torch.testing.assert_close(values, torch.ones_like(values))
        seen.add((exists, m <= c * s * s))
    assert len(seen) == 4


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 99), st.floats(0, 3))
def test_no_kernel_is_below_the_minimum(shape, seed, scale):
    """Random kernels and perturbed optimal ones. Fails if the bound is too high."""
    m, c, k, s = shape
    best = oc.optimal_kernel(m, c, k, s, generator=generator(seed))
    least = oc.lorth_minimum(m, c, k, s)
    for kernel in (
        scale * random_kernel(m, c, k, seed),
        best + 0.01 * random_kernel(m, c, k, seed),
    ):
        assert oc.lorth(kernel, s) >= least - 1e-9


def test_optimal_kernel_spreads_its_taps():
    """Fails if only the first tap of a residue is ever taken, or nothing is rotated."""
    kernel = oc.optimal_kernel(4, 8, 5, generator=generator(0))
    assert ((kernel.abs() > 1e-6).sum((0, 1)) > 0).sum() >= 3
    assert (kernel.abs() > 1e-6).sum((1, 2, 3)).min() > 1
    assert not torch.equal(kernel, oc.optimal_kernel(4, 8, 5, generator=generator(1)))


# --- other paddings ---------------------------------------------------------------------------


def test_zero_padding_allows_only_the_center():
    """The share off the center is at most four times the residual; circular has no such limit.

    Fails if "zeros" pads circularly.
    """
    for m, c in ((2, 4), (6, 2)):
        start = torch.stack([random_kernel(m, c, 3, seed=s) for s in range(2)])
        for mode, steps in (("zeros", 150), ("circular", 150)):
            done = oc.minimize_residual(start, 5, padding_mode=mode, steps=steps, lr=0.03)
            for kernel in done.kernels:
                residual = residual_of(oc.conv_matrix(kernel, 5, padding_mode=mode))
                err = torch.linalg.matrix_norm(residual, 2)
                energy = kernel.square().sum(int(m <= c))
                off = energy.sum((1, 2)) - energy[:, 1, 1]
                assert (mode == "zeros") == bool((off <= 4 * err).all())
                assert err < 0.2


def test_valid_padding_has_no_column_orthogonal_layer():
    """The residual stays above 3/5, whatever the kernel. Fails if "valid" pads at all."""
    start = torch.stack([random_kernel(6, 2, 3, seed=s) for s in range(2)])
    done = oc.minimize_residual(start, 5, padding_mode="valid", steps=150, lr=0.03)
    for kernel in done.kernels:
        residual = residual_of(oc.conv_matrix(kernel, 5, padding_mode="valid"))
        assert torch.linalg.matrix_norm(residual, 2) >= 0.6 - 1e-9


# --- descent ---------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_minimize_against_plain_adam(stride):
    """The hand-written gradient is autograd's. Fails if its factor or its sign changes."""
    start = torch.stack([random_kernel(5, 2, 3, seed=s) for s in (5, 6)])
    found = oc.minimize_lorth(start, stride, steps=20, lr=0.02)
    kernel = start[1].clone().requires_grad_()
    adam = torch.optim.Adam([kernel], lr=0.02)
    for step in range(20):
        value = oc.lorth(kernel, stride)
        torch.testing.assert_close(found.history[step, 1], value.detach())
        adam.zero_grad()
        value.backward()
        adam.step()
    torch.testing.assert_close(found.kernels[1], kernel.detach())
    torch.testing.assert_close(found.values[1], oc.lorth(kernel.detach(), stride))
    assert not found.reached.any()
    assert torch.equal(start[0], random_kernel(5, 2, 3, seed=5))


def test_minimize_residual_is_the_same_descent_for_circular_padding():
    """err_F² = N² L_orth, and Adam does not see a factor. Fails with another padding."""
    start = random_kernel(3, 4, 3)[None]
    one = oc.minimize_lorth(start, steps=30, lr=0.02)
    two = oc.minimize_residual(start, 5, padding_mode="circular", steps=30, lr=0.02)
    torch.testing.assert_close(two.history, 25 * one.history, rtol=1e-5, atol=1e-8)
    for mode in ("zeros", "valid"):
        other = oc.minimize_residual(start, 5, padding_mode=mode, steps=30, lr=0.02)
        assert (other.values - two.values).abs() > 1e-3
    slow = oc.minimize_residual(start, 5, padding_mode="circular", steps=30, lr=0.01)
    assert slow.values > two.values


def test_targets():
    """Each kernel is returned as it was when it met the target. Fails if the last one is kept."""
    start = torch.stack([random_kernel(4, 8, 3, seed=s) for s in (7, 8)]) * 0.5
    for level in (0.5, 0.05):
        found = oc.minimize_lorth(start, steps=800, target=level)
        assert found.reached.all()
        assert len(found.history) < 801
        torch.testing.assert_close(oc.lorth_each(found.kernels), found.values)
        first = [int((h <= level).nonzero()[0]) for h in found.history.T]
        expected = torch.stack([found.history[t, i] for i, t in enumerate(first)])
        torch.testing.assert_close(found.values, expected)
    missed = oc.minimize_lorth(start, steps=3, target=1e-6)
    assert not missed.reached.any()
    torch.testing.assert_close(missed.values, missed.history[-1])


# --- bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: oc.lorth(torch.zeros(2, 3, 3)), "kernel must have shape"),
        (lambda: oc.lorth(torch.zeros(2, 2, 3, 5)), "kernel must have shape"),
        (lambda: oc.lorth(torch.zeros(2, 2, 4, 4)), "kernel_size must be odd"),
        (lambda: oc.lorth(torch.zeros(2, 2, 3, 3), 0), "stride must be at least 1"),
        (lambda: oc.lorth(torch.zeros(2, 2, 3, 3).long()), "floating-point"),
        (lambda: oc.lorth_each(torch.zeros(2, 2, 3, 3)), "kernels must have shape"),
        (lambda: oc.conv_matrix(torch.zeros(1, 1, 5, 5), 2, 2), "size \\* stride"),
        (lambda: oc.conv_matrix(torch.zeros(1, 1, 3, 3), 4, padding_mode="same"), "padding_mode"),
        (lambda: oc.singular_values(torch.zeros(1, 1, 3, 3), 2), "size \\* stride"),
        (lambda: oc.orthogonality_residual(torch.zeros(1, 1, 3, 3), 4, norm="max"), "norm must"),
        (lambda: oc.orthogonal_exists(0, 1, 3), "out_channels and in_channels"),
        (lambda: oc.lorth_minimum(1, 1, 2), "kernel_size must be odd"),
        (lambda: oc.spectral_bound_factor(1, 1, 3, 0), "stride must be"),
        (lambda: oc.LOrthRegularizer(nn.Conv2d(1, 1, 2)), "module must hold"),
        (lambda: oc.LOrthRegularizer(nn.Conv2d(1, 1, 3), weight=-1.0), "weight must"),
        (lambda: oc.minimize_lorth(torch.zeros(1, 1, 1, 3, 3), steps=0), "steps must"),
        (lambda: oc.minimize_lorth(torch.zeros(1, 1, 1, 3, 3), lr=0.0), "lr must"),
        (lambda: oc.minimize_lorth(torch.full((1, 1, 1, 3, 3), 1e15)), "too large"),
        (lambda: oc.minimize_lorth(torch.full((1, 1, 1, 3, 3), float("nan"))), "must be finite"),
        (
            lambda: oc.minimize_residual(torch.zeros(1, 1, 1, 3, 3), 4, padding_mode="same"),
            "padding_mode",
        ),
        (
            lambda: oc.optimal_kernel(1, 1, 4, generator=torch.Generator()),
            "kernel_size must be odd",
        ),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def draw(*shape):
    return lambda g: (torch.randn(*shape, generator=g) * 0.3,)


def minimized(kernels):
    return oc.minimize_residual(kernels, 5, padding_mode="zeros", steps=3)


def regularized(kernel):
    layer = nn.Conv2d(2, 3, 3, 2, bias=False).to(kernel)
    layer.weight = nn.Parameter(kernel.clone())
    return oc.LOrthRegularizer(layer, weight=0.1)()


CASES = {
    "LOrthRegularizer": Case(inputs=draw(3, 2, 3, 3), call=regularized),
    "conv_matrix": Case(inputs=draw(3, 2, 3, 3), call=lambda k: oc.conv_matrix(k, 2, 2)),
    "lorth": Case(inputs=draw(3, 2, 3, 3), call=oc.lorth),
    "lorth_each": Case(inputs=draw(2, 3, 2, 3, 3), call=lambda k: oc.lorth_each(k, 2)),
    "lorth_minimum": Case(inputs=lambda _: (), call=lambda: oc.lorth_minimum(10, 1, 3, 4)),
    "minimize_lorth": Case(
        inputs=draw(2, 3, 2, 3, 3), call=lambda k: oc.minimize_lorth(k, steps=5)
    ),
    "minimize_residual": Case(inputs=draw(2, 3, 2, 3, 3), call=minimized),
    "optimal_kernel": Case(
        inputs=lambda _: (),
        call=lambda: oc.optimal_kernel(9, 2, 3, 2, generator=generator(0)),
        keeps_dtype=False,
    ),
    "orthogonal_exists": Case(inputs=lambda _: (), call=lambda: oc.orthogonal_exists(9, 1, 3, 4)),
    "orthogonality_residual": Case(
        inputs=draw(3, 2, 3, 3),
        call=lambda k: [oc.orthogonality_residual(k, 4, 2, n) for n in ("fro", "spectral")],
    ),
    "singular_values": Case(inputs=draw(3, 2, 3, 3), call=lambda k: oc.singular_values(k, 4, 2)),
    "spectral_bound_factor": Case(
        inputs=lambda _: (), call=lambda: oc.spectral_bound_factor(9, 1, 3, 4)
    ),
}
