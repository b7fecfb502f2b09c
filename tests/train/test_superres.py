"""Training of super-resolution networks side by side is that of each alone."""

import math

import pytest
import torch
from torch import nn

from wellposed.nets.superres import BatchNormResidual, QuantNet, Space
from wellposed.train.superres import (
    Crops,
    absolute_error,
    clip_each,
    fit_crops,
    mean_psnr,
    refresh_statistics,
)

SPACE = Space(channels=4, cells=1)
SMALL = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LARGE = SMALL.repeat_interleave(2, 2).repeat_interleave(2, 3)


def train(seeds, bits, lr, clip=math.inf, residual=BatchNormResidual):
    gens = [torch.Generator().manual_seed(s) for s in seeds]
    archs = [[("3x3", b)] for b in bits]
    net = QuantNet(SPACE, archs, gens, residual=residual, global_skip=False).double()
    draws = [torch.Generator().manual_seed(s + 50) for s in seeds]
    crops = Crops(SMALL.double(), LARGE.double(), draws, list(range(len(seeds))), 6, 4)
    return net, fit_crops(net, crops, steps=6, lr=lr, clip=clip)


def test_side_by_side_is_alone():
    """Each with bits, rate and clipping of its own; fails if a rate goes to the wrong network."""
    both, losses = train([1, 2], [4, 8], [0.01, 0.04], [math.inf, 0.1])
    for n in range(2):
        alone, loss = train(
            [1, 2][n : n + 1], [4, 8][n : n + 1], [0.01, 0.04][n], [math.inf, 0.1][n]
        )
        torch.testing.assert_close(losses[:, n], loss[:, 0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            both.skeleton.stem[n], alone.skeleton.stem[0], rtol=1e-4, atol=1e-6
        )


def test_every_setting_matters():
    reference = train([1], [4], 0.01)[1][-1]
    assert train([1], [4], 0.02)[1][-1] != reference
    assert train([1], [4], 0.01, 1e-3)[1][-1] != reference
    assert train([1], [8], 0.01)[1][-1] != reference


def test_clipping_is_that_of_torch():
    """Network by network; fails if the norm is taken over all of them."""
    shapes = [(2, 3, 3), (2, 5)]
    params = [nn.Parameter(torch.zeros(s)) for s in shapes]
    grads = [torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in shapes]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    clip_each(params, [0.7, math.inf])
    for n, bound in enumerate((0.7, 1e9)):
        own = [nn.Parameter(torch.zeros(s[1:])) for s in shapes]
        for p, g in zip(own, grads):
            p.grad = g[n].clone()
        nn.utils.clip_grad_norm_(own, bound)
        for p, q in zip(params, own):
            torch.testing.assert_close(p.grad[n], q.grad)


def test_networks_of_one_source_see_the_same_crops():
    draws = [torch.Generator().manual_seed(s) for s in range(2)]
    crops = Crops(SMALL, LARGE, draws, [0, 1, 0], 4, 3)
    steps = list(crops.stream(5, chunk=2))
    assert len(steps) == 5
    for x, y in steps:
        assert x.shape == (3, 3, 1, 4, 4)
        assert torch.equal(x[:, 0], x[:, 2])
        assert torch.equal(y[..., ::2, ::2], x)
    assert not torch.equal(steps[0][0], steps[1][0])


def test_statistics_are_those_of_the_crops():
    """Fails if the average is a moving one."""
    block = BatchNormResidual(1)
    block.norm.running_mean.fill_(100.0)
    crops = Crops(SMALL, LARGE, [torch.Generator().manual_seed(0)], [0], 8, 4)
    seen = torch.cat(
        [x for x, _ in Crops(SMALL, LARGE, [torch.Generator().manual_seed(0)], [0], 8, 4).stream(5)]
    )
    refresh_statistics(block, lambda x: block(x, lambda u: u), crops, batches=5)
    assert block.norm.running_mean.item() == pytest.approx(seen.mean().item(), rel=1e-5)
    assert block.norm.momentum == 0.1
    assert not block.training


def test_psnr_by_hand():
    """Averaged inside a photograph, then in decibels; fails if the border counts."""
    output = torch.zeros(3, 1, 1, 8, 8)
    target = torch.zeros(3, 1, 8, 8)
    target[0], target[1], target[2] = 0.1, 0.3, 0.2
    target[..., :2, :] = 0.9
    found = mean_psnr(
        lambda x: output[: len(x)],
        torch.zeros(3, 1, 4, 4),
        target,
        torch.tensor([0, 0, 1]),
        batch_size=3,
    )
    expected = (-10 * math.log10((0.01 + 0.09) / 2) - 10 * math.log10(0.04)) / 2
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_error_and_bad_input():
    a, b = torch.zeros(2, 3, 1, 2, 2), torch.ones(2, 3, 1, 2, 2)
    assert absolute_error(a, b).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clip_each([], 0.0)
    with pytest.raises(ValueError, match="lr must be one number, or one for each of 1"):
        train([1], [4], [0.1, 0.2])
    crops = Crops(SMALL, LARGE, [torch.Generator()], [0])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        fit_crops(nn.Linear(1, 1), crops, steps=0)
    with pytest.raises(ValueError, match="batches must be at least 1"):
        refresh_statistics(nn.Linear(1, 1), lambda x: x, crops, batches=0)
