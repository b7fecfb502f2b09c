"""Tests of wellposed.methods.robustness.boundary_tilting_measures."""

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from contract import Case
from wellposed.methods.robustness import boundary_tilting as geometry
from wellposed.methods.robustness import boundary_tilting_measures as bench

LABELS = torch.arange(30) % 3
SIZES = {"num_train": 6, "num_val": 4, "num_test": 2}


def pairs_of(images: Tensor, seed: int = 0) -> bench.Pairs:
    g = torch.Generator().manual_seed(seed)
    return bench.digit_pairs(images, LABELS, [(0, 1), (2, 0)], generator=g, **SIZES)


def test_splits_are_balanced_disjoint_and_of_the_right_digits() -> None:
    """Fails if validation and training share an image."""
    data = pairs_of(torch.arange(30.0)[:, None])
    for p, (low, high) in enumerate([(0, 1), (2, 0)]):
        parts = [(data.x, data.y), (data.x_val, data.y_val), (data.x_test, data.y_test)]
        seen = [float(v) for x, _ in parts for v in x[p, :, 0]]
        assert len(set(seen)) == len(seen) == 12
        for x, y in parts:
            digits = LABELS[x[p, :, 0].long()]
            assert (digits == torch.where(y[p] < 0, low, high)).all()
            assert float(y[p].sum()) == 0
    assert not torch.equal(data.x, pairs_of(torch.arange(30.0)[:, None], 1).x)


def test_measures_by_explicit_loops() -> None:
    """Fails if the L-infinity distance divides by the L2 norm."""
    g = torch.Generator().manual_seed(0)
    data = pairs_of(torch.randn(30, 5, generator=g).double() + 1)
    w, b = torch.randn(2, 3, 5, generator=g).double(), torch.randn(2, 3, generator=g).double()
    got = bench.measure(w, b, data)
    for p in range(2):
        for k in range(3):
            x, y = data.x_test[p], data.y_test[p]
            f = [float(row @ w[p, k] + b[p, k]) for row in x]
            right = sum(v * float(s) > 0 for v, s in zip(f, y)) / len(y)
            linf = sum(abs(v) for v in f) / float(w[p, k].abs().sum()) / len(f)
            assert float(got.test[p, k]) == pytest.approx(right)
            assert float(got.linf[p, k]) == pytest.approx(linf)
            relative = geometry.relative_perturbation(x, w[p, k], b[p, k]).mean()
            assert torch.allclose(got.relative[p, k], relative)
            assert torch.allclose(
                got.strength[p, k], geometry.adversarial_strength(w[p, k], data.x[p], data.y[p])
            )


def test_lda_is_that_of_scikit_learn() -> None:
    """Fails if the covariance is taken about the common mean."""
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([-1, 1]).repeat(20)
    x = torch.randn(40, 4, generator=g).double() * torch.tensor([1.0, 2, 3, 4]) + 0.4 * y[:, None]
    w, b = bench.fit_lda(x, y, 0.3)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(x.numpy(), y.numpy())
    # the peer standardizes before it shrinks, so compare where that makes no difference
    scaled = x / (x - torch.where((y > 0)[:, None], *geometry.centroids(x, y)[::-1])).std(0, False)
    w, b = bench.fit_lda(scaled, y, 0.3)
    peer.fit(scaled.numpy(), y.numpy())
    assert torch.allclose(w, torch.tensor(peer.coef_[0]), rtol=1e-6)
    assert abs(float(b) - peer.intercept_[0]) < 1e-6
    far = geometry.deviation_angle(bench.fit_lda(x, y, 1.0)[0], x, y)
    assert float(far) < 1e-6 < float(geometry.deviation_angle(bench.fit_lda(x, y, 0.3)[0], x, y))


def test_the_rule_of_choice() -> None:
    accuracy = torch.tensor([[0.90, 0.95, 0.96], [0.97, 0.90, 0.97]])
    assert bench.pick_strongest(accuracy).tolist() == [1, 0]
    assert bench.pick_strongest(accuracy, within=0.0).tolist() == [2, 0]
    assert bench.pick_strongest(accuracy, within=0.1).tolist() == [0, 0]


