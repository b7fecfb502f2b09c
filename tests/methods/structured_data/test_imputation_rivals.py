"""The rivals, their training, and the training of the joint model."""

import pytest
import torch

from contract import Case
from wellposed.methods.structured_data.imputation_rivals import (
    RULES,
    FilledClassifiers,
    score,
    train_filled,
)
from wellposed.methods.structured_data.probabilistic_imputation import (
    SupNotMIWAE,
    predict_with,
    train_generators,
    train_joint,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def task(seeds: int = 1, n: int = 24):
    """Two classes that differ in the sign of a constant first channel."""
    y = torch.arange(n) % 2
    x = 0.3 * torch.randn(seeds, n, 6, 2, generator=gen())
    x[..., 0] += (2.0 * y - 1)[:, None]
    mask = torch.rand(x.shape, generator=gen(1)) > 0.4
    return x, mask, torch.full((n,), 6), y


def test_scores_by_hand():
    """Fails if the Brier score forgets the wrong classes."""
    probs = torch.tensor([[[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]])
    result = score(probs.log(), torch.tensor([0, 1]))
    assert result.accuracy.item() == 0.5
    expected = (0.09 + 0.04 + 0.01 + 0.09 + 0.49 + 0.16) / 2
    assert result.brier.item() == pytest.approx(expected)
    assert result.nll.item() == pytest.approx(-(probs[0, 0, 0].log() + probs[0, 1, 1].log()) / 2)
    assert result.ece.item() == pytest.approx(0.5 * 0.3 + 0.5 * 0.4)


def test_rules_fill_as_they_say():
    """Only the rule that reads a thing reacts to it; fails if two rules are swapped."""
    torch.manual_seed(0)
    nets = FilledClassifiers(2, 2, groups=1, hidden=4)
    x, mask, lengths, _ = task()
    zero, where = torch.zeros_like(x), (x, mask)
    base = nets(*where, zero, lengths[None])
    hidden = nets(torch.where(mask, x, torch.nan), mask, zero, lengths[None])
    torch.testing.assert_close(base, hidden)
    moved = (nets(*where, zero + 1, lengths[None]) != base).flatten(1).any(1)
    assert [r for r, m in zip(RULES, moved) if m] == ["two-stage"]
    with torch.no_grad():
        nets.decay_bias.fill_(2.0)
    moved = (nets(*where, zero, lengths[None]) != base).flatten(1).any(1)
    assert [r for r, m in zip(RULES, moved) if m] == ["GRU-D-like"]
    # Full series with the same weights: rules differ only in the mask that two of them read.
    with torch.no_grad():
        for p in (*nets.classifier.parameters(), *nets.to_class.parameters()):
            p.copy_(p[:1].expand_as(p).clone())
    out = nets(x, torch.ones_like(mask), zero, lengths[None])
    torch.testing.assert_close(out[0], out[2])
    torch.testing.assert_close(out[1], out[3])
    assert not torch.allclose(out[0], out[1])


def test_all_of_them_learn():
    """Two separable classes; fails if a loss has the wrong sign or nothing is updated."""
    x, mask, lengths, y = task(seeds=2)
    torch.manual_seed(0)
    nets = FilledClassifiers(2, 2, groups=4, hidden=6)
    model = SupNotMIWAE(2, 2, latent=2, hidden=6, copies=4)
    options = {"epochs": 30, "lr": 0.02, "batch": 12, "generator": gen(2)}
    train_filled(nets, x, mask, 0 * x, lengths, y, rates=[0.0, 0.4], **options)
    xs, m = x.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1, 1)
    out = nets(xs, m, 0 * xs, lengths.expand(4, -1))
    assert score(out, y).accuracy.min() > 0.9
    train_joint(model, x, mask, lengths, y, rates=[0.0, 0.4], **options)
    assert score(model(xs, m, lengths, generator=gen()), y).accuracy.min() > 0.9


def test_generators_learn_without_labels():
    """The bound improves and the classifier stays as it was."""
    x, mask, lengths, _ = task(seeds=2)
    torch.manual_seed(0)
    model = SupNotMIWAE(2, 2, latent=2, hidden=6, copies=2)
    weight = model.to_class.weight.detach().clone()
    before = model.generator_loss(x, mask, lengths, generator=gen()).item()
    train_generators(model, x, mask, lengths, epochs=20, lr=0.02, generator=gen(2))
    assert model.generator_loss(x, mask, lengths, generator=gen()).item() < before - 1
    assert torch.equal(model.to_class.weight, weight)


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"batch": 7}, {"lr": 0.01}, {"samples": 1}, {"rates": [0.2]}]
)
def test_each_knob_of_training_matters(change):
    x, mask, lengths, y = task()
    ends = []
    base = {"epochs": 2, "batch": 12, "lr": 0.02, "samples": 2, "rates": [0.4]}
    for options in (base, base | change):
        torch.manual_seed(0)
        model = SupNotMIWAE(2, 2, latent=2, hidden=4)
        train_joint(model, x, mask, lengths, y, generator=gen(), **options)
        ends.append(model.to_class.weight.detach().clone())
    assert not torch.equal(*ends)


