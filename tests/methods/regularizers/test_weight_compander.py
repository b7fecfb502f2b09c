"""Weight compander: the formula against loops, the parametrization, and training side by side."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from contract import Case
from wellposed.methods.regularizers.weight_compander import (
    Splits,
    WeightCompander,
    apply_weight_compander,
    compand,
    compand_inverse,
    make_splits,
    train_side_by_side,
    weight_statistics,
)
from wellposed.nets import MLP
from wellposed.train import seeded

FIELDS = ("train_error", "val_error", "test_error", "train_nll", "val_nll", "test_nll")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def free(*shape, dtype=torch.float64, seed=0):
    return 3 * torch.randn(*shape, generator=gen(seed), dtype=dtype)


def net(seed=0, sizes=(6, 5, 3), dtype=torch.float64, dropout=0.0):
    with seeded(seed):
        if dropout:
            return MLP(sizes, activation=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(dropout))).to(
                dtype
            )
        return MLP(sizes).to(dtype)


def task(seeds, dtype=torch.float64):
    x = torch.randn(60, 6, generator=gen(3), dtype=dtype)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return make_splits(x, y, num_train=24, num_val=16, num_test=20, seeds=seeds)


def train(models, seeds, **options):
    options = {"epochs": 3, "batch_size": 8, "lr": 0.1} | options
    return train_side_by_side(models, task(seeds), seeds=seeds, **options)


def same(one, two, **tolerance):
    for name in FIELDS:
        torch.testing.assert_close(getattr(one, name), getattr(two, name), **tolerance)


# --- the curve -------------------------------------------------------------------------------


def test_curve_against_loops():
    """Fails if a and b are swapped."""
    v = free(4, 3)
    slow = [0.7 * math.atan(value / 0.3) for value in v.flatten().tolist()]
    assert compand(v, 0.7, 0.3).flatten().tolist() == pytest.approx(slow, rel=1e-13)


def test_inverse_undoes_the_curve():
    """Fails if the inverse multiplies by a instead of b."""
    v = free(50)
    torch.testing.assert_close(compand_inverse(compand(v, 0.7, 0.3), 0.7, 0.3), v)


def test_curve_is_odd_bounded_and_increasing():
    v = torch.linspace(-1e3, 1e3, 2001, dtype=torch.float64)
    w = compand(v, 0.7, 0.3)
    torch.testing.assert_close(w, -w.flip(0))
    assert (w.abs() < 0.7 * math.pi / 2).all()
    assert (w.diff() > 0).all()


def test_slope_is_the_papers():
    """Psi' = (a / b) / (1 + (v / b)^2); fails if b drops out of the slope."""
    v = free(20).requires_grad_()
    (slope,) = torch.autograd.grad(compand(v, 0.7, 0.3).sum(), v)
    torch.testing.assert_close(slope, 0.7 / 0.3 / (1 + (v.detach() / 0.3) ** 2))


def test_gradients_in_both_scales():
    """dPsi/da = arctan(v/b) and dPsi/db = -a v / (b^2 + v^2)."""
    v = free(7)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compand, (v.requires_grad_(), a, b))
    for i, value in enumerate(v.tolist()):
        by_a, by_b = torch.autograd.grad(compand(v[i], a, b), (a, b))
        assert by_a.item() == pytest.approx(math.atan(value / 0.3))
        assert by_b.item() == pytest.approx(-0.7 * value / (0.09 + value**2))


def test_wide_curve_is_a_line():
    """b to infinity at fixed a / b: arctan(u) = u."""
    v = free(20)
    torch.testing.assert_close(compand(v, 2e6, 1e6), 2 * v, rtol=1e-9, atol=0)


@pytest.mark.parametrize("function", [compand, compand_inverse])
@pytest.mark.parametrize(("a", "b", "name"), [(0.0, 1.0, "a"), (1.0, -1.0, "b"), (1.0, 0.0, "b")])
def test_refuses_scales_that_are_not_positive(function, a, b, name):
    for kind in (float, torch.tensor):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            function(torch.zeros(2), kind(a), kind(b))


