"""Tests of wellposed.methods.language_models.scaling_training."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from contract import Case
from wellposed.data.text import Corpus
from wellposed.methods.language_models.scaling_training import (
    _order,
    _rate_factor,
    train_char_lm,
    train_classifiers,
    train_sweep,
)
from wellposed.nets.char_lm import CharLM
from wellposed.nets.transformer import Transformer

TEXT = torch.randint(0, 5, (900,), generator=torch.Generator().manual_seed(0))


def train(model, rates=0.01, *, text=TEXT, seed=0, **options):
    settings = {"steps": 6, "batch_size": 4, "valid_tokens": TEXT[:60], "test_tokens": TEXT[60:130]}
    return train_char_lm(
        text, model, rates, generator=torch.Generator().manual_seed(seed), **(settings | options)
    )


def sweep(text=TEXT, **options):
    corpus = Corpus(text, text[:60], text[60:130], tuple("abcde"))
    settings = {"rates": [0.01, 0.02], "seeds": [1, 2, 3], "steps": 6, "batch_size": 4}
    return train_sweep(corpus, lambda seeds: CharLM(5, 4, 6, seeds=seeds), **(settings | options))


CASES = {
    "train_char_lm": Case(
        inputs=lambda g: (TEXT,),
        call=lambda text: train(CharLM(5, 4, 6), text=text),
        keeps_dtype=False,
        on_device=False,
    ),
    "train_sweep": Case(
        inputs=lambda g: (TEXT,),
        call=lambda text: sweep(text=text),
        keeps_dtype=False,
        on_device=False,
    ),
    "train_classifiers": Case(
        inputs=lambda g: (torch.randn(8, 3, generator=g), torch.arange(8) % 2),
        call=lambda x, y: train_classifiers(x, y, x, y, [0.1, 0.2], seeds=[0], steps=5, width=4),
    ),
}


def reference(tokens, weights, rate, *, windows, l2, decay, max_norm, steps):
    """One network with torch's Adam and clipping, a window at a time."""
    table, *layers = [w.clone().requires_grad_() for w in weights]
    params = [table, *layers]
    adam = torch.optim.Adam(params, lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        adam.zero_grad()
        loss = torch.zeros((), dtype=table.dtype)
        for start in windows[step].tolist():
            h = torch.cat([table[t] for t in tokens[start : start + 3].tolist()])
            for layer in layers[:-1]:
                h = (h @ layer).relu()
            loss = loss - (h @ layers[-1]).log_softmax(0)[tokens[start + 3]] / len(windows[step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        factor = _rate_factor(step, steps)
        adam.param_groups[0]["lr"] = rate * factor
        with torch.no_grad():
            for p in params:
                p.mul_(1 - rate * factor * decay)
                p.grad.add_(l2 * p)
        adam.step()
    return params


@pytest.mark.parametrize(("l2", "decay"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5)])
def test_training_is_that_of_a_plain_loop(l2, decay):
    """Fails if the order, the clipping, the schedule or either penalty is another one."""
    steps, batch = 5, 6
    net = CharLM(5, 3, 4, depth=2, embed_dim=2, seeds=(3, 4)).double()
    start = [part[1].detach().clone() for part in net.parts(net.weights)]
    g = torch.Generator().manual_seed(9)
    orders = [_order(len(TEXT) - 3, steps * batch, None, g) for _ in range(2)]
    rates = [0.02, 0.05]
    # With L2 the decay differs from step to step by the second moment's rounding alone.
    train(net, rates, steps=steps, batch_size=batch, seed=9, l2=[0.0, l2],
          decoupled_decay=[0.3, decay], max_norm=0.7)  # fmt: skip
    found = [part[1] for part in net.parts(net.weights)]
    windows = orders[1].view(steps, batch)
    expected = reference(TEXT, start, rates[1], windows=windows, l2=l2, decay=decay,
                         max_norm=0.7, steps=steps)  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["perceptron", "transformer"])
def test_side_by_side_is_as_if_alone(kind):
    """Fails if networks share a gradient norm, a rate or an order of windows."""

    def make(seeds):
        if kind == "perceptron":
            return CharLM(5, 4, 6, seeds=seeds).double()
        return Transformer(5, 4, 6, depth=1, seeds=seeds).double()

    both, rates = train(make((7, 7)), [0.02, 0.05], evaluations=3), (0.02, 0.05)
    for i, rate in enumerate(rates):
        alone = train(make((7,)), rate, evaluations=3)
        torch.testing.assert_close(both.test_loss[i], alone.test_loss[0])
        torch.testing.assert_close(both.valid_curve[i], alone.valid_curve[0])
    assert both.valid_curve.shape == (2, 3)
    assert both.steps == 6
    assert both.test_loss[0] != both.test_loss[1]


@pytest.mark.parametrize(
    "change",
    [
        {"rates": 0.02},
        {"steps": 7},
        {"batch_size": 5},
        {"l2": 0.1},
        {"decoupled_decay": 0.5},
        {"pool_size": 5},
        {"max_norm": None},
        {"betas": (0.9, 0.5)},
        {"seed": 1},
    ],
)
def test_every_setting_matters(change):
    def loss(**options):
        return train(CharLM(5, 4, 6), **({"rates": 0.01} | options)).test_loss.item()

    assert loss() == loss()
    assert loss(**change) != loss()


def test_one_pass_sees_each_window_once_and_a_pool_in_epochs():
    """Fails if fresh windows are drawn with replacement."""
    g = torch.Generator().manual_seed(0)
    once = _order(50, 50, None, g)
    assert once.sort().values.tolist() == list(range(50))
    epochs = _order(50, 12, 4, g).view(3, 4).sort(1).values
    assert (epochs == epochs[0]).all()
    assert len(set(epochs[0].tolist())) == 4


def test_the_rate_rises_and_falls():
    factors = [_rate_factor(i, 100) for i in range(100)]
    assert max(factors) == factors[9] == 1.0
    assert factors[0] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[9:]))
    assert factors[-1] < 1e-3


