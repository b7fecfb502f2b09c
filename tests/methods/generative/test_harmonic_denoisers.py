"""Tests of wellposed.methods.generative.harmonic_denoisers."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from contract import Case, sizes
from wellposed.data.shapes import calpha_images, disk_images
from wellposed.methods.generative import harmonic_denoisers as paper
from wellposed.nets.unet import BiasFreeUNet, StackedUNets
from wellposed.ops.posterior_means import wiener_mean
from wellposed.train import generator, seeded


def unet() -> BiasFreeUNet:
    with seeded(0):
        return BiasFreeUNet(3, 2)


def images(g: torch.Generator) -> Tensor:
    return torch.randn(sizes(g, 1)[0], 1, 4, 4, generator=g)


def half(y: Tensor) -> Tensor:
    return y / 2


def trained(x: Tensor) -> paper.Trained:
    with seeded(0):
        nets = StackedUNets([BiasFreeUNet(2, 2), BiasFreeUNet(2, 2)]).to(x)
    g = generator(1, x.device)
    result = paper.train_denoisers(
        nets, [x, x[:1]], generator=g, steps=2, batch_size=2, snapshots=[1]
    )
    return paper.Trained(result.losses, ())


CASES = {
    "BiasFreeUNet": Case(inputs=lambda g: (images(g),), call=lambda y: unet().to(y)(y).detach()),
    "train_denoisers": Case(inputs=lambda g: (images(g),), call=trained, on_device=False),
    "denoiser_jacobian": Case(
        inputs=lambda g: (images(g)[:1],),
        call=lambda y: paper.denoiser_jacobian(lambda v: v * v / 2, y),
    ),
    "adaptive_basis": Case(
        inputs=lambda g: (torch.randn(5, 5, generator=g),),
        call=lambda j: paper.adaptive_basis(j)[0],
    ),
    "jacobian_trace": Case(
        inputs=lambda g: (images(g),),
        call=lambda y: paper.jacobian_trace(half, y, probes=2, generator=generator(0, y.device)),
        on_device=False,
    ),
    "sure": Case(
        inputs=lambda g: (torch.randn(6, generator=g), torch.randn(6, generator=g)),
        call=lambda y, x: paper.sure(y, x, 2.0, 0.5),
    ),
    "step_schedule": Case(inputs=lambda g: (3,), call=paper.step_schedule),
    "stochastic_ascent": Case(
        inputs=lambda g: (images(g),),
        call=lambda y: paper.stochastic_ascent(
            half, y, h0=0.3, beta=0.5, max_steps=9, generator=generator(0, y.device)
        ),
        on_device=False,
    ),
    "image_correlation": Case(
        inputs=lambda g: (torch.randn(3, 5, generator=g), torch.randn(2, 5, generator=g)),
        call=paper.image_correlation,
    ),
    "energy_outside": Case(
        inputs=lambda g: (torch.randn(3, 4, generator=g), torch.eye(4).repeat(2, 1, 1)),
        call=lambda x, b: paper.energy_outside(x, b, 2),
    ),
    "calpha_images": Case(
        inputs=lambda g: (3, 8),
        call=lambda n, size: calpha_images(n, 2.0, size, generator(0)),
        keeps_dtype=False,
        on_device=False,
    ),
    "disk_images": Case(
        inputs=lambda g: (3, 8),
        call=lambda n, size: disk_images(n, size, generator(0)),
        keeps_dtype=False,
        on_device=False,
    ),
}


def test_jacobian_of_a_linear_map() -> None:
    """Row a is the gradient of output a; fails if the matrix is transposed (tried)."""
    matrix = torch.randn(12, 12, generator=generator(0), dtype=torch.float64)
    y = torch.randn(1, 1, 3, 4, generator=generator(1), dtype=torch.float64)
    found = paper.denoiser_jacobian(lambda v: (v.flatten(1) @ matrix.T).view_as(v), y)
    torch.testing.assert_close(found, matrix)


def test_jacobian_against_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image through a network, column by column, and the same in chunks."""
    net, y = unet().double(), torch.randn(1, 1, 4, 4, generator=generator(3)).double()
    found, step = paper.denoiser_jacobian(net, y), 1e-6
    for b in range(16):
        shift = torch.zeros(16, dtype=torch.float64)
        shift[b] = step
        shifted = [net(y + s * shift.view_as(y)).flatten() for s in (1, -1)]
        column = (shifted[0] - shifted[1]) / (2 * step)
        torch.testing.assert_close(found[:, b], column.detach(), atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(paper, "CHUNK", 5)
    torch.testing.assert_close(paper.denoiser_jacobian(net, y), found)
    assert all(p.grad is None for p in net.parameters())


def test_jacobian_is_taken_in_evaluation_mode() -> None:
    """Batch normalization couples images; fails if the mode is not switched (tried)."""
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Unflatten(1, (1, 2, 2))).train()
    found = paper.denoiser_jacobian(net, torch.randn(1, 1, 2, 2, generator=generator(0)))
    torch.testing.assert_close(found, torch.eye(4) / math.sqrt(1 + 1e-5))
    assert net.training