@pytest.mark.parametrize("w", [math.pi / 2, -2.0, math.nan])
def test_inverse_refuses_weights_out_of_range(w):
    """Fails if the bound is checked on one side only, or if NaN slips through."""
    with pytest.raises(ValueError, match=r"w must be smaller than a \* pi / 2"):
        compand_inverse(torch.tensor([0.1, w]), 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    v = free(5).to(dtype)
    assert compand(v, 2.0, 1.0).dtype == dtype
    layer = apply_weight_compander(nn.Linear(3, 2).to(dtype))
    assert layer.weight.dtype == dtype
    assert layer.parametrizations.weight[0].a.dtype == dtype


# --- the parametrization ---------------------------------------------------------------------


def test_module_is_the_function():
    v, module = free(4, 3), WeightCompander(0.7, 0.3, dtype=torch.float64)
    torch.testing.assert_close(module(v), compand(v, 0.7, 0.3))
    assert module.a.item() == pytest.approx(0.7)
    assert module.b.item() == pytest.approx(0.3)
    w = compand(v.clamp(-1, 1), 0.7, 0.3)
    torch.testing.assert_close(module.right_inverse(w), v.clamp(-1, 1))


def test_right_inverse_clamps():
    """Fails without the clamp: the tangent changes its sign past pi / 2."""
    module = WeightCompander(2.0, 1.0, dtype=torch.float64)
    v = module.right_inverse(torch.tensor([-9.0, 9.0, 3.1], dtype=torch.float64))
    top = math.tan(1.5)
    assert v.tolist() == pytest.approx([-top, top, top])


def test_scales_are_parameters_only_when_learned():
    fixed, learned = WeightCompander(2.0, 3.0), WeightCompander(2.0, 3.0, learnable=True)
    assert not list(fixed.parameters())
    assert len(list(learned.parameters())) == 2
    learned(torch.ones(3)).sum().backward()
    assert learned.log_a.grad is not None
    assert learned.log_b.grad is not None
    assert set(fixed.state_dict()) == set(learned.state_dict())


def test_applied_network_computes_the_same():
    """The function is unchanged at the start; fails if a right inverse starts elsewhere."""
    x = torch.randn(2, 3, 8, 8, generator=gen(), dtype=torch.float64)
    with seeded(0):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(1, 2), nn.Conv1d(24, 2, 3),
            nn.Flatten(), nn.Linear(8, 3),
        ).double()  # fmt: skip
    before = model(x)
    assert apply_weight_compander(model, scale=2.0) is model
    torch.testing.assert_close(model(x), before)
    companded = [m for m in model if parametrize.is_parametrized(m)]
    assert [type(m).__name__[-6:] for m in companded] == ["Conv2d", "Conv1d", "Linear"]
    assert not any(parametrize.is_parametrized(m, "bias") for m in companded)


def test_scale_is_in_standard_deviations():
    layer = net()[1]
    spread = layer.weight.std(correction=0).item()
    for scale in (2.0, 4.0):
        layer = net()[1]
        compander = apply_weight_compander(layer, scale=scale).parametrizations.weight[0]
        assert compander.a.item() == pytest.approx(scale * spread)
        assert compander.b.item() == pytest.approx(scale * spread)


def test_gradient_step_in_the_weight():
    """A step on v moves w by -lr Psi'^2 dL/dw; fails if the slope enters once only."""
    layer = apply_weight_compander(nn.Linear(4, 3).double(), scale=2.0)
    x, before = free(5, 4), layer.weight.detach().clone()
    v = layer.parametrizations.weight.original
    b = layer.parametrizations.weight[0].b.item()
    torch.autograd.grad(layer(x).square().sum(), v)
    plain = before.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.linear(x, plain, layer.bias.detach()).square().sum(), plain)
    layer(x).square().sum().backward()
    torch.optim.SGD([v], lr=1e-7).step()
    slope = 1 / (1 + (compand_inverse(before, b, b) / b) ** 2)
    torch.testing.assert_close(layer.weight - before, -1e-7 * slope**2 * grad, rtol=1e-4, atol=0)


def test_fixed_b_is_a_learning_rate():
    """With SGD, b and lr enter through lr / b^2 alone, also with momentum and weight decay."""
    outputs = []
    for b, lr in ((0.5, 0.01), (1.5, 0.09)):
        layer = nn.Linear(4, 3, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(0.1 * free(3, 4))
        compander = WeightCompander(0.8, b, dtype=torch.float64)
        parametrize.register_parametrization(layer, "weight", compander)
        decay = 0.1 * 0.01 / lr  # the shrinkage a step, lr * decay, is held fixed
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
        for step in range(20):
            optimizer.zero_grad()
            layer(free(5, 4, seed=step)).square().mean().backward()
            optimizer.step()
        outputs.append(layer.weight.detach())
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_refuses_a_bad_scale(scale):
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        apply_weight_compander(nn.Linear(2, 2), scale=scale)


def test_refuses_modules_it_cannot_treat():
    with pytest.raises(ValueError, match="module must contain a Linear"):
        apply_weight_compander(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="must not have parametrized weights"):
        apply_weight_compander(apply_weight_compander(nn.Linear(2, 2)))
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="weights that differ"):
        apply_weight_compander(layer)
    for a, b in ((0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="must be positive"):
            WeightCompander(a, b)


def test_survives_copy_and_state_dict():
    model = apply_weight_compander(net(), learnable=True)
    other = apply_weight_compander(net(seed=1), learnable=True)
    other.load_state_dict(model.state_dict())
    x = free(3, 6)
    torch.testing.assert_close(other(x), model(x))


# --- splits and training ---------------------------------------------------------------------


def test_splits_are_disjoint_and_follow_their_seed():
    splits = task([5, 6, 5])
    assert isinstance(splits, Splits)
    together = torch.cat([splits.train, splits.val, splits.test], dim=1)
    assert torch.equal(together.sort(1).values, torch.arange(60).expand(3, 60))
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("sizes", "seeds", "text"),
    [((0, 1, 1), [0], "positive"), ((2, 2, 2), [0], "at most 5"), ((1, 1, 1), [], "pair up")],
)
def test_splits_refuse(sizes, seeds, text):
    train, val, test = sizes
    with pytest.raises(ValueError, match=text):
        make_splits(
            torch.zeros(5, 1), torch.zeros(5).long(),
            num_train=train, num_val=val, num_test=test, seeds=seeds,
        )  # fmt: skip


