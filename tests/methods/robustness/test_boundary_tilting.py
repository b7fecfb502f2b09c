"""Tests of wellposed.methods.robustness.boundary_tilting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import SVC
from torch import Tensor

from contract import Case
from wellposed.methods.robustness import boundary_tilting as paper

Y = torch.tensor([-1, -1, -1, 1, 1, 1])


def classes(g: torch.Generator, n: int = 6, d: int = 4) -> Tensor:
    """Two classes around -1 and 1 in the first coordinate."""
    return torch.randn(n, d, generator=g) + Y[:n, None] * torch.eye(d)[0]


def some(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = classes(g).double()
    return x, torch.randn(4, generator=g).double(), torch.tensor(0.3, dtype=torch.float64)


def test_distances_by_explicit_loops() -> None:
    """Fails if the bias is not divided by the norm of the weight."""
    x, w, b = some()
    norm = math.sqrt(sum(float(v) ** 2 for v in w))
    got = paper.signed_distance(x, w, b)
    for row, value in zip(x, got):
        assert float(value) == pytest.approx((float(row @ w) + 0.3) / norm, abs=1e-12)
    assert paper.signed_distance(paper.project(x, w, b), w, b).abs().max() < 1e-12


def test_mirror_is_an_involution_that_flips_the_distance() -> None:
    """Fails if the factor 2 is missing."""
    x, w, b = some()
    there = paper.mirror(x, w, b)
    assert torch.allclose(paper.mirror(there, w, b), x)
    assert torch.allclose(paper.signed_distance(there, w, b), -paper.signed_distance(x, w, b))
    assert torch.allclose((x + there) / 2, paper.project(x, w, b))


def test_strength_is_the_ratio_of_the_distances_of_the_mirrored_centroid() -> None:
    """The definition of strength, for a boundary through the middle; fails with sin for tan."""
    x, w, _ = some()
    i, j = paper.centroids(x, Y)
    b = -w @ (i + j) / 2
    i_m = paper.mirror(i[None], w, b)[0]
    expected = (i_m - j).norm() / (i_m - i).norm()
    assert torch.allclose(paper.adversarial_strength(w, x, Y).abs(), expected)


def test_adversarial_distance_is_a_mean_for_every_bias() -> None:
    x, w, _ = some()
    for bias in (-3.0, 0.0, 7.0):
        mean = (Y * paper.signed_distance(x, w, torch.tensor(bias).double())).mean()
        assert torch.allclose(paper.adversarial_distance(w, x, Y), mean)


def test_small_angles_keep_their_digits() -> None:
    """Fails with the arc cosine, which loses half of the digits."""
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double()
    w = torch.tensor([1.0, 1e-9]).double()
    angle = paper.deviation_angle(w, x, torch.tensor([-1, 1]))
    assert float(angle) == pytest.approx(1e-9, rel=1e-6)


def test_centroids_by_loops_and_the_nearest_centroid() -> None:
    x, _, _ = some()
    i, j = paper.centroids(x, Y)
    assert torch.allclose(i, sum(x[k] for k in range(3)) / 3)
    w, b = paper.nearest_centroid(x, Y)
    nearer = (x - j).norm(dim=1) < (x - i).norm(dim=1)
    assert (nearer == (x @ w + b > 0)).all()
    assert float(paper.adversarial_strength(w, x, Y)) < 1e-12


def test_tilting_plane_decomposes_the_weight() -> None:
    x, w, _ = some()
    z, n = paper.tilting_plane(w, x, Y)
    delta = paper.deviation_angle(w, x, Y)
    assert torch.allclose(delta.cos() * z + delta.sin() * n, w / w.norm())
    assert abs(float(z @ n)) < 1e-12
    assert float(n @ w) >= 0


@settings(max_examples=40, deadline=None)
@given(st.floats(-1.57, 1.57), st.integers(0, 500), st.sampled_from([1e-6, 1.0, 1e6]))
def test_tilting_is_free(angle: float, seed: int, scale: float) -> None:
    """Decisions kept, cosines multiplied; fails if the bias is not moved with the weight."""
    g = torch.Generator().manual_seed(seed)
    x = torch.cat([scale * classes(g).double(), torch.zeros(6, 1).double()], dim=1)
    w = torch.cat([torch.randn(4, generator=g), torch.zeros(1)]).double()
    b = scale * torch.tensor(0.3, dtype=torch.float64)
    u = torch.eye(5).double()[4] + 0.7 * w
    turned, bias = paper.tilt(w, b, u, angle, x[0])
    before, after = paper.signed_distance(x, w, b), paper.signed_distance(x, turned, bias)
    assert torch.allclose(after, math.cos(angle) * before, rtol=1e-6, atol=1e-12 * scale)
    cosines = [paper.deviation_angle(v, x, Y).cos() for v in (w, turned)]
    assert torch.allclose(cosines[1], math.cos(angle) * cosines[0], atol=1e-9)


def test_the_anchor_matters_only_through_its_projection() -> None:
    x, w, b = some()
    u = torch.eye(4).double()[3]
    one, two = (paper.tilt(w, b, u, 0.5, a) for a in (x[0], paper.mirror(x[:1], w, b)[0]))
    assert torch.allclose(one[1], two[1])
    assert not torch.allclose(one[1], paper.tilt(w, b, u, 0.5, x[1])[1])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1e-200, 1e-3, 1.0, 1e200]), st.integers(0, 500))
def test_nothing_depends_on_the_scale_of_the_classifier(scale: float, seed: int) -> None:
    """Extreme weights too; fails if a norm is squared without scaling."""
    x, w, b = some(seed)
    for call in (paper.signed_distance, paper.mirror, paper.relative_perturbation):
        assert torch.allclose(call(x, scale * w, scale * b), call(x, w, b))
    assert torch.allclose(paper.deviation_angle(scale * w, x, Y), paper.deviation_angle(w, x, Y))


def test_gradients() -> None:
    x, w, b = (t.requires_grad_() for t in some())
    assert torch.autograd.gradcheck(lambda w: paper.adversarial_strength(w, x.detach(), Y), (w,))
    assert torch.autograd.gradcheck(paper.mirror, (x, w, b))


def test_fits_agree_with_scikit_learn_and_the_limit() -> None:
    """Fails if C is 1 / (n reg)."""
    x, _, _ = some()
    peer = SVC(kernel="linear", C=1 / (2 * 6 * 0.1), tol=1e-9).fit(x.numpy(), Y.numpy())
    w, b = paper.fit_linear_svm(x, Y, 0.1, tol=1e-9, max_iter=200)
    assert torch.allclose(w, torch.tensor(peer.coef_[0]), atol=1e-4)
    assert abs(float(b) - peer.intercept_[0]) < 1e-3
    for fit in (paper.fit_linear_svm, paper.fit_logistic):
        far = [paper.deviation_angle(fit(x, Y, reg)[0], x, Y) for reg in (1e-3, 1.0, 1e3)]
        assert far[0] > far[1] > far[2]
        assert far[2] < 1e-2


def test_bad_input() -> None:
    x, w, b = some()
    for y, text in ((Y[:-1], "x must be"), (2 * Y, "labels"), (Y.abs(), "both classes")):
        with pytest.raises(ValueError, match=text):
            paper.centroids(x, y)
    with pytest.raises(ValueError, match="differ"):
        paper.nearest_centroid(torch.ones(6, 4), Y)
    with pytest.raises(ValueError, match="zero"):
        paper.deviation_angle(0 * w, x, Y)
    with pytest.raises(ValueError, match="x must be"):
        paper.mirror(x[:, :3], w, b)
    for bad in (w[:2], w.expand(5, 2, 4)):
        with pytest.raises(ValueError, match="weight must fit"):
            paper.deviation_angle(bad, x.expand(3, 6, 4), Y.expand(3, 6))
    with pytest.raises(ValueError, match="not empty"):
        paper.mirror(x[:, :0], w[:0], b)
    with pytest.raises(ValueError, match="direction"):
        paper.tilt(w, b, 2 * w, 0.1, x[0])
    with pytest.raises(ValueError, match="angle"):
        paper.tilt(w, b, x[0], math.inf, x[0])
    with pytest.raises(ValueError, match="one shape"):
        paper.tilt(w, b, x[0, :2], 0.1, x[0])
    with pytest.raises(ValueError, match="not unique"):
        paper.tilting_plane(paper.nearest_centroid(x, Y)[0], x, Y)
    with pytest.raises(ValueError, match="zero"):
        paper.relative_perturbation(0 * x, w, b)


def geometry(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return classes(g), torch.randn(4, generator=g), torch.randn((), generator=g)


def labeled(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(4, generator=g), classes(g)


def on_labels(call):  # type: ignore[no-untyped-def]
    return lambda w, x: call(w, x, Y.to(x.device))


CASES = {
    "centroids": Case(lambda g: (classes(g),), lambda x: paper.centroids(x, Y.to(x.device))),
    "nearest_centroid": Case(
        lambda g: (classes(g),), lambda x: paper.nearest_centroid(x, Y.to(x.device))
    ),
    "signed_distance": Case(geometry, paper.signed_distance),
    "project": Case(geometry, paper.project),
    "mirror": Case(geometry, paper.mirror),
    "relative_perturbation": Case(geometry, paper.relative_perturbation),
    "deviation_angle": Case(labeled, on_labels(paper.deviation_angle)),
    "adversarial_strength": Case(labeled, on_labels(paper.adversarial_strength)),
    "adversarial_distance": Case(labeled, on_labels(paper.adversarial_distance)),
    "tilting_plane": Case(labeled, on_labels(paper.tilting_plane)),
    "tilt": Case(
        lambda g: (*geometry(g)[1:], torch.randn(4, generator=g), torch.randn(4, generator=g)),
        lambda w, b, u, a: paper.tilt(w, b, u, 0.4, a),
    ),
    "fit_linear_svm": Case(
        lambda g: (classes(g),), lambda x: paper.fit_linear_svm(x, Y.to(x.device), 0.5, tol=1e-3)
    ),
    "fit_logistic": Case(
        lambda g: (classes(g),), lambda x: paper.fit_logistic(x, Y.to(x.device), 0.5, tol=1e-3)
    ),
}
