"""Simulated objects, and the competitors: bottleneck regression and kernel eigenproblems."""

import math

import pytest
import torch
from scipy.linalg import eigh
from torch import nn

from contract import Case
from wellposed.methods.structured_data.frechet_objects import (
    MODELS,
    landmark_features,
    linear_sdr,
    rotated_images,
    simulate_objects,
    train_bottlenecks,
)
from wellposed.nets import MLP
from wellposed.ops.metric_spaces import distance_correlation
from wellposed.train import seeded


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


@pytest.mark.parametrize("model", MODELS)
def test_samples_are_what_they_say(model):
    """Coordinates embed the metric; outliers are as many as asked, far away, and change no x."""
    clean = simulate_objects(model, 200, generator=gen(3))
    spoiled = simulate_objects(model, 200, generator=gen(3), outliers=0.1)
    embedded = torch.cdist(clean.coordinates.double(), clean.coordinates.double())
    torch.testing.assert_close(embedded.float(), clean.distances, rtol=1e-4, atol=1e-3)
    assert not clean.spoiled.any()
    assert int(spoiled.spoiled.sum()) == 20
    assert torch.equal(clean.x, spoiled.x)
    assert torch.equal(clean.truth, spoiled.truth)
    moved = (clean.coordinates - spoiled.coordinates).norm(dim=1)
    assert moved[~spoiled.spoiled].max() < 1e-4
    assert moved[spoiled.spoiled].median() > 20
    larger = simulate_objects(model, 200, generator=gen(3), outliers=0.1, outlier_scale=500.0)
    assert (larger.coordinates - clean.coordinates).norm() > 5 * moved.norm()
    assert simulate_objects(model, 9, generator=gen(), num_predictors=4).x.shape == (9, 4)


def test_truth_carries_the_response():
    """The true predictor is strongly related to the response, a further coordinate of x is not."""
    for model in MODELS:
        sample = simulate_objects(model, 400, generator=gen(5))
        assert distance_correlation(sample.truth, sample.coordinates) > 0.7
        assert distance_correlation(sample.x[:, 5:6], sample.coordinates) < 0.2


def test_rotation_by_right_angles_is_exact():
    """Quarter turns agree with ``torch.rot90``; fails if the sense of rotation flips."""
    images = torch.rand(3, 2, 8, 8, generator=gen())
    for quarter in range(4):
        angles = torch.full((3,), quarter * math.pi / 2)
        torch.testing.assert_close(
            rotated_images(images, angles), torch.rot90(images, quarter, (2, 3)), atol=1e-5, rtol=0
        )


def test_linear_sdr_against_scipy():
    """The generalized eigenproblem solved by scipy, up to signs; batches work.

    Fails if the smallest eigenvalues are taken, or without the ridge.
    """
    x, z = randn(2, 40, 4), randn(2, 40, 3, seed=1)
    kernel = z @ z.mT
    found = linear_sdr(x, kernel, num_directions=2, ridge=0.1)
    for i in range(2):
        u = x[i] - x[i].mean(0)
        cov = u.T @ u / 40
        right = cov + 0.1 * cov.trace() / 4 * torch.eye(4)
        _, vectors = eigh((u.T @ kernel[i] @ u / 1600).numpy(), right.numpy())
        expected = torch.tensor(vectors[:, ::-1][:, :2].copy())
        torch.testing.assert_close(found[i].abs(), expected.abs())
    torch.testing.assert_close(found[0], linear_sdr(x[0], kernel[0], num_directions=2, ridge=0.1))
    assert not torch.allclose(found[0], linear_sdr(x[0], kernel[0], num_directions=2))


def test_landmark_features_by_hand():
    """Entry by entry; the width is the median distance of landmarks."""
    x, z = randn(4, 2), randn(5, 2, seed=1)
    gaps = torch.cdist(z, z).flatten().sort().values
    width = gaps[(len(gaps) - 1) // 2]
    found = landmark_features(x, z)
    for i in range(4):
        for j in range(5):
            expected = math.exp(-float((x[i] - z[j]).square().sum()) / (2 * float(width) ** 2))
            assert found[i, j].item() == pytest.approx(expected)


def test_huber_withstands_what_squares_do_not():
    """With a tenth of the targets at Cauchy distances only the Huber loss finds the predictor."""
    sample = simulate_objects("number", 300, generator=gen(1), outliers=0.1)
    options = {"seeds": [0], "num_epochs": 30, "batch_size": 50, "hidden": (32,)}
    scores = {}
    for huber in (1.0, math.inf):
        nets = train_bottlenecks(sample.x[None], sample.coordinates[None], huber=huber, **options)
        scores[huber] = distance_correlation(nets(sample.x[None])[0].detach(), sample.truth)
    assert scores[1.0] > scores[math.inf] + 0.2


def test_bottleneck_is_regression():
    """Without a hidden layer and with d = q = 1 it is linear regression: least squares' direction.

    Fails if targets are not those of the rows drawn.
    """
    x = randn(64, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]).double() + 0.1 * randn(64, 1, seed=2)
    nets = train_bottlenecks(
        x[None], y[None], seeds=[0], hidden=(), num_epochs=2000, batch_size=64, lr=1e-2
    )
    centered = x - x.mean(0)
    expected = torch.linalg.lstsq(centered, y - y.mean(0)).solution[:, 0]
    weight = nets.networks()[0].get_parameter("1.weight")[0]
    cosine = nn.functional.cosine_similarity(weight, expected, dim=0)
    assert abs(cosine.item()) > 0.9999


