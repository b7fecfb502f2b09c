"""The bound, its pieces and the joint model, against loops and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal
from torchmetrics.functional.classification import multiclass_calibration_error

from contract import Case
from wellposed.methods.structured_data.probabilistic_imputation import (
    SupNotMIWAE,
    cauchy_kernel,
    decay_impute,
    effective_sample_size,
    expected_calibration_error,
    last_observed,
    observation_dropout,
    predict_with,
    predictive_log_prob,
    supervised_bound,
    train_generators,
    train_joint,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(**options) -> SupNotMIWAE:
    torch.manual_seed(3)
    return SupNotMIWAE(2, 3, latent=2, hidden=4, **options).double()


def batch(copies: int = 0):
    """Four series of five steps, NaN where missing."""
    shape = (copies, 4, 5, 2) if copies else (4, 5, 2)
    x = torch.randn(shape, generator=gen(), dtype=torch.float64)
    lengths = torch.tensor([5, 4, 3, 5])
    mask = torch.rand(shape, generator=gen(1)) > 0.4
    mask &= (torch.arange(5) < lengths[:, None])[..., None]
    return torch.where(mask, x, torch.nan), mask, lengths, torch.tensor([0, 2, 1, 0])


# --- pieces ----------------------------------------------------------------------------------


def test_kernel_by_hand_and_positive_definite():
    k = cauchy_kernel(12)
    assert k[0, 0].item() == pytest.approx(1.006)
    assert k[2, 9].item() == pytest.approx(1.005 / 2)
    assert torch.linalg.eigvalsh(k.double()).min() > 0
    for change in ({"length_scale": 3.0}, {"variance": 2.0}, {"jitter": 0.1}):
        assert not torch.equal(cauchy_kernel(12, **change), k)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.99), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_dropout_is_a_subset_with_its_probability(rate, steps, features, seed):
    """Entry by entry; fails if missing entries count in the probability."""
    mask = torch.rand(3, steps, features, generator=gen(seed)) > 0.3
    kept, log_prob = observation_dropout(mask, rate, gen(seed + 1))
    assert not (kept & ~mask).any()
    for i in range(3):
        total = 0.0
        for seen, stays in zip(mask[i].flatten().tolist(), kept[i].flatten().tolist()):
            if seen:
                total += math.log1p(-rate) if stays else math.log(rate)
        assert log_prob[i].item() == pytest.approx(total, rel=1e-4, abs=1e-4)
    if rate == 0:
        assert torch.equal(kept, mask)


def test_dropout_rates_for_each_network():
    """Rates broadcast to the leading axes; fails if the second network gets the first rate."""
    mask = torch.ones(2, 300, 10, 10, dtype=torch.bool)
    kept, _ = observation_dropout(mask, torch.tensor([[0.0], [0.4]]), gen())
    assert kept[0].all()
    assert float(kept[1].float().mean()) == pytest.approx(0.6, abs=0.02)


def test_decay_by_loops():
    """Explicit loops over time; fails if the mixture is the wrong way round."""
    x, mask, _, _ = batch()
    generated = torch.randn(x.shape, generator=gen(2), dtype=torch.float64)
    times = torch.tensor([0.0, 1.0, 1.5, 4.0, 6.0])
    weight, bias = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.1, 0.2]).double()
    out = decay_impute(x, generated, mask, times, weight, bias)
    for n in range(4):
        for d in range(2):
            last = None
            for t in range(5):
                if mask[n, t, d]:
                    last = t
                    expected = x[n, t, d]
                elif last is None:
                    expected = generated[n, t, d]
                else:
                    rate = max(0.0, float(weight[d] * (times[t] - times[last]) + bias[d]))
                    gamma = math.exp(-rate)
                    expected = gamma * x[n, last, d] + (1 - gamma) * generated[n, t, d]
                assert out[n, t, d].item() == pytest.approx(float(expected))


def test_decay_gradients():
    x, mask, _, _ = batch()
    x = torch.where(mask, x, 7.0)
    free = [torch.randn(4, 5, 2, dtype=torch.float64, generator=gen(4)).requires_grad_()]
    free += [torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True) for _ in "wb"]
    assert torch.autograd.gradcheck(
        lambda v, w, b: decay_impute(x, v, mask, torch.arange(5), w, b), free
    )


def test_bound_by_loops_and_its_limits():
    """Fails if log K is not subtracted or a term has the wrong sign."""
    terms = [torch.randn(3, 4, generator=gen(i), dtype=torch.float64) for i in range(6)]
    py, px, pz, qz, ps, pm = terms
    expected = 0.0
    for n in range(4):
        weights = [
            math.exp(py[k, n] + px[k, n] + pz[k, n] - qz[k, n] + ps[k, n] + pm[k, n])
            for k in range(3)
        ]
        expected -= math.log(sum(weights) / 3) / 4
    assert supervised_bound(*terms).item() == pytest.approx(expected)
    one = [t[:1] for t in (py, px, pz, qz)]
    assert supervised_bound(*one).item() == pytest.approx(
        -(one[0] + one[1] + one[2] - one[3]).mean().item()
    )
    same = [t[:1].expand(5, 4) for t in (py, px, pz, qz)]
    torch.testing.assert_close(supervised_bound(*same), supervised_bound(*one))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.floats(-1e4, 1e4), st.integers(0, 99))
def test_weights_are_shift_free_and_finite(k, shift, seed):
    """A constant in all log-weights changes no prediction, however large."""
    px = 50 * torch.randn(k, 3, generator=gen(seed), dtype=torch.float64)
    py = torch.randn(k, 3, 4, generator=gen(seed + 1), dtype=torch.float64).log_softmax(-1)
    zero = torch.zeros_like(px)
    out = predictive_log_prob(py, px + shift, zero, zero)
    torch.testing.assert_close(out, predictive_log_prob(py, px, zero, zero))
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    size = effective_sample_size(px + shift)
    assert bool(((size >= 1 - 1e-9) & (size <= k + 1e-9)).all())


def test_calibration_error_is_that_of_torchmetrics():
    probs = torch.rand(200, 4, generator=gen()).softmax(-1)
    labels = torch.randint(4, (200,), generator=gen(1))
    for bins in (5, 10):
        peer = multiclass_calibration_error(probs, labels, num_classes=4, n_bins=bins)
        assert expected_calibration_error(probs, labels, bins) == pytest.approx(
            peer.item(), abs=1e-6
        )


# --- the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("gp_prior", [False, True])
def test_log_terms_against_distributions(gp_prior):
    """torch's densities, entry by entry; fails if q and p cover different steps."""
    model = build(gp_prior=gp_prior)
    x, mask, lengths, _ = batch()
    _, log_px, log_pz, log_qz = model.log_terms(x, mask, lengths, samples=3, generator=gen(5))
    clean = torch.where(mask, x, 0)
    with torch.no_grad():
        mean, raw = model.to_latent(model.encoder(clean[None]))[0].chunk(2, -1)
        scale = 1e-4 + (1 - 1e-4) * torch.nn.functional.softplus(raw)
        noise = torch.randn(1, 3, 4, 5, 2, generator=gen(5), dtype=torch.float64)[0]
        z = mean + scale * noise
        center, spread = model.to_data(model.decoder(z[None]).relu())[0].chunk(2, -1)
        spread = 1e-3 + (1 - 1e-3) * torch.nn.functional.softplus(spread)
    for k in range(3):
        for n in range(4):
            px = Normal(center[k, n], spread[k, n]).log_prob(clean[n])[mask[n]].sum()
            assert log_px[k, n].item() == pytest.approx(px.item())
            end = 5 if gp_prior else int(lengths[n])
            qz = Normal(mean[n, :end], scale[n, :end]).log_prob(z[k, n, :end]).sum()
            assert log_qz[k, n].item() == pytest.approx(qz.item())
            if gp_prior:
                prior = MultivariateNormal(torch.zeros(5).double(), cauchy_kernel(5).double())
                pz = prior.log_prob(z[k, n].T).sum()
            else:
                pz = Normal(0.0, 1.0).log_prob(z[k, n, :end]).sum()
            assert log_pz[k, n].item() == pytest.approx(pz.item())


