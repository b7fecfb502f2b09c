"""Dynamic masks: targets, gates, losses, networks, training, and the skipped work."""

import itertools
import math

import pytest
import torch
from torch import nn

from contract import Case
from wellposed.methods.sparsity.dynamic_masks import (
    DynamicConv2d,
    DynamicNet,
    MaskPredictor,
    binarize,
    channel_saliency,
    conv_macs,
    deploy,
    fit,
    flops_reduction,
    forward_with_masks,
    mask_prediction_loss,
    mass_mask,
    uniform_mask,
)
from wellposed.nets.convnet import ConvNet
from wellposed.train import generator, seeded


def features(g, n=6, c=8):
    return torch.randn(n, c, 3, 3, generator=g, dtype=torch.float64).relu()


def small(seed=0, **options):
    """A dense and a dynamic network in float64, with batch statistics that are not trivial."""
    with seeded(seed):
        net = ConvNet(1, [4, 6, 5], 3, strides=[2, 1, 1]).double()
        net.train()(torch.randn(50, 1, 8, 8).double())
        net.eval()
        return net, DynamicNet(net, 0.8, softmax=False, open_bias=0.0, **options).eval()


# --- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [0.3, 0.7, 0.95, 1.0])
def test_mass_mask_against_loops(mass):
    """Fails if the crossing channel is kept, the sort ascends, or saliency is a mean."""
    x = features(generator(1))
    x[:, 2] = 0.0
    x[0] = 0.0
    x[0, 3, 1, 1] = 5.0  # one channel has everything
    masks = mass_mask(x, mass)
    for sample, mask in zip(x, masks):
        peak = [float(channel.abs().max()) for channel in sample]
        order = sorted(range(8), key=lambda c: -peak[c])
        expected, total = [0.0] * 8, 0.0
        for rank, c in enumerate(order):
            total += peak[c]
            fits = peak[c] > 1e-5 * sum(peak) if mass == 1.0 else total <= (mass + 1e-5) * sum(peak)
            expected[c] = float(fits or rank == 0)
        assert mask.tolist() == expected


def test_mass_mask_limits_and_min_channels():
    """Fails if a dead sample keeps everything or ``min_channels`` is ignored."""
    x = features(generator(2))
    assert mass_mask(torch.zeros(2, 4, 1, 1), 0.9).sum(1).tolist() == [1.0, 1.0]
    assert mass_mask(x, 1e-4, 3).sum(1).tolist() == [3.0] * 6
    assert (mass_mask(x, 0.6) <= mass_mask(x, 0.9)).all()
    assert torch.equal(mass_mask(x, torch.tensor(0.6)), mass_mask(x, 0.6))
    assert torch.equal(mass_mask(3.0 * x, 0.6), mass_mask(x, 0.6))


def test_uniform_mask_counts():
    """Fails if the number dropped is rounded up or the most salient channels go."""
    x = features(generator(3)) + 0.01
    mask = uniform_mask(x, 0.45)
    assert mask.sum(1).tolist() == [5.0] * 6  # 8 - floor(3.6)
    peak = channel_saliency(x)
    kept = peak.masked_fill(mask == 0, math.inf).amin(1)
    gone = peak.masked_fill(mask == 1, 0.0).amax(1)
    assert (kept >= gone).all()
    x[:, 0] = 0.0
    assert uniform_mask(x, 0.0)[:, 0].sum() == 0


def test_binarize_is_a_step_with_the_gradient_of_the_sigmoid():
    """Fails if the gradient is that of the identity, or zero counts as on."""
    z = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    hard = binarize(z)
    assert hard.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((hard * weight).sum(), z)
    s = z.detach().sigmoid()
    torch.testing.assert_close(gradient, weight * s * (1 - s))


def test_mask_loss_against_loops():
    """Fails if channels are averaged, or layers summed."""
    g = generator(4)
    logits = [torch.randn(3, c, generator=g, dtype=torch.float64) for c in (2, 5)]
    targets = [(torch.rand(3, c, generator=g) > 0.5).double() for c in (2, 5)]
    total = 0.0
    for p, t in zip(logits, targets):
        for row, goal in zip(p.tolist(), t.tolist()):
            for z, y in zip(row, goal):
                total += (math.log1p(math.exp(-z)) + (1 - y) * z) / 3 / 2
    assert mask_prediction_loss(logits, targets).item() == pytest.approx(total, rel=1e-12)
    for p in logits:
        p.requires_grad_()
    assert torch.autograd.gradcheck(lambda *p: mask_prediction_loss(p, targets), logits)


# --- work --------------------------------------------------------------------------------------