def loop(model, seed, *, epochs, batch_size, lr, momentum, weight_decay, clip=math.inf):
    """One network alone, momentum SGD written out."""
    splits = task([seed])
    x, y = splits.x, splits.y
    params = list(model.parameters())
    speed = [torch.zeros_like(p) for p in params]
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bounds = [clip * math.pi / 2 * p.std(correction=0) for p in params]
    for epoch in range(epochs):
        rate = lr * (1 if epoch < epochs / 2 else 0.1 if epoch < 3 * epochs / 4 else 0.01)
        order = splits.train[0][torch.randperm(splits.train.shape[1], generator=g)]
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            grads = torch.autograd.grad(F.cross_entropy(model(x[index]), y[index]), params)
            with torch.no_grad():
                for p, v, grad, bound in zip(params, speed, grads, bounds):
                    matrix = p.ndim > 1
                    v.mul_(momentum).add_(grad + weight_decay * p * matrix)
                    p.sub_(rate * v)
                    if matrix and clip < math.inf:
                        p.copy_(torch.minimum(torch.maximum(p, -bound), bound))
    with torch.no_grad():
        logits, target = model(x[splits.test[0]]), y[splits.test[0]]
        wrong = (logits.argmax(1) != target).double().mean()
        return torch.stack([wrong, F.cross_entropy(logits, target)])


@pytest.mark.parametrize("companded", [False, True])
@pytest.mark.parametrize("clip", [math.inf, 0.8])
def test_training_against_a_loop(companded, clip):
    """Fails if networks share a loss average, if biases decay, or if the drops come too late."""
    options = {"epochs": 8, "batch_size": 7, "lr": 0.2, "momentum": 0.8, "weight_decay": 0.05}
    if companded and clip < math.inf:
        pytest.skip("clipping is for plain networks")
    make = apply_weight_compander if companded else lambda model: model
    models, seeds = [make(net(0)), make(net(1))], [4, 5]
    run = train(models, seeds, clip_scale=clip, **options)
    for i, seed in enumerate(seeds):
        alone = make(net(i))
        error, nll = loop(alone, seed, clip=clip, **options)
        assert run.test_error[i].item() == pytest.approx(error.item(), abs=1e-12)
        assert run.test_nll[i].item() == pytest.approx(nll.item(), rel=1e-9)
        torch.testing.assert_close(models[i](free(3, 6)), alone(free(3, 6)))


def test_each_network_has_its_own_constants():
    """Fails if the first learning rate or weight decay serves all."""
    both = train([net(0), net(0)], [4, 4], lr=[0.1, 0.3], weight_decay=[0.0, 0.05])
    for i, (lr, decay) in enumerate([(0.1, 0.0), (0.3, 0.05)]):
        alone = train([net(0)], [4], lr=lr, weight_decay=decay)
        torch.testing.assert_close(both.test_nll[i : i + 1], alone.test_nll)
        same(both.part(slice(i, i + 1)), alone)


def test_each_network_has_its_own_bound_and_scalar_rate():
    """Fails if one bound serves all, or if factor 0 does not keep the scalars where they are."""
    both = train([net(0), net(0)], [4, 4], clip_scale=[math.inf, 0.7])
    for i, clip in enumerate([math.inf, 0.7]):
        same(both.part(slice(i, i + 1)), train([net(0)], [4], clip_scale=clip))
    models = [apply_weight_compander(net(0), learnable=True) for _ in range(2)]
    both = train(models, [4, 4], scalar_lr_factor=[0.0, 0.5])
    same(both.part(slice(0, 1)), train([apply_weight_compander(net(0))], [4]))
    alone = [apply_weight_compander(net(0), learnable=True)]
    same(both.part(slice(1, 2)), train(alone, [4], scalar_lr_factor=0.5))
    assert both.test_nll[0] != both.test_nll[1]