def test_what_is_hidden_or_padded_does_not_matter():
    """Gaps hold NaN, padding anything: same prediction; fails if a hidden value is read."""
    model = build()
    x, mask, lengths, y = batch()
    other = torch.where(mask, x, 1e6)
    options = {"samples": 4}
    one, two = (model(v, mask, lengths, generator=gen(), **options) for v in (x, other))
    torch.testing.assert_close(one, two)
    assert one.isfinite().all()
    losses = [model.loss(v, mask, lengths, y, generator=gen()) for v in (x, other)]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_completed_series_keep_what_was_observed():
    model = build()
    x, mask, lengths, _ = batch()
    filled = model.impute(x, mask, lengths, samples=3, generator=gen())
    for k in range(3):
        assert torch.equal(filled[k][mask], x[mask])
    assert (filled[0] != filled[1])[~mask].all()
    draws = model.generate(x, mask, lengths, samples=3, generator=gen())
    torch.testing.assert_close(model.complete(x, mask, draws, lengths), filled)


def test_copies_are_networks_of_their_own():
    """The loss of two copies is the sum of both; fails if they share statistics or samples."""
    pair = build(copies=2)
    x, mask, lengths, y = batch(copies=2)
    pair.loss(x, mask, lengths, y, generator=gen()).backward()
    other = x.clone()
    other[1] = torch.where(mask[1], 2 * x[1] + 1, x[1])
    before = pair.encoder.recurrent.weight.grad.clone()
    pair.zero_grad()
    pair.loss(other, mask, lengths, y, generator=gen()).backward()
    torch.testing.assert_close(pair.encoder.recurrent.weight.grad[0], before[0])
    assert not torch.equal(pair.encoder.recurrent.weight.grad[1], before[1])
    assert pair(x, mask, lengths).shape == (2, 4, 3)