@pytest.mark.parametrize("kind", ["perceptron", "transformer"])
def test_a_periodic_text_is_learned(kind):
    """The loss falls to zero for a text without entropy."""
    text = torch.arange(4).repeat(200)
    net = CharLM(4, 4, 16) if kind == "perceptron" else Transformer(4, 4, 16, depth=1)
    done = train(net, 0.02, text=text, steps=40, batch_size=4,
                 valid_tokens=text[:80], test_tokens=text[:80])  # fmt: skip
    assert done.test_loss.item() < 0.05
    assert done.valid_curve.shape == (1, 1)


def test_divergence_is_infinite_and_stays_in_its_network():
    net = CharLM(5, 4, 6, seeds=(0, 0))
    done = train(net, [1e30, 0.01], steps=8, max_norm=None)
    assert done.test_loss[0] > 1e3
    assert math.isfinite(done.test_loss[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"steps": 400}, "one pass needs"),
        ({"pool_size": 5000}, "pool_size must be in"),
        ({"text": TEXT.float()}, "tokens must be int64"),
        ({"valid_tokens": TEXT[:3]}, "valid_tokens must be int64"),
        ({"rates": [0.1, 0.2]}, "lr must be one number"),
    ],
)
def test_bad_training(options, message):
    with pytest.raises(ValueError, match=message):
        train(CharLM(5, 4, 6), **options)


def test_classifiers_agree_with_torchs_sgd():
    """One network alone, by torch.optim; fails if momentum or the loss's mean is another one."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=g).double(), torch.randint(0, 3, (30,), generator=g)
    y[0] = 2
    _, found = train_classifiers(x, y, x, y, [0.01, 0.05], seeds=[5], width=6, steps=30)
    own = torch.Generator().manual_seed(5)
    layers = [
        (math.sqrt(2 / i) * torch.randn(i, o, generator=own).double()).requires_grad_()
        for i, o in ((4, 6), (6, 6), (6, 3))
    ]
    draws = torch.randint(30, (30, 32), generator=own)
    sgd = torch.optim.SGD(layers, lr=0.05, momentum=0.9)
    for rows in draws:
        sgd.zero_grad()
        h = (((x[rows] @ layers[0]).relu() @ layers[1]).relu()) @ layers[2]
        F.cross_entropy(h, y[rows]).backward()
        sgd.step()
    h = (((x @ layers[0]).relu() @ layers[1]).relu()) @ layers[2]
    assert found[0, 1].item() == pytest.approx((h.argmax(1) != y).double().mean().item())


def test_bad_classifiers():
    x, y = torch.zeros(4, 2), torch.arange(4)
    with pytest.raises(ValueError, match="at least 1"):
        train_classifiers(x, y, x, y, [0.1], seeds=[0], steps=0)
    with pytest.raises(ValueError, match="labels"):
        train_classifiers(x, y[:2], x, y, [0.1], seeds=[0])
    for option in ({"momentum": 0.0}, {"width": 8}, {"batch_size": 3}, {"steps": 9}):
        a = train_classifiers(x + torch.eye(4, 2), y, x, y, [0.3], seeds=[0])
        assert a[0].shape == (1, 1), option


def test_a_sweep_is_its_trainings():
    """Rows are seeds; fails if settings and seeds are mixed up, or a setting is not passed on."""
    one = sweep(seeds=[2], l2=[0.0, 0.3], evaluations=2)
    alone = train(CharLM(5, 4, 6, seeds=[2]), 0.02, seed=2, l2=0.3, evaluations=2)
    torch.testing.assert_close(one.test_loss[0, 1], alone.test_loss[0].double())
    torch.testing.assert_close(one.valid_curve[0, 1], alone.valid_curve[0].double())
    apart = sweep(at_once=1)
    assert apart.test_loss.shape == (3, 2)
    torch.testing.assert_close(apart.test_loss[1:2], sweep(seeds=[2]).test_loss)
    together = sweep()
    torch.testing.assert_close(apart.test_loss[0], together.test_loss[0])
    best, losses = together.chosen()
    assert best == together.valid_loss.mean(0).argmin()
    assert torch.equal(losses, together.test_loss[:, best])
    base = sweep().test_loss
    for option in (
        {"decoupled_decay": [0.1, 0.2]},
        {"pool_size": 5},
        {"max_norm": None},
        {"betas": (0.9, 0.5)},
    ):
        assert not torch.equal(sweep(**option).test_loss, base), option


def test_bad_sweeps():
    with pytest.raises(ValueError, match="l2 must have 2 entries"):
        sweep(l2=[0.1])
    with pytest.raises(ValueError, match="must not be empty"):
        sweep(seeds=[])