def test_own_values_change_nothing_and_others_do():
    """What the model draws for itself gives its own plain average."""
    torch.manual_seed(0)
    model = SupNotMIWAE(2, 2, latent=2, hidden=4, copies=2)
    x, mask, lengths, _ = task(seeds=2)
    draws = model.generate(x, mask, lengths, samples=3, generator=gen())
    log_py = model.log_terms(x, mask, lengths, samples=3, generator=gen())[0]
    expected = log_py.exp().mean(0).log()
    torch.testing.assert_close(predict_with(model, x, mask, lengths, draws), expected)
    assert not torch.allclose(predict_with(model, x, mask, lengths, draws + 1), expected)


def test_bad_input():
    x, mask, lengths, y = task()
    nets, model = FilledClassifiers(2, 2, groups=1), SupNotMIWAE(2, 2)
    options = {"epochs": 1, "generator": gen()}
    with pytest.raises(ValueError, match="log_probs must be"):
        score(torch.zeros(3, 2), y)
    with pytest.raises(ValueError, match="need features >= 1"):
        FilledClassifiers(0, 2, groups=1)
    with pytest.raises(ValueError, match="x and drawn must be"):
        nets(x[0], mask[0], x[0], lengths)
    with pytest.raises(ValueError, match="nets must have 2 groups, got 1"):
        train_filled(nets, x, mask, x, lengths, y, rates=[0.0, 0.1], **options)
    with pytest.raises(ValueError, match="model must have 2 copies, got 1"):
        train_joint(model, x, mask, lengths, y, rates=[0.0, 0.1], **options)
    with pytest.raises(ValueError, match="model must have 2 copies, got 1"):
        train_generators(model, x.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1, 1), lengths, **options)
    with pytest.raises(ValueError, match="x and mask must be"):
        train_generators(model, x[0], mask[0], lengths, **options)
    with pytest.raises(ValueError, match="generated"):
        predict_with(model, x, mask, lengths, x[:, :1][None])


def _nets(x):
    torch.manual_seed(0)
    return FilledClassifiers(2, 2, groups=1, hidden=3).to(x)


def _trained(x):
    mask, nets = torch.ones_like(x, dtype=torch.bool), _nets(x)
    lengths, y = torch.full((6,), 4), torch.arange(6) % 2
    train_filled(nets, x, mask, x, lengths, y, rates=[0.2], epochs=1, generator=gen())
    return nets.to_class.weight.detach()


CASES = {
    "score": Case(
        inputs=lambda g: (torch.randn(2, 6, 3, generator=g).log_softmax(-1), torch.arange(6) % 3),
        call=score,
    ),
    "FilledClassifiers": Case(
        inputs=lambda g: (torch.randn(1, 6, 4, 2, generator=g),),
        call=lambda x: _nets(x)(
            x, torch.ones_like(x, dtype=torch.bool), x, torch.full((1, 6), 4, device=x.device)
        ),
    ),
    "train_filled": Case(
        inputs=lambda g: (torch.randn(1, 6, 4, 2, generator=g),), call=_trained, on_device=False
    ),
}