def test_gaussian_error_is_that_of_many_draws() -> None:
    """Fails if the variance along the weight is not rooted."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=g).double()
    i, j = torch.zeros(3).double(), torch.tensor([1.0, 2.0, 0.0]).double()
    w, b = torch.tensor([0.5, 1.0, -0.3]).double(), torch.tensor(-0.8).double()
    draws = torch.randn(200_000, 3, generator=g).double() @ root.T
    share = (
        ((draws + i) @ w + b > 0).double().mean() + ((draws + j) @ w + b < 0).double().mean()
    ) / 2
    got = bench.gaussian_error(w, b, i, j, root @ root.T)
    assert abs(float(got - share)) < 4e-3


def test_repeated_pixels_scale_every_product() -> None:
    """So classifiers keep their decisions; fails if rows and columns are mixed up."""
    x = torch.arange(18.0).reshape(2, 9)
    large = bench.upsample(x, 3)
    assert torch.allclose(large @ large.T, 9 * x @ x.T)
    assert large[0].reshape(9, 9)[4, 7] == x[0].reshape(3, 3)[1, 2]
    smooth = bench.upsample(x, 3, smooth=True)
    assert smooth.shape == large.shape
    assert not torch.allclose(smooth, large)


def test_deepfool_finds_the_distance_of_a_linear_model_and_of_a_circle() -> None:
    """Fails without the division by the squared gradient."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    net = nn.Linear(3, 1).double()
    away, done = bench.deepfool_distance(net, x)
    exact = geometry.signed_distance(x, net.weight[0], net.bias[0]).abs()
    assert done.all()
    assert torch.allclose(away, 1.02 * exact)

    class Circle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().sum(1, keepdim=True) - 1

    points = torch.tensor([[2.0, 0.0], [0.0, 3.0]]).double()
    away, done = bench.deepfool_distance(Circle(), points)
    assert done.all()
    assert torch.allclose(away, torch.tensor([1.0, 2.0]).double(), rtol=0.05)
    assert not bench.deepfool_distance(Circle(), points, max_iter=1)[1].any()


def shapes(seed: int = 0) -> tuple[Tensor, Tensor]:
    y = torch.tensor([-1.0, 1.0]).repeat(20)
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x + 0.5 * y[:, None, None, None], y


def test_training_learns_and_every_knob_changes_it() -> None:
    x, y = shapes()
    plain = {"decay": 0.0, "steps": 30, "seed": 0}
    net = bench.train_network(x, y, **plain)
    assert ((net(x)[:, 0] > 0) == (y > 0)).float().mean() > 0.9
    again = bench.train_network(x, y, **plain)
    assert torch.equal(net(x), again(x))
    for knob in (
        {"decay": 0.1}, {"steps": 31}, {"seed": 1}, {"width": 4},
        {"lr": 0.01}, {"momentum": 0.0}, {"batch_size": 7},
    ):  # fmt: skip
        assert not torch.equal(net(x), bench.train_network(x, y, **{**plain, **knob})(x)), knob


def test_weight_decay_shrinks_the_weights() -> None:
    """Fails if the decay has the wrong sign."""
    x, y = shapes()
    norms = [
        sum(
            float(p.detach().square().sum())
            for p in bench.train_network(x, y, decay=c, steps=60, seed=0).parameters()
        )
        for c in (0.0, 0.05)
    ]
    assert norms[1] < norms[0]