def test_output_is_jacobian_times_input() -> None:
    """Euler's theorem for a network without constants."""
    net, y = unet().double(), torch.randn(1, 1, 4, 4, generator=generator(4)).double()
    J = paper.denoiser_jacobian(net, y)
    torch.testing.assert_close(J @ y.flatten(), net(y).flatten().detach())


def test_basis_rebuilds_the_symmetric_part() -> None:
    """Descending eigenvalues, columns as vectors; fails if rows are taken (tried)."""
    J = torch.randn(3, 6, 6, generator=generator(0), dtype=torch.float64)
    values, vectors = paper.adaptive_basis(J)
    assert (values.diff() <= 0).all()
    rebuilt = (vectors * values[:, None, :]) @ vectors.mT
    torch.testing.assert_close(rebuilt, (J + J.mT) / 2)


def test_trace_is_unbiased() -> None:
    """Exact for a diagonal Jacobian, right on average for another."""
    g = generator(0)
    matrix = torch.randn(9, 9, generator=g, dtype=torch.float64)
    y = torch.randn(2, 1, 3, 3, generator=g, dtype=torch.float64)
    linear = lambda v: (v.flatten(1) @ matrix.T).view_as(v)  # noqa: E731
    found = paper.jacobian_trace(linear, y, probes=4000, generator=g)
    spread = ((matrix + matrix.T).square().sum() / 2 / 4000).sqrt().item()
    assert found.shape == (2,)
    torch.testing.assert_close(found, matrix.trace().expand(2), atol=5 * spread, rtol=0)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_sure_matches_the_true_error_on_average(sigma: float) -> None:
    """For a linear and a kinked denoiser; fails if the factor 2 is dropped (tried)."""
    g, n, d = generator(0), 4000, 10
    x = torch.randn(d, generator=g, dtype=torch.float64)
    y = x + sigma * torch.randn(n, d, generator=g, dtype=torch.float64)
    soft = y.sign() * (y.abs() - 0.5).clamp(min=0)
    for out, trace in ((0.7 * y, 0.7 * d * n), (soft, (y.abs() > 0.5).sum().double())):
        estimate = paper.sure(y, out, trace, sigma) / n
        parts = (y - out).square().sum(1) - (out - x).square().sum(1)
        noise = parts.std() / n**0.5
        assert abs(estimate - (out - x).square().sum(1).mean()) < 5 * noise + 1e-9


def test_sure_of_a_trained_network() -> None:
    """The estimate never sees the clean images, and agrees with the error to within a tenth."""
    g = generator(5)
    x = disk_images(300, 8, g)
    with seeded(0):
        nets = StackedUNets([BiasFreeUNet(6, 2)])
    paper.train_denoisers(nets, [x], generator=g, steps=60, batch_size=8, lr=0.01)
    net, y = nets.networks()[0], x + 0.2 * torch.randn(x.shape, generator=g)
    out = net(y).detach()
    trace = paper.jacobian_trace(net, y, probes=4, generator=g).sum()
    error = (out - x).square().sum()
    assert abs(paper.sure(y, out, trace, 0.2) - error) < 0.1 * error


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_schedule_leaves_the_promised_variance(t: int, h0: float, beta: float) -> None:
    r""":math:`(1-h)^2+g^2=(1-\beta h)^2`, with steps that grow toward 1."""
    h, g = paper.step_schedule(t, h0, beta)
    assert 0 < h <= 1 + 1e-12
    assert (1 - h) ** 2 + g**2 == pytest.approx((1 - beta * h) ** 2, abs=1e-9)
    assert paper.step_schedule(t + 1, h0, beta)[0] >= h - 1e-12


