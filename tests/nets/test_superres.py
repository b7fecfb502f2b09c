"""Networks side by side compute what each computes alone, from plain convolutions."""

import pytest
import torch
import torch.nn.functional as F

from contract import Case
from wellposed.nets.mixed import MixedConv2d
from wellposed.nets.superres import (
    BatchNormResidual,
    Block,
    PlainResidual,
    QuantConv2d,
    QuantNet,
    Skeleton,
    Space,
    convolve,
    kernel_start,
    parse_op,
    random_architecture,
)
from wellposed.ops.quantize import hwgq_quantize, lsq_quantize, minmax_quantize


def gens(n=1):
    return [torch.Generator().manual_seed(s) for s in range(n)]


WIDE = Space(
    colors=3,
    channels=6,
    cells=2,
    body=(("1x1", "3x3"), ("3x3",)),
    skip=("1x1",),
    head=(("3x3", "5x5"), ("3x3",)),
    upsample=("3x3", "3x3/3"),
    tail=(("3x3",), ("3x3/3",)),
)


@pytest.mark.parametrize("side", [1, 3])
def test_convolve_is_a_convolution_for_each_network(side):
    """Also for 1 x 1, which takes another way; fails if networks are mixed up."""
    x, w = torch.randn(4, 3, 2, 6, 5), torch.randn(3, 7, 2, side, side)
    found = convolve(x, w)
    for n in range(3):
        torch.testing.assert_close(found[:, n], F.conv2d(x[:, n], w[n], padding=side // 2))


@pytest.mark.parametrize("op", ["1x1", "3x3", "5x5", "3x3/2"])
def test_quantized_convolution_by_hand(op):
    """Beside a 5 x 5 network; fails if padding or groups leak, or steps start elsewhere."""
    kernel, groups = parse_op(op)
    conv = QuantConv2d(Block(4, 6, (op,)), [(op, 4), ("5x5", 8)], gens(2))
    alone = QuantConv2d(Block(4, 6, (op,)), [(op, 4)], gens(1))
    edge = (5 - kernel) // 2
    weight = conv.weight[0, :, :, edge : 5 - edge, edge : 5 - edge]
    torch.testing.assert_close(weight, alone.weight[0])
    x = torch.randn(3, 2, 4, 7, 7)
    dense = torch.stack([weight[r, :] for r in range(6)])
    own = (
        dense
        if groups == 1
        else torch.cat([part[:, 2 * i : 2 * i + 2] for i, part in enumerate(dense.chunk(2))])
    )
    quantized = lsq_quantize(own, conv.step[0], 4)
    expected = F.conv2d(hwgq_quantize(x[:, 0], 4), quantized, padding="same", groups=groups)
    torch.testing.assert_close(conv(x)[:, 0], expected)


def test_networks_side_by_side_are_networks_alone():
    """The full space with all its parts; fails if two networks share a weight."""
    g = torch.Generator().manual_seed(3)
    archs = [random_architecture(WIDE, [4, 8], g) for _ in range(2)]
    both = QuantNet(WIDE, archs, gens(2), global_skip=False)
    x = torch.rand(2, 2, 3, 8, 8)
    out = both(x)
    assert out.shape == (2, 2, 3, 16, 16)
    for n in range(2):
        alone = QuantNet(WIDE, archs[n : n + 1], gens(2)[n : n + 1], global_skip=False)
        torch.testing.assert_close(alone(x[:, n : n + 1])[:, 0], out[:, n])


def test_every_block_of_the_space_takes_part():
    """Fails if a convolution is skipped or runs twice."""
    net = QuantNet(WIDE, [[("3x3", 8)] * len(WIDE.blocks())], gens(), global_skip=False)
    calls = []
    net.skeleton(torch.rand(1, 1, 3, 8, 8), lambda i, u: (calls.append(i), net.blocks[i](u))[1])
    assert calls == list(range(len(WIDE.blocks())))
    assert len(calls) == 2 + 2 * 3 + 1 + 2


def test_perturbation_and_full_precision():
    net = QuantNet(Space(cells=1), [[("3x3", 32)]], gens(), global_skip=False)
    x = torch.rand(2, 1, 1, 6, 6)
    assert torch.equal(net(x, lambda t, axes: t), net(x))
    coarse = net(x, lambda t, axes: minmax_quantize(t, 2, dim=axes))
    assert not torch.allclose(coarse, net(x))


def test_training_starts_at_the_bicubic_image():
    x = torch.rand(2, 1, 1, 6, 6)
    net = QuantNet(Space(cells=1), [[("3x3", 4)]], gens())
    bicubic = F.interpolate(x[:, 0], scale_factor=2, mode="bicubic")
    torch.testing.assert_close(net(x)[:, 0], bicubic)


def test_cost_by_hand():
    """36 multiply-adds a pixel and channel pair less where there are groups and a finer grid."""
    assert WIDE.blocks()[-1].macs("3x3/3", pixels=10) == 10 * 4 * 3 * 3 * 9 // 3
    assert Space(cells=2).bitops([("1x1", 8), ("5x5", 4)], 1) == 64 * 64 + 64 * 25 * 16


@pytest.mark.parametrize("surrogate", ["noise", "official", "direct"])
def test_mixed_convolution_with_one_choice(surrogate):
    """One-hot probabilities at many bits leave one convolution of the op; fails if the op is wrong.

    The official mixture has shares 1/3 + 3/4 of the tensor, and other ops add nothing.
    """
    bits = [8] if surrogate == "direct" else [30, 32]
    conv = MixedConv2d(Block(2, 3, ("1x1", "3x3")), bits, gens(), surrogate)
    x = torch.rand(4, 1, 2, 6, 6) * 2 - 1
    probs = torch.zeros(1, 2 * len(bits))
    probs[0, -1] = 1.0
    out = conv(x, probs, torch.Generator().manual_seed(0))[:, 0]
    a, w = x[:, 0].relu(), conv.weights[1][0]
    if surrogate == "direct":
        a, w = hwgq_quantize(a, 8), lsq_quantize(w, conv.steps[1][0, 0], 8)
    factor = (1 / 3 + 3 / 4) ** 2 if surrogate == "official" else 1.0
    torch.testing.assert_close(out, factor * F.conv2d(a, w, padding=1), atol=1e-5, rtol=1e-4)


def test_official_weights_learn_through_a_third():
    """Fails if the noisy copies are not detached."""
    x, probs = torch.rand(2, 1, 2, 5, 5).requires_grad_(), torch.tensor([[0.0, 1.0]])
    slopes = {}
    for surrogate in ("noise", "official"):
        conv = MixedConv2d(Block(2, 2, ("3x3",)), [30, 32], gens(), surrogate)
        out = conv(x, probs)
        slopes[surrogate] = torch.autograd.grad(out.sum(), (conv.weights[0], x))
    share = (1 / 3) * (1 / 3 + 3 / 4)
    for found, clean in zip(slopes["official"], slopes["noise"]):
        torch.testing.assert_close(found, share * clean, rtol=1e-4, atol=1e-5)


def test_random_architecture_within_a_budget():
    space, g = Space(cells=2), torch.Generator().manual_seed(0)
    costs = [
        space.bitops(random_architecture(space, [4, 8], g, budget=30_000), 1) for _ in range(5)
    ]
    assert max(costs) <= 30_000
    assert min(costs) > 15_000
    with pytest.raises(ValueError, match="budget 1 is below"):
        random_architecture(space, [4, 8], g, budget=1)


def test_bad_input():
    for op in ("3x5", "4x4", "3", "3x3/0", "axa"):
        with pytest.raises(ValueError, match="op must"):
            parse_op(op)
    with pytest.raises(ValueError, match="does not divide"):
        Block(4, 6, ("3x3/3",))
    with pytest.raises(ValueError, match="choices must be 3"):
        QuantNet(Space(), [[("3x3", 4)]], gens())
    with pytest.raises(ValueError, match="architectures must be one for each"):
        QuantNet(Space(), [], [])
    with pytest.raises(ValueError, match="bits must be one of"):
        QuantNet(Space(cells=1), [[("3x3", 5)]], gens())
    with pytest.raises(ValueError, match="full precision for all networks or for none"):
        QuantNet(Space(cells=1), [[("3x3", 32)], [("3x3", 4)]], gens(2))
    with pytest.raises(ValueError, match="surrogate must be one of"):
        MixedConv2d(Block(2, 2, ("3x3",)), [4], gens(), "rounding")


def _run(make, *inputs):
    """A module made in the dtype of its inputs."""
    return make().to(inputs[0])(*inputs).detach()


def _one(*shape):
    return lambda g: (torch.randn(*shape, generator=g),)


CASES = {
    "parse_op": Case(inputs=lambda g: ("3x3/2",), call=parse_op),
    "random_architecture": Case(
        inputs=lambda g: (WIDE,),
        call=lambda space: float(
            space.bitops(random_architecture(space, [4, 8], *gens(), budget=1e9), 1)
        ),
    ),
    "kernel_start": Case(
        inputs=lambda g: (), call=lambda: kernel_start((2, 3, 1, 1), *gens()), keeps_dtype=False
    ),
    "convolve": Case(
        inputs=lambda g: (
            torch.randn(2, 3, 2, 4, 4, generator=g),
            torch.randn(3, 5, 2, 3, 3, generator=g),
        ),
        call=lambda x, w: (convolve(x, w), convolve(x, w[..., :1, :1])),
    ),
    "PlainResidual": Case(
        inputs=_one(2, 1, 3, 4, 4), call=lambda x: PlainResidual(3)(x, torch.relu)
    ),
    "BatchNormResidual": Case(
        inputs=_one(2, 1, 3, 4, 4),
        call=lambda x: BatchNormResidual(3).to(x)(x, torch.relu).detach(),
    ),
    "Skeleton": Case(
        inputs=_one(2, 1, 1, 4, 4),
        call=lambda x: Skeleton(Space(), gens()).to(x)(x, lambda i, u: u.relu()).detach(),
    ),
    "QuantConv2d": Case(
        inputs=_one(3, 2, 2, 4, 4),
        call=lambda x: _run(
            lambda: QuantConv2d(Block(2, 2, ()), [("3x3", 4), ("1x1", 8)], gens(2)), x
        ),
    ),
    "QuantNet": Case(
        inputs=_one(3, 1, 1, 4, 4),
        call=lambda x: _run(lambda: QuantNet(Space(cells=1), [[("3x3", 4)]], gens()), x),
    ),
}