def test_bad_input() -> None:
    x, y = shapes()
    with pytest.raises(ValueError, match="even"):
        bench.digit_pairs(x, LABELS, [(0, 1)], num_train=3, num_val=2, num_test=2,
                          generator=torch.Generator())  # fmt: skip
    with pytest.raises(ValueError, match="class 0 has"):
        bench.digit_pairs(torch.rand(30, 2), LABELS, [(0, 1)], num_train=40, num_val=2, num_test=2,
                          generator=torch.Generator())  # fmt: skip
    with pytest.raises(ValueError, match="pairs"):
        bench.digit_pairs(torch.rand(30, 2), LABELS, [], **SIZES, generator=torch.Generator())
    with pytest.raises(ValueError, match="one an image"):
        pairs_of(torch.rand(29, 2))
    with pytest.raises(ValueError, match="no row that is zero"):
        bench.measure(torch.zeros(2, 1, 3), torch.zeros(2, 1), pairs_of(torch.rand(30, 3)))
    with pytest.raises(ValueError, match="vary inside"):
        bench.fit_lda(torch.ones(40, 3), y, 0.5)
    with pytest.raises(ValueError, match="must fit"):
        bench.gaussian_error(torch.ones(2), torch.tensor(0.0), y[:1], y[1:2], torch.eye(1))
    with pytest.raises(ValueError, match="weight must be"):
        bench.measure(torch.rand(3), torch.rand(()), pairs_of(torch.rand(30, 3)))
    with pytest.raises(ValueError, match="shrinkage"):
        bench.fit_lda(torch.rand(40, 3), y, 0.0)
    with pytest.raises(ValueError, match="within"):
        bench.pick_strongest(torch.rand(3), within=-1.0)
    with pytest.raises(ValueError, match="positive definite"):
        bench.gaussian_error(torch.zeros(1), torch.tensor(0.0), y[:1], y[1:2], torch.eye(1))
    with pytest.raises(ValueError, match="square images"):
        bench.upsample(torch.rand(2, 5), 2)
    with pytest.raises(ValueError, match="x must be"):
        bench.train_network(x[:, 0], y, decay=0.0, steps=1, seed=0)
    with pytest.raises(ValueError, match="decay"):
        bench.train_network(x, y, decay=-1.0, steps=1, seed=0)
    with pytest.raises(ValueError, match="max_iter"):
        bench.deepfool_distance(nn.Linear(2, 1), torch.rand(3, 2), max_iter=0)
    with pytest.raises(ValueError, match="net must map"):
        bench.deepfool_distance(nn.Linear(2, 2), torch.rand(3, 2))


def linear_net(x: Tensor) -> nn.Module:
    net = nn.Linear(3, 1).to(x)
    nn.init.constant_(net.weight, 0.3)
    nn.init.constant_(net.bias, 0.1)
    return net


def two(g: torch.Generator) -> tuple[Tensor, ...]:
    return (
        torch.randn(30, 4, generator=g),
        torch.randn(2, 3, 4, generator=g),
        torch.randn(2, 3, generator=g),
    )


def tilted(x: Tensor) -> Tensor:
    return torch.where(torch.arange(len(x), device=x.device) % 2 == 0, -1, 1)


CASES = {
    "digit_pairs": Case(lambda g: (torch.randn(30, 4, generator=g),), pairs_of),
    "measure": Case(two, lambda x, w, b: bench.measure(w, b, pairs_of(x))),
    "fit_lda": Case(
        lambda g: (torch.randn(20, 3, generator=g),), lambda x: bench.fit_lda(x, tilted(x), 0.5)
    ),
    "pick_strongest": Case(lambda g: (torch.rand(3, 4, generator=g),), bench.pick_strongest),
    "gaussian_error": Case(
        lambda g: tuple(torch.randn(s, generator=g) for s in ((3,), (), (3,), (3,))),
        lambda w, b, i, j: bench.gaussian_error(w, b, i, j, torch.eye(3).to(w)),
    ),
    "upsample": Case(
        lambda g: (torch.randn(2, 9, generator=g),), lambda x: bench.upsample(x, 2, smooth=True)
    ),
    "train_network": Case(
        lambda g: (torch.rand(8, 1, 8, 8, generator=g),),
        lambda x: bench.train_network(x, tilted(x).to(x), decay=0.1, steps=3, seed=0)(x).detach(),
        on_device=False,
    ),
    "deepfool_distance": Case(
        lambda g: (torch.rand(4, 3, generator=g),),
        lambda x: bench.deepfool_distance(linear_net(x), x),
    ),
}