@pytest.mark.parametrize(
    "change",
    [{"epochs": 4}, {"batch_size": 6}, {"lr": 0.2}, {"momentum": 0.5}, {"weight_decay": 0.1},
     {"clip_scale": 0.7}, {"scalar_lr_factor": 0.0}],
)  # fmt: skip
def test_every_constant_matters(change):
    def models():
        return [apply_weight_compander(net(0), learnable=True)]

    assert train(models(), [4]).train_nll != train(models(), [4], **change).train_nll


def test_weight_decay_spares_biases_and_learned_scales():
    """Fails if decay reaches the scalars: it would pull a and b to one."""
    model = apply_weight_compander(net(0), learnable=True)
    compander = model[1].parametrizations.weight[0]
    before = [compander.log_a.item(), model[1].bias.tolist()]
    train([model], [4], lr=1e-9, weight_decay=1e6)
    assert compander.log_a.item() == pytest.approx(before[0], abs=1e-6)
    assert model[1].bias.tolist() == pytest.approx(before[1], abs=1e-6)


def test_clipping_keeps_the_companders_bound():
    model, companded = net(0), apply_weight_compander(net(0), scale=0.9)
    train([model], [4], lr=0.5, clip_scale=0.9)
    train([companded], [4], lr=0.5)
    bound = companded[1].parametrizations.weight[0].a.item() * math.pi / 2
    assert model[1].weight.abs().max().item() == pytest.approx(bound)
    assert companded[1].weight.abs().max().item() < bound


def test_dropout_follows_the_seed():
    """Equal seeds give equal runs; fails if dropout draws outside the seeded block."""
    one, two = (train([net(0, dropout=0.5)], [4]) for _ in range(2))
    same(one, two, rtol=0, atol=0)
    assert not torch.equal(one.test_nll, train([net(0)], [4]).test_nll)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs and batch_size must be at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"momentum": 1.0}, "momentum"),
        ({"clip_scale": 0.0}, "clip_scale must be positive"),
        ({"scalar_lr_factor": -1.0}, "scalar_lr_factor"),
        ({"lr": [0.1, 0.1]}, "lr must be one number"),
        ({"weight_decay": -0.1}, "weight_decay must be one number"),
    ],
)
def test_training_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        train([net()], [4], **options)


def test_training_refuses_lengths_that_differ():
    with pytest.raises(ValueError, match="must pair up"):
        train_side_by_side([net()], task([1, 2]), seeds=[1, 2])


# --- the contract ----------------------------------------------------------------------------


def _apply(x):
    with seeded(0):
        layer = nn.Linear(4, 3).to(x.device, x.dtype)
    return apply_weight_compander(layer, scale=2.0)(x)


def _train(x, y):
    with seeded(0):
        models = [nn.Linear(4, 3).to(x.device, x.dtype) for _ in range(2)]
    splits = make_splits(x, y, num_train=8, num_val=4, num_test=4, seeds=[0, 1])
    return train_side_by_side(models, splits, seeds=[0, 1], epochs=2, batch_size=4)


CASES = {
    "compand": Case(
        inputs=lambda g: (torch.randn(4, 3, generator=g), 0.7, 0.3),
        call=lambda v, a, b: compand(v, a, b),
    ),
    "compand_inverse": Case(
        inputs=lambda g: (torch.rand(4, 3, generator=g), 0.7, 0.3),
        call=lambda w, a, b: compand_inverse(w, a, b),
    ),
    "WeightCompander": Case(
        inputs=lambda g: (torch.randn(4, 3, generator=g),),
        call=lambda v: WeightCompander(0.7, 0.3, dtype=v.dtype, device=v.device)(v),
    ),
    "apply_weight_compander": Case(inputs=lambda g: (torch.randn(5, 4, generator=g),), call=_apply),
    "weight_statistics": Case(
        inputs=lambda g: (torch.randn(50, generator=g),), call=weight_statistics
    ),
    "make_splits": Case(
        inputs=lambda g: (torch.randn(16, 4, generator=g), torch.randint(3, (16,), generator=g)),
        call=lambda x, y: make_splits(x, y, num_train=8, num_val=4, num_test=4, seeds=[0, 1]).train,
    ),
    "train_side_by_side": Case(
        inputs=lambda g: (torch.randn(16, 4, generator=g), torch.randint(3, (16,), generator=g)),
        call=_train,
    ),
}