def test_bottleneck_against_torchs_adam_and_huber_loss():
    """Full batches, so that the order is no matter; fails if residuals are clipped elsewhere."""
    x = randn(40, 2)
    y = x[:, :1] - 100.0 * x[:, :1] * (torch.arange(40) % 8 == 0)[:, None]  # some are far off
    with seeded(0):
        network = MLP((2, 1)).double()
    with seeded(0):
        head = MLP((1, 1)).double()
    target = y - y.median()
    target = target / target.abs().median()
    parameters = [*network.parameters(), *head.parameters()]
    adam = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(8):
        adam.zero_grad()
        nn.functional.huber_loss(head(network(x)), target, delta=0.5).backward()
        adam.step()
    nets = train_bottlenecks(
        x[None], y[None], seeds=[0], hidden=(), huber=0.5, num_epochs=8, batch_size=40, lr=0.02
    )
    for slow, fast in zip(network.parameters(), nets.parameters()):
        torch.testing.assert_close(fast[0], slow)


def test_options_of_the_bottleneck_change_the_result():
    """Every option matters, and shapes follow the number of features."""
    x, y = randn(1, 30, 2), randn(1, 30, 3, seed=1)
    plain = {"seeds": [0], "num_epochs": 2, "batch_size": 10, "hidden": (8,)}

    def run(**options):
        return train_bottlenecks(x, y, **(plain | options))(x).detach()

    base = run()
    assert torch.equal(base, run())
    for change in (
        {"seeds": [1]}, {"num_epochs": 3}, {"batch_size": 15}, {"hidden": (4,)}, {"lr": 1e-2},
        {"huber": 0.1},
    ):  # fmt: skip
        assert not torch.equal(base, run(**change)), change
    assert run(num_features=2).shape == (1, 30, 2)
    pair = train_bottlenecks(
        x.expand(2, -1, -1),
        y.expand(2, -1, -1),
        **(plain | {"seeds": [0, 0]}),
        huber=[0.1, math.inf],
    )
    both = pair(x.expand(2, -1, -1)).detach()
    torch.testing.assert_close(both[:1], run(huber=0.1))
    torch.testing.assert_close(both[1:], base)


def test_errors_name_the_argument():
    """Unknown models, shapes that do not match, numbers out of range."""
    x, y = randn(1, 6, 2), randn(1, 6, 1)
    images = torch.rand(2, 1, 4, 4)
    for bad, name in [
        (lambda: simulate_objects("sphere", 9, generator=gen()), "model must be one of"),
        (lambda: simulate_objects("number", 1, generator=gen()), "n must be"),
        (lambda: simulate_objects("number", 9, generator=gen(), outliers=2.0), "outliers must"),
        (lambda: rotated_images(images, torch.zeros(3)), "images must have shape"),
        (lambda: linear_sdr(x, y), "features and kernel"),
        (lambda: linear_sdr(x[0], torch.eye(6), num_directions=3), "num_directions must be"),
        (lambda: linear_sdr(x[0], torch.eye(6), ridge=0.0), "ridge must be"),
        (lambda: landmark_features(x, randn(3, 5)), "x and landmarks"),
        (lambda: train_bottlenecks(x[0], y, seeds=[0]), "x must have shape"),
        (lambda: train_bottlenecks(x, y[:, :3], seeds=[0]), "targets must have shape"),
        (lambda: train_bottlenecks(x, y, seeds=[0], huber=0.0), "huber must be"),
        (lambda: train_bottlenecks(x, y, seeds=[0], num_epochs=0), "num_epochs must be"),
        (lambda: train_bottlenecks(x, y, seeds=[0], batch_size=1), "batch_size must be"),
    ]:
        with pytest.raises(ValueError, match=name):
            bad()


def _bottleneck(x, y):
    nets = train_bottlenecks(x[None], y[None], seeds=[0], num_epochs=2, batch_size=4, hidden=(4,))
    return nets(x[None]).detach()


def _directions(x, z):
    return linear_sdr(x, z @ z.T).abs()


CASES = {
    "landmark_features": Case(
        inputs=lambda g: (torch.randn(5, 2, generator=g), torch.randn(4, 2, generator=g)),
        call=landmark_features,
    ),
    "linear_sdr": Case(
        inputs=lambda g: (torch.randn(9, 3, generator=g), torch.randn(9, 2, generator=g)),
        call=_directions,
    ),
    "rotated_images": Case(
        inputs=lambda g: (torch.rand(2, 1, 6, 6, generator=g), torch.randn(2, generator=g)),
        call=rotated_images,
    ),
    "simulate_objects": Case(
        inputs=lambda g: (),
        call=lambda: simulate_objects("matrix", 6, generator=gen(), outliers=0.5),
        keeps_dtype=False,
    ),
    "train_bottlenecks": Case(
        inputs=lambda g: (torch.randn(8, 2, generator=g), torch.randn(8, 1, generator=g)),
        call=_bottleneck,
    ),
}