def test_conv_macs_against_loops():
    """Fails if only one side of a layer counts."""
    layers = [(3, 4, 3, 5, 5), (4, 2, 1, 3, 2)]
    g = generator(5)
    masks = [(torch.rand(6, c, generator=g) > 0.4).double() for c in (4, 2)]
    for n, value in enumerate(conv_macs(masks, layers)):
        a, b = masks[0][n].sum().item(), masks[1][n].sum().item()
        assert value.item() == 25 * 9 * 3 * a + 6 * a * b
    ones = [torch.ones(1, 4), torch.ones(1, 2)]
    assert flops_reduction(ones, layers).item() == 0.0
    assert flops_reduction([torch.zeros(1, 4), torch.zeros(1, 2)], layers).item() == 1.0


# --- layers and networks -----------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("softmax", [False, True])
def test_head_against_formula(pool, softmax):
    """Fails if the softmax runs over the batch, or the pools are confused."""
    head = MaskPredictor(8, 3, pool, softmax).double()
    x = features(generator(6))
    for sample, logits in zip(x, head(x)):
        flat = sample.flatten(1)
        pooled = flat.max(1).values if pool == "max" else flat.sum(1) / 9
        if softmax:
            pooled = pooled.exp() / pooled.exp().sum()
        torch.testing.assert_close(logits, head.linear.weight @ pooled + head.linear.bias)


def test_modes_differ_in_what_the_mask_loss_reaches():
    """Decoupled: no gradient of the mask loss in the input. Fails if the detach is dropped."""
    for mode, reaches in (("decoupled", False), ("joint", True)):
        with seeded(0):
            layer = DynamicConv2d(nn.Conv2d(2, 4, 3), nn.Identity(), nn.ReLU(), 0.7, mode)
        x = torch.rand(5, 2, 6, 6, requires_grad=True)
        out, logits, target, mask = layer(x)
        loss = mask_prediction_loss([logits], [target])
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == reaches
        # In both, the task reaches the head through the straight-through mask.
        assert torch.autograd.grad(out.sum(), layer.head.linear.bias)[0].abs().sum() > 0
        assert out[mask == 0].abs().sum() == 0


def test_open_bias_and_mass_and_target_function_matter():
    """Fails if the bias is not set, or a function as target is ignored."""
    net, _ = small()
    x = torch.randn(9, 1, 8, 8, generator=generator(7)).double()
    assert all(m.min() == 1 for m in DynamicNet(net, 0.8, open_bias=50.0)(x).masks)
    assert all(m.max() == 0 for m in DynamicNet(net, 0.8, open_bias=-50.0)(x).masks)
    low, high = (DynamicNet(net, r)(x).targets[0].sum() for r in (0.5, 0.95))
    assert low < high
    half = DynamicNet(net, lambda f: uniform_mask(f, 0.5))(x).targets
    assert torch.equal(half[0], uniform_mask(net.features(x)[0], 0.5))


def test_masks_of_ones_change_nothing_and_given_masks_are_applied():
    """Fails if masks are applied before the ReLU's neighbor layer sees the features."""
    net, dyn = small()
    x = torch.randn(7, 1, 8, 8, generator=generator(8)).double()
    ones = [torch.ones(1, c).double() for c in (4, 6, 5)]
    torch.testing.assert_close(forward_with_masks(net, x, ones), net(x))
    out = dyn(x)
    torch.testing.assert_close(forward_with_masks(dyn, x, out.masks), out.logits)
    assert not torch.allclose(forward_with_masks(dyn, x, ones), out.logits)


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_skipping_is_exact(pool, group):
    """Same scores as masking; for single images the work is the counted one.

    Fails if live channels are scattered in the wrong order, or the group's union is not masked.
    """
    _, dyn = small(pool=pool)
    x = torch.randn(7, 1, 8, 8, generator=generator(9)).double()
    out, fast = dyn(x), deploy(dyn)
    assert 0 < out.masks[1].mean() < 1
    scores, macs = fast.skipping(x, group=group)
    torch.testing.assert_close(scores, out.logits)
    torch.testing.assert_close(fast.masked(x), out.logits)
    counted = conv_macs(out.masks, [(1, 4, 3, 4, 4), (4, 6, 3, 4, 4), (6, 5, 3, 4, 4)])
    if group == 1:
        assert macs.tolist() == counted.tolist()
    else:
        assert (macs >= counted).all()


def test_skipping_with_a_layer_that_is_off():
    """Fails if an empty layer stops the convolution, or its successor forgets its bias."""
    _, dyn = small()
    dyn.blocks[1].head.linear.bias.data.fill_(-1e3)
    x = torch.randn(4, 1, 8, 8, generator=generator(10)).double()
    scores, macs = deploy(dyn).skipping(x)
    torch.testing.assert_close(scores, dyn(x).logits)
    counted = conv_macs(dyn(x).masks, [(1, 4, 3, 4, 4), (4, 6, 3, 4, 4), (6, 5, 3, 4, 4)])
    assert macs.tolist() == counted.tolist()


