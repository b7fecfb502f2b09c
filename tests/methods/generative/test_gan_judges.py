"""Tests of wellposed.methods.generative.gan_unlearning: judges and controls."""

import math

import pytest
import torch
from torch import nn

from wellposed.methods.generative.gan_unlearning import (
    fit_classifiers,
    random_anchors,
    sample,
    score,
    with_parameters,
)
from wellposed.ops.gaussian_frechet import frechet_distance, weighted_moments


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def argmax_judge():
    return nn.Sequential(nn.Identity(), nn.Identity())


def test_score_by_hand():
    """Images that are their own logits; fails if the target's images enter the distance."""
    images = 0.1 * torch.rand(2, 40, 3, generator=gen(), dtype=torch.float64)
    label = torch.randint(3, (2, 40), generator=gen(1))
    images += torch.nn.functional.one_hot(label, 3)
    real, truth = images[1], label[1]
    found = score(images, [argmax_judge()] * 2, real, truth, target=[2, 1])
    for k, target in enumerate((2, 1)):
        assert found.share[k].item() == pytest.approx((label[k] == target).double().mean().item())
        rows, others = images[k][label[k] != target], real[truth != target]
        ours = weighted_moments(rows, torch.ones(len(rows)))
        theirs = weighted_moments(others, torch.ones(len(others)))
        assert found.fid[k].item() == pytest.approx(frechet_distance(*ours, *theirs).item())
    assert found.fid[1].abs() < 1e-8
    assert found.covered.tolist() == [2, 2]
    torch.testing.assert_close(found.classes.sum(1), torch.ones(2).double())


def test_collapse_is_seen():
    """A generator that draws nothing else than the target, and one that draws one other class."""
    images = torch.eye(3)[torch.tensor([[2] * 5, [0] * 5])]
    found = score(images, [argmax_judge()] * 2, torch.eye(3), torch.arange(3), target=2)
    assert found.share.tolist() == [1.0, 0.0]
    assert found.fid[0] == math.inf
    assert found.covered.tolist() == [0, 1]


def test_judges_are_told_apart():
    """Fails if all networks get the moments of the first judge."""
    double = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Identity())
    single = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Identity())
    with torch.no_grad():
        single[0].weight.copy_(torch.eye(3))
        double[0].weight.copy_(2 * torch.eye(3))
    x = torch.eye(3).repeat(5, 1) + 0.1 * torch.rand(15, 3, generator=gen())
    y = torch.arange(3).repeat(5)
    shifted = torch.stack([x + 0.5, x + 0.5])
    found = score(shifted, [single, double], x, y, target=0)
    assert found.fid[0].item() == pytest.approx(0.75, rel=1e-4)
    assert found.fid[1].item() == pytest.approx(3.0, rel=1e-4)


def test_classifiers_learn_and_each_knob_matters():
    """Two sets of different size side by side; fails if they share their labels."""
    x = torch.randn(60, 2, generator=gen())
    y = (x[:, 0] > 0).long()
    kwargs = {"seeds": [0, 1], "width": 8, "steps": 60, "batch_size": 20, "lr": 0.01}
    one, two = fit_classifiers([x, x[:40]], [y, 1 - y[:40]], 2, **kwargs)
    assert (one(x).argmax(1) == y).float().mean() > 0.9
    assert (two(x).argmax(1) == y).float().mean() < 0.1
    for change in ({"steps": 61}, {"batch_size": 21}, {"lr": 0.02}, {"seeds": [2, 1]}):
        other, _ = fit_classifiers([x, x[:40]], [y, 1 - y[:40]], 2, **(kwargs | change))
        assert not torch.equal(other(x), one(x))
    assert fit_classifiers([x], [y], 2, seeds=[0], width=3, steps=1)[0][0].out_features == 3


def test_sample_and_parameters():
    nets = [nn.Linear(2, 3) for _ in range(2)]
    z = torch.randn(4, 2, generator=gen())
    images = sample(nets, z)
    torch.testing.assert_close(images, torch.stack([net(z) for net in nets]).detach())
    torch.testing.assert_close(sample(nets, torch.stack([z, 0 * z]))[1, 0], nets[1].bias.detach())
    changed = with_parameters(nets[0], list(nets[1].parameters()))
    assert torch.equal(changed(z), nets[1](z))
    assert not torch.equal(changed(z), nets[0](z))


def test_random_anchors_are_as_far_and_nearly_orthogonal():
    """Fails if the lengths of the tensors are mixed."""
    params = [torch.zeros(400).double(), torch.ones(300).double()]
    anchor = [torch.full((400,), 0.5).double(), torch.full((300,), 3.0).double()]
    point, other = random_anchors(params, [anchor, anchor], gen())
    for p, a, q in zip(params, anchor, point):
        torch.testing.assert_close((q - p).norm(), (a - p).norm())
        assert torch.cosine_similarity(q - p, a - p, 0).abs() < 0.2
    assert not torch.equal(point[0], other[0])


def test_bad_input():
    judge, x, y = argmax_judge(), torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match=r"images must be \(judges, n, p\)"):
        score(x, [judge], x, y, 0)
    with pytest.raises(ValueError, match=r"real \(m, p\) and labels"):
        score(x[None], [judge], x, y[:2], 0)
    with pytest.raises(ValueError, match=r"target must be one class in 0..2"):
        score(x[None], [judge], x, y, 3)
    with pytest.raises(ValueError, match="one a classifier"):
        fit_classifiers([x], [], 3, seeds=[0])
    with pytest.raises(ValueError, match=r"images must be \(n, p\)"):
        fit_classifiers([x], [y[:2]], 3, seeds=[0])
    with pytest.raises(ValueError, match="latents must have shape"):
        sample([nn.Identity()], torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="params must have the shapes"):
        with_parameters(nn.Linear(1, 1), [torch.zeros(1)])
    with pytest.raises(ValueError, match="anchors must have the shapes"):
        random_anchors([torch.zeros(2)], [[torch.zeros(3)]], gen())