def test_sampler_against_a_plain_loop() -> None:
    """The recursion from its definition, image by image, with one noise level each."""
    y0 = (
        torch.randn(3, 1, 2, 2, generator=generator(0)).double()
        * torch.tensor([1, 2, 3])[:, None, None, None]
    )
    found = paper.stochastic_ascent(
        lambda v: 0.1 * v, y0, 0.2, 0.4, 0.2, 100, generator=generator(1)
    )
    g, y = generator(1), y0.clone()
    for t in range(1, 41):
        z = torch.randn(y.shape, generator=g, dtype=y.dtype)
        h = 0.2 * t / (1 + 0.2 * (t - 1))
        for i in range(3):
            f = 0.9 * y[i]
            s = f.norm() / 2
            if s > 0.2:
                gamma = s * math.sqrt((1 - 0.4 * h) ** 2 - (1 - h) ** 2)
                y[i] = y[i] - h * f + gamma * z[i]
    torch.testing.assert_close(found, 0.1 * y)


def test_sampler_of_a_gaussian_finds_its_directions() -> None:
    """With the exact denoiser of a Gaussian on a plane, samples lie in the plane.

    The blind denoiser knows the noise from what lies outside the plane. Variances along the axes
    come out in the right order and within a third; fails with the noise left out (tried, beta=1).
    """
    d, n = 64, 600
    q = torch.linalg.qr(torch.randn(d, d, generator=generator(0), dtype=torch.float64))[0]
    spread = torch.zeros(d, dtype=torch.float64)
    spread[:2] = torch.tensor([4.0, 1.0])

    def exact(v: Tensor) -> Tensor:
        c = v.flatten(1) @ q
        level = c[:, 2:].square().mean(1, keepdim=True)
        return (c * (spread / (spread + level)) @ q.T).view_as(v)

    g = generator(1)
    start = 3 * torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64)
    out = paper.stochastic_ascent(exact, start, 0.02, 0.02, 0.02, 2000, generator=g)
    c = out.flatten(1) @ q
    assert c[:, 2:].abs().max() < 1e-6
    found = c[:, :2].var(0)
    assert abs(found[0] / 4 - 1) < 0.35
    assert abs(found[1] - 1) < 0.35
    assert abs(torch.corrcoef(c[:, :2].T)[0, 1]) < 0.15
    fast = paper.stochastic_ascent(exact, start, 0.02, 1.0, 0.02, 2000, generator=g)
    assert not torch.allclose(fast, out)


def test_exact_denoiser_and_score() -> None:
    r"""Miyasawa: :math:`\hat x(y)=y+\sigma^2\nabla\log p_\sigma(y)` for a Gaussian."""
    g = generator(2)
    root = torch.randn(4, 4, generator=g, dtype=torch.float64)
    cov, mean = root @ root.T, torch.randn(4, generator=g, dtype=torch.float64)
    y = torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_()
    noisy = torch.distributions.MultivariateNormal(mean, cov + 0.49 * torch.eye(4))
    (score,) = torch.autograd.grad(noisy.log_prob(y).sum(), y)
    torch.testing.assert_close(
        wiener_mean(y.detach(), mean, cov, sigma=0.7), y.detach() + 0.49 * score
    )