def test_dropout_hides_from_the_classifier_alone():
    """The generator's own loss does not know the rate; the joint loss does."""
    model = build()
    x, mask, lengths, y = batch()
    losses = {
        (rate, k): model.loss(x, mask, lengths, y, dropout=rate, samples=k, generator=gen()).item()
        for rate, k in ((0.0, 3), (0.4, 3), (0.4, 2))
    }
    assert len(set(losses.values())) == 3
    alone = model.generator_loss(x, mask, lengths, samples=3, generator=gen())
    terms = model.log_terms(x, mask, lengths, samples=3, generator=gen())[1:]
    expected = supervised_bound(torch.zeros_like(terms[0]), *terms)
    torch.testing.assert_close(alone, expected)


def test_without_the_generated_value_its_gradient_is_gone():
    """The trivial solution: gamma = 1 after a first observation, so the label does not reach it."""
    model = build()
    with torch.no_grad():
        model.decay_bias.fill_(0.0)
    x, mask, lengths, _y = batch()
    mask[:, 0] = True
    x = torch.where(mask, x.nan_to_num(0.5), torch.nan)
    log_py, *_ = model.log_terms(x, mask, lengths, samples=2, generator=gen())
    log_py[..., 0].sum().backward()
    assert float(model.to_data.weight.grad.abs().max()) == 0.0
    assert float(model.generated_weight()) == 0.0


@pytest.mark.parametrize(
    "change", [{"latent": 3}, {"hidden": 5}, {"gp_prior": True}, {"length_scale": 2.0}]
)
def test_each_knob_matters(change):
    x, mask, lengths, y = batch()
    base = {"latent": 2, "hidden": 4, "gp_prior": "length_scale" in change}
    losses = []
    for options in (base, base | change):
        torch.manual_seed(0)
        model = SupNotMIWAE(2, 3, **options).double()
        losses.append(model.loss(x, mask, lengths, y, generator=gen()).item())
    assert losses[0] != losses[1]