# --- training ----------------------------------------------------------------------------------


def task(n=24):
    g = generator(11)
    x, y = torch.randn(n, 1, 8, 8, generator=g).double(), torch.randint(0, 3, (n,), generator=g)
    return x, y


def test_fit_against_a_plain_loop():
    """Two networks side by side are trained as by torch.optim, one after the other.

    Fails if the mask loss is averaged over networks, heads decay, or the rate is not a cosine.
    """
    x, y = task()
    net, _ = small()
    pair = [DynamicNet(net, r, softmax=False) for r in (0.7, 0.9)]
    with seeded(1):
        alone = [DynamicNet(net, r, softmax=False) for r in (0.7, 0.9)]
    for a, b in zip(pair, alone):
        b.load_state_dict(a.state_dict())
    settings = {"epochs": 2, "batch_size": 10, "lr": 0.05, "head_lr": 0.5, "cooldown": 0.5}
    losses = fit(pair, [x] * 2, [y] * 2, generators=[generator(3), generator(4)], **settings)
    for k, model in enumerate(alone):
        heads = [p for name, p in model.named_parameters() if ".head." in name]
        body = [p for name, p in model.named_parameters() if ".head." not in name]
        opt = torch.optim.SGD(
            [
                {"params": body, "lr": 0.05, "weight_decay": 5e-4},
                {"params": heads, "lr": 0.5, "weight_decay": 0.0},
            ],
            momentum=0.9,
        )
        model.train()
        g, step = generator(3 + k), 0
        for _ in range(2):
            for index in torch.randperm(24, generator=g).split(10):
                factor = 0.5 * (1 + math.cos(math.pi * step / 6))
                opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = 0.05 * factor, 0.5 * factor
                out = model(x[index])
                ce = nn.functional.cross_entropy(out.logits, y[index])
                bce = mask_prediction_loss(out.mask_logits, out.targets)
                opt.zero_grad()
                (ce + (bce if step < 3 else 0.0)).backward()
                if step >= 3:
                    for p in heads:
                        p.grad = None  # frozen
                opt.step()
                torch.testing.assert_close(losses[k, step], torch.stack([ce, bce]).detach())
                step += 1
        for name, p in model.state_dict().items():
            torch.testing.assert_close(pair[k].state_dict()[name], p)


def test_frozen_heads_stay_and_free_heads_move():
    """Fails if ``freeze_heads``, ``cooldown`` or ``mask_weight`` is ignored."""
    x, y = task()
    _, dyn = small()
    before = {k: v.clone() for k, v in dyn.state_dict().items()}
    runs = {}
    for name, options in {
        "frozen": {"cooldown": 1.0, "freeze_heads": True},
        "free": {"cooldown": 1.0, "freeze_heads": False},
        "on": {"cooldown": 0.0},
        "heavy": {"cooldown": 0.0, "mask_weight": 3.0},
        "slow": {"cooldown": 0.0, "head_lr": 0.01},
        "still": {"cooldown": 0.0, "momentum": 0.0},
        "decayed": {"cooldown": 0.0, "weight_decay": 0.1},
        "small": {"cooldown": 0.0, "lr": 1e-4},
    }.items():
        dyn.load_state_dict(before)
        fit([dyn], [x], [y], generators=[generator(1)], epochs=1, batch_size=8, **options)
        key = "classifier.weight" if name in ("decayed", "small") else "blocks.1.head.linear.weight"
        runs[name] = dyn.state_dict()[key].clone()
    start = before["blocks.1.head.linear.weight"]
    assert torch.equal(runs["frozen"], start)
    others = [runs[name] for name in ("free", "on", "heavy", "slow", "still")]
    assert all(not torch.allclose(value, start, atol=1e-9) for value in others)
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(others))
    assert not torch.allclose(runs["decayed"], runs["small"])