def test_sampler_says_what_is_not_at_rest() -> None:
    y = torch.ones(2, 1, 2, 2)
    with pytest.warns(RuntimeWarning, match="2 of 2 images are not at rest"):
        paper.stochastic_ascent(lambda v: 0 * v, y, max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        still = paper.stochastic_ascent(lambda v: v, y, max_steps=2)
    torch.testing.assert_close(still, y)


def test_correlation_against_numpy() -> None:
    """And it ignores scale and mean of an image."""
    g = generator(0)
    a, b = (torch.randn(n, 1, 3, 3, generator=g, dtype=torch.float64) for n in (4, 5))
    both = torch.cat([a, b]).flatten(1)
    torch.testing.assert_close(paper.image_correlation(a, b), torch.corrcoef(both)[:4, 4:])
    torch.testing.assert_close(paper.image_correlation(3 * a + 7, b), paper.image_correlation(a, b))


def test_energy_outside_by_hand() -> None:
    """Pythagoras; nothing is left out by a whole basis."""
    g = generator(0)
    x = torch.randn(3, 1, 2, 2, generator=g, dtype=torch.float64)
    bases = torch.linalg.qr(torch.randn(2, 4, 4, generator=g, dtype=torch.float64))[0]
    found = paper.energy_outside(x, bases, 2)
    for m in range(2):
        for n in range(3):
            v = x[n].flatten()
            rest = v - sum(bases[m][:, k] * (v @ bases[m][:, k]) for k in range(2))
            assert found[m, n].item() == pytest.approx((rest @ rest / (v @ v)).item())
    assert paper.energy_outside(x, bases, 4).max() < 1e-12


def test_training_side_by_side_lowers_the_error() -> None:
    """A network with one image learns to return it; losses fall."""
    g = generator(0)
    x = disk_images(40, 8, g)
    with seeded(1):
        nets = StackedUNets([BiasFreeUNet(4, 2) for _ in range(2)])
    before = [
        net(x + 0.3 * torch.randn(x.shape, generator=generator(9))) for net in nets.networks()
    ]
    out = paper.train_denoisers(
        nets, [x, x[:1]], generator=g, steps=80, batch_size=4, lr=0.02, snapshots=[40, 80]
    )
    assert out.losses.shape == (2, 80)
    assert (out.losses[:, -20:].mean(1) < 0.6 * out.losses[:, :20].mean(1)).all()
    after = [net(x + 0.3 * torch.randn(x.shape, generator=generator(9))) for net in nets.networks()]
    for old, new in zip(before, after):
        assert (new[:1] - x[:1]).square().sum() < (old[:1] - x[:1]).square().sum()
    last = out.snapshots[1].networks()[0]
    torch.testing.assert_close(last(x), nets.networks()[0](x))
    assert not torch.allclose(out.snapshots[0].networks()[0](x), last(x))


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.02},
        {"batch_size": 3},
        {"sigma_max": 0.5},
        {"noise_power": 1.0},
        {"loss_power": 1.0},
        {"steps": 4},
    ],
)
def test_every_setting_of_the_training_matters(change: dict[str, float]) -> None:
    results = []
    for extra in ({}, change):
        with seeded(0):
            nets = StackedUNets([BiasFreeUNet(2, 2)])
        settings_ = {"steps": 3, "batch_size": 2, "lr": 0.01} | extra
        x = disk_images(5, 8, generator(3))
        paper.train_denoisers(nets, [x], generator=generator(4), **settings_)  # type: ignore[arg-type]
        results.append(nets(x[None]))
    assert not torch.allclose(results[0], results[1])


def test_every_setting_of_the_sampler_matters() -> None:
    y = torch.randn(2, 1, 2, 2, generator=generator(0))
    base = {"h0": 0.2, "beta": 0.3, "sigma_end": 0.05, "max_steps": 60}
    draws = [
        paper.stochastic_ascent(half, y, **(base | extra), generator=generator(1))  # type: ignore[arg-type]
        for extra in ({}, {"h0": 0.3}, {"beta": 0.4}, {"sigma_end": 0.2})
    ]
    for other in draws[1:]:
        assert not torch.allclose(draws[0], other)


def test_bad_input() -> None:
    y = torch.ones(1, 1, 4, 4)
    net = StackedUNets([BiasFreeUNet(2, 2)])
    g = generator(0)
    with pytest.raises(ValueError, match="y must be one image"):
        paper.denoiser_jacobian(half, y.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="images"):
        paper.jacobian_trace(half, y[0], probes=1, generator=g)
    with pytest.raises(ValueError, match="probes"):
        paper.jacobian_trace(half, y, probes=0, generator=g)
    with pytest.raises(ValueError, match="square"):
        paper.adaptive_basis(torch.ones(2, 3))
    with pytest.raises(ValueError, match="finite"):
        paper.adaptive_basis(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="shape"):
        paper.sure(y, y[0], 1.0, 1.0)
    with pytest.raises(ValueError, match="sigma"):
        paper.sure(y, y, 1.0, -1.0)
    with pytest.raises(ValueError, match="beta"):
        paper.step_schedule(1, beta=0.0)
    with pytest.raises(ValueError, match="sigma_end"):
        paper.stochastic_ascent(half, y, sigma_end=0.0)
    with pytest.raises(ValueError, match="one size"):
        paper.image_correlation(y, y[..., :2])
    with pytest.raises(ValueError, match="keep"):
        paper.energy_outside(y, torch.eye(16)[None], 17)
    with pytest.raises(ValueError, match="bases"):
        paper.energy_outside(y, torch.eye(16), 1)
    for change in ({"steps": 0}, {"sigma_max": 0.0}, {"snapshots": [9]}, {"loss_power": -1.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            paper.train_denoisers(net, [y], generator=g, **({"steps": 2} | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 sets"):
        paper.train_denoisers(net, [y, y], generator=g, steps=2)