def test_bad_input():
    x, mask, lengths, _ = batch()
    model, zero = build(), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="length must be at least 1"):
        cauchy_kernel(0)
    with pytest.raises(ValueError, match="must be positive"):
        cauchy_kernel(3, -1.0)
    with pytest.raises(ValueError, match="mask must be bool"):
        observation_dropout(x, 0.1)
    for rate in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
            observation_dropout(mask, rate)
    with pytest.raises(ValueError, match="times must have shape"):
        last_observed(x, mask, torch.arange(4))
    with pytest.raises(ValueError, match="generated must have the shape"):
        decay_impute(x, x[:1], mask, torch.arange(5), zero[0], zero[0])
    with pytest.raises(ValueError, match="log-terms must all have one shape"):
        supervised_bound(zero, zero, zero, zero[:1])
    with pytest.raises(ValueError, match="log-terms must all have one shape"):
        predictive_log_prob(zero[..., None], zero, zero, zero[:, :1])
    with pytest.raises(ValueError, match="log_weights must hold samples"):
        effective_sample_size(zero[:0])
    with pytest.raises(ValueError, match="need features >= 1 and classes >= 2"):
        SupNotMIWAE(2, 1)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        model(x, mask, lengths, samples=0)
    with pytest.raises(ValueError, match="x must be"):
        model(x[..., :1], mask[..., :1], lengths)
    with pytest.raises(ValueError, match="lengths must hold 4 numbers"):
        model(x, mask, lengths[:2])


# --- one small case a public name, for the contract sweep ------------------------------------


def _terms(g):
    return tuple(torch.randn(3, 4, generator=g) for _ in range(4))


def _mask(g):
    return torch.rand(4, 5, 2, generator=g) > 0.4


def _model(x, mask):
    torch.manual_seed(0)
    model = SupNotMIWAE(2, 3, latent=2, hidden=4).to(x)
    g = torch.Generator(x.device).manual_seed(0)
    return model(x, mask, torch.full((4,), 5, device=x.device), samples=2, generator=g)


def _joint(x, copies=1):
    torch.manual_seed(0)
    return SupNotMIWAE(2, 2, latent=2, hidden=3, copies=copies).to(x)


def _trained(what):
    def run(x):
        mask = torch.ones_like(x, dtype=torch.bool)
        lengths, y = torch.full((6,), 4), torch.arange(6) % 2
        options = {"epochs": 1, "generator": gen()}
        model = _joint(x)
        if what is train_joint:
            train_joint(model, x, mask, lengths, y, rates=[0.2], **options)
        else:
            train_generators(model, x, mask, lengths, **options)
        return model.encoder.inputs.weight.detach()

    return Case(inputs=lambda g: (torch.randn(1, 6, 4, 2, generator=g),), call=run, on_device=False)


CASES = {
    "train_joint": _trained(train_joint),
    "train_generators": _trained(train_generators),
    "predict_with": Case(
        inputs=lambda g: (torch.randn(2, 6, 4, 2, generator=g),),
        call=lambda x: predict_with(
            _joint(x, 2),
            x,
            torch.zeros_like(x, dtype=torch.bool),
            torch.full((6,), 4, device=x.device),
            x[None],
        ),
    ),
    "cauchy_kernel": Case(inputs=lambda g: (), call=lambda: cauchy_kernel(4), keeps_dtype=False),
    "observation_dropout": Case(
        inputs=lambda g: (_mask(g),),
        call=lambda m: observation_dropout(m, 0.3, torch.Generator(m.device).manual_seed(0)),
        keeps_dtype=False,
        on_device=False,
    ),
    "last_observed": Case(
        inputs=lambda g: (torch.randn(4, 5, 2, generator=g), torch.ones(4, 5, 2).bool()),
        call=lambda x, m: last_observed(x, m, torch.arange(5, device=x.device)),
    ),
    "decay_impute": Case(
        inputs=lambda g: (
            torch.randn(4, 5, 2, generator=g),
            torch.randn(4, 5, 2, generator=g),
            _mask(g),
            torch.rand(2, generator=g),
        ),
        call=lambda x, v, m, w: decay_impute(x, v, m, torch.arange(5, device=x.device), w, w),
    ),
    "supervised_bound": Case(inputs=_terms, call=supervised_bound),
    "predictive_log_prob": Case(
        inputs=lambda g: (torch.randn(3, 4, 2, generator=g).log_softmax(-1), *_terms(g)[1:]),
        call=predictive_log_prob,
    ),
    "effective_sample_size": Case(inputs=lambda g: _terms(g)[:1], call=effective_sample_size),
    "expected_calibration_error": Case(
        inputs=lambda g: (torch.rand(6, 3, generator=g).softmax(-1), torch.arange(6) % 3),
        call=expected_calibration_error,
    ),
    "SupNotMIWAE": Case(
        inputs=lambda g: (torch.randn(4, 5, 2, generator=g), _mask(g)),
        call=_model,
        on_device=False,
    ),
}