def test_heads_learn_their_targets():
    """Fails if the mask loss has the wrong sign or does not reach the heads."""
    x, y = task(200)
    net, _ = small()
    dyn = DynamicNet(net, 0.7, softmax=False)
    args = {
        "generators": [generator(1)],
        "batch_size": 20,
        "cooldown": 0.0,
        "lr": 0.0,
        "head_lr": 0.1,
    }
    losses = fit([dyn], [x], [y], epochs=8, **args)[0, :, 1]
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: channel_saliency(x[0]), "features must have shape"),
        (lambda x: mass_mask(x, 0.0), "mass must lie in"),
        (lambda x: mass_mask(x, 0.5, 9), "min_channels must lie in"),
        (lambda x: uniform_mask(x, 1.0), "prune_ratio must lie in"),
        (lambda x: mask_prediction_loss([], []), "logits and targets must be lists"),
        (lambda x: mask_prediction_loss([x], [x[:1]]), "logits and targets must be lists"),
        (lambda x: conv_macs([x], [(1, 8, 3, 3, 3)]), "masks must be one"),
        (lambda x: MaskPredictor(0, 1), "in_channels and out_channels"),
        (lambda x: MaskPredictor(1, 1, "median"), "in_channels and out_channels"),
        (lambda x: DynamicNet(small()[0], 1.5), "mass must lie in"),
        (lambda x: DynamicNet(small()[0], 0.5, "free"), "mode must be"),
        (lambda x: forward_with_masks(small()[0], x, []), "masks must be one tensor"),
        (lambda x: deploy(small()[0]).masked(x), "heads are needed"),
        (lambda x: deploy(small()[1]).skipping(x, group=0), "group must be at least 1"),
        (lambda x: fit([], [], [], generators=[]), "nets, x, y and generators must match"),
    ],
)
def test_bad_values(call, text):
    with pytest.raises(ValueError, match=text):
        call(features(generator(0)))


def test_bad_types_and_settings():
    with pytest.raises(TypeError, match="logits must be floating point"):
        binarize(torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="net must be a ConvNet"):
        deploy(nn.Linear(1, 1))
    x, y = task()
    for bad in ({"epochs": 0}, {"cooldown": 1.5}, {"mask_weight": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="epochs and batch_size"):
            fit([small()[0]], [x], [y], generators=[generator(0)], **bad)


# --- contract ----------------------------------------------------------------------------------


def _net(x):
    with seeded(0):
        return ConvNet(1, [3, 4], 2, strides=[2, 1]).to(x).eval()


def _dyn(x):
    net = _net(x)
    with seeded(1):
        return DynamicNet(net, 0.8, softmax=False, open_bias=0.0).eval()


def _images(g):
    return (torch.randn(4, 1, 6, 6, generator=g),)


def _maps(g):
    return (torch.randn(4, 5, 3, 3, generator=g).relu(),)


def _masks(g):
    return tuple((torch.rand(4, c, generator=g) > 0.5).float() for c in (3, 4))


def _fit(x):
    y = torch.tensor([0, 1, 0, 1], device=x.device)
    return fit([_dyn(x)], [x], [y], generators=[generator(0)], epochs=1, batch_size=2)


def _layer(x):
    with seeded(0):
        return DynamicConv2d(nn.Conv2d(1, 3, 3).to(x), nn.Identity(), nn.ReLU(), 0.8)(x)


TABLE = [(1, 3, 3, 3, 3), (3, 4, 3, 3, 3)]
CASES = {
    "channel_saliency": Case(inputs=_maps, call=channel_saliency),
    "mass_mask": Case(inputs=_maps, call=lambda x: mass_mask(x, 0.8)),
    "uniform_mask": Case(inputs=_maps, call=lambda x: uniform_mask(x, 0.5)),
    "binarize": Case(inputs=lambda g: (torch.randn(4, 3, generator=g),), call=binarize),
    "mask_prediction_loss": Case(
        inputs=lambda g: (torch.randn(4, 3, generator=g), _masks(g)[0]),
        call=lambda p, t: mask_prediction_loss([p], [t]),
    ),
    "conv_macs": Case(inputs=_masks, call=lambda a, b: conv_macs([a, b], TABLE)),
    "flops_reduction": Case(inputs=_masks, call=lambda a, b: flops_reduction([a, b], TABLE)),
    "MaskPredictor": Case(inputs=_maps, call=lambda x: _head(x)(x)),
    "DynamicConv2d": Case(inputs=_images, call=_layer),
    "DynamicNet": Case(inputs=_images, call=lambda x: tuple(_flat(_dyn(x)(x)))),
    "forward_with_masks": Case(
        inputs=lambda g: (*_images(g), *_masks(g)),
        call=lambda x, a, b: forward_with_masks(_net(x), x, [a, b]),
    ),
    "deploy": Case(inputs=_images, call=lambda x: deploy(_dyn(x)).skipping(x)),
    "fit": Case(inputs=_images, call=_fit),
}


def _head(x):
    with seeded(0):
        return MaskPredictor(5, 2).to(x)


def _flat(out):
    return [out.logits, *out.mask_logits, *out.targets, *out.masks]


def test_masks_and_losses_of_no_images_are_refused():
    with pytest.raises(ValueError, match="n at least 1"):
        mask_prediction_loss([torch.zeros(0, 2)], [torch.zeros(0, 2)])
    net = ConvNet(1, [4], 2, strides=[1]).eval()
    with pytest.raises(ValueError, match="1 or 3 rows"):
        forward_with_masks(net, torch.ones(3, 1, 5, 5), [torch.zeros(2, 4)])
