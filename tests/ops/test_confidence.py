"""Calibration and ranking scores, against explicit loops and cases known by hand."""

import pytest
import torch
import torch.nn.functional as F

from contract import Case, sizes
from wellposed.ops.confidence import (
    aurc,
    confidence_scores,
    eaurc,
    expected_calibration_error,
    fit_temperature,
    reliability,
    risk_coverage,
)

F64 = torch.float64


def sample(n=400, c=5, seed=0, scale=3.0, dtype=F64):
    """Logits and labels whose confidence means something."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, c, generator=g, dtype=F64)
    labels = torch.multinomial((0.6 * logits).softmax(1), 1, generator=g).squeeze(1)
    return logits.to(dtype), labels


def ece_by_loops(probs, labels, n_bins):
    """Bins (l, u] in Python numbers."""
    total, n = 0.0, len(labels)
    for m in range(n_bins):
        inside = []
        for row, label in zip(probs.tolist(), labels.tolist()):
            top = max(row)
            if m / n_bins < top <= (m + 1) / n_bins:
                inside.append((top, row.index(top) == label))
        if inside:
            conf = sum(top for top, _ in inside) / len(inside)
            acc = sum(right for _, right in inside) / len(inside)
            total += len(inside) / n * abs(acc - conf)
    return total


def aurc_by_loops(probs, labels):
    rows = sorted(
        ((max(row), row.index(max(row)) != label) for row, label in zip(probs.tolist(), labels)),
        key=lambda pair: -pair[0],
    )
    wrong, area = 0, 0.0
    for k, (_, missed) in enumerate(rows, start=1):
        wrong += int(missed)
        area += wrong / k
    return area / len(rows)


def test_ece_against_torchmetrics():
    """Bins there are [l, u): no confidence here lies on an edge, so both must agree."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = sample()
    probs = logits.softmax(1)
    peer = multiclass_calibration_error(probs, labels, num_classes=5, n_bins=10, norm="l1")
    assert expected_calibration_error(probs, labels) == pytest.approx(peer.item(), rel=1e-5)


@pytest.mark.parametrize("n_bins", [1, 7, 10, 15])
def test_ece_against_loops(n_bins):
    """Fails if accuracy and confidence swap, or if bins are not weighted by their size."""
    logits, labels = sample()
    probs = logits.softmax(1)
    expected = ece_by_loops(probs, labels, n_bins)
    assert expected_calibration_error(probs, labels, n_bins) == pytest.approx(expected, abs=1e-6)


def test_ece_bins_are_closed_above():
    """A confidence of 3/4 belongs to (1/2, 3/4], with 0.6; fails without the step down."""
    probs = torch.tensor([[0.75, 0.25], [0.40, 0.60], [0.10, 0.90]])
    labels = torch.tensor([1, 1, 1])  # wrong, right, right
    expected = 2 / 3 * abs(0.5 - 0.675) + 1 / 3 * 0.1
    assert expected_calibration_error(probs, labels, 4) == pytest.approx(expected, abs=1e-6)


def test_ece_keeps_certain_predictions_in_the_last_bin():
    """Confidence 1 and wrong, 0.9 and right share a bin; on their own they would give 0.55."""
    probs = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    value = expected_calibration_error(probs, torch.tensor([1, 0]), 2)
    assert value == pytest.approx(abs(0.5 - 0.95), abs=1e-6)


def test_ece_of_a_calibrated_and_of_a_constant_classifier():
    """Labels drawn from the probabilities themselves: only sampling noise is left."""
    g = torch.Generator().manual_seed(3)
    probs = (2 * torch.randn(40_000, 4, generator=g, dtype=F64)).softmax(1)
    labels = torch.multinomial(probs, 1, generator=g).squeeze(1)
    assert expected_calibration_error(probs, labels) < 0.01
    uniform = torch.full((8, 4), 0.25)
    assert expected_calibration_error(uniform, torch.arange(8) % 4) == pytest.approx(0.0, abs=1e-6)


def test_reliability_adds_up_to_the_ece():
    logits, labels = sample()
    probs = logits.softmax(1)
    confidence, right, weight = reliability(probs, labels, 10)
    total = (weight * (right - confidence).abs()).nansum().item()
    assert total == pytest.approx(ece_by_loops(probs, labels, 10), abs=1e-12)
    assert weight.sum().item() == pytest.approx(1.0)
    assert weight[0] == 0  # with five classes no confidence is below 1/5
    assert confidence[0].isnan()
    assert reliability(probs, labels, 4)[0].shape == (4,)


def test_risk_coverage_and_aurc_against_loops():
    """Fails if the least confident come first."""
    logits, labels = sample()
    probs = logits.softmax(1)
    coverage, risk = risk_coverage(probs, labels)
    error = (probs.argmax(1) != labels).double().mean()
    assert coverage[-1] == 1.0
    torch.testing.assert_close(risk[-1], error)
    assert aurc(probs, labels) == pytest.approx(aurc_by_loops(probs, labels.tolist()), abs=1e-12)
    assert aurc(probs, labels) < error


def test_aurc_depends_on_order_alone():
    """Any increasing map of the confidence leaves it unchanged."""
    logits, labels = sample(c=2)
    probs = logits.softmax(1)
    sharper = F.normalize(probs**3, p=1, dim=1)
    assert aurc(probs, labels) == pytest.approx(aurc(sharper, labels), abs=1e-12)


def test_ties_keep_their_order():
    probs = torch.full((4, 2), 0.5)
    _, risk = risk_coverage(probs, torch.tensor([1, 0, 0, 0]))
    torch.testing.assert_close(risk, torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4]))


@pytest.mark.parametrize("errors", [0, 1, 4, 10])
def test_eaurc_is_zero_at_the_best_order_and_positive_elsewhere(errors):
    n = 10
    top = torch.linspace(0.95, 0.55, n, dtype=F64)
    probs = torch.stack([top, 1 - top], dim=1)
    best = torch.tensor([0] * (n - errors) + [1] * errors)
    assert eaurc(probs, best) == pytest.approx(0.0, abs=1e-12)
    worst = eaurc(probs, best.flip(0))
    assert worst > 0 or errors in (0, n)


def test_scores_agree_with_the_single_ones():
    pairs = [sample(seed=s) for s in range(3)]
    logits, labels = (torch.stack(part) for part in zip(*pairs))
    scores = confidence_scores(logits, labels)
    for i, (z, y) in enumerate(pairs):
        probs = z.softmax(1)
        assert scores.error[i].item() == pytest.approx((z.argmax(1) != y).double().mean().item())
        assert scores.nll[i].item() == pytest.approx(F.cross_entropy(z, y).item())
        assert scores.ece[i].item() == expected_calibration_error(probs, y)
        assert scores.aurc[i].item() == pytest.approx(aurc(probs, y))
        assert scores.eaurc[i].item() == pytest.approx(eaurc(probs, y))
    over = confidence_scores(5 * logits, labels).overconfidence
    assert (over > scores.overconfidence).all()
    assert all(value.shape == (3,) and value.dtype == F64 for value in vars(scores).values())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_temperature_is_a_stationary_point(dtype):
    """The slope of the likelihood in the temperature vanishes there; fails if the sign flips."""
    logits, labels = sample(n=3000, dtype=dtype)
    tau = fit_temperature(logits, labels)
    at = torch.tensor(tau, dtype=F64, requires_grad=True)
    F.cross_entropy(logits.double() / at, labels).backward()
    assert abs(at.grad.item()) < 1e-8
    assert tau == pytest.approx(1 / 0.6, rel=0.1)  # the labels were drawn at that temperature
    twice = fit_temperature(2 * logits.double(), labels)
    assert twice == pytest.approx(2 * fit_temperature(logits.double(), labels), rel=1e-9)


def test_temperature_stays_in_its_interval():
    """All right: the likelihood grows for ever as the temperature falls."""
    logits = torch.eye(3)
    assert fit_temperature(logits, torch.arange(3)) == pytest.approx(0.01, rel=1e-6)
    assert fit_temperature(logits, torch.tensor([1, 2, 0])) == pytest.approx(100.0, rel=1e-6)
    rough = fit_temperature(*sample(), steps=3)
    assert rough != fit_temperature(*sample(), steps=40)


@pytest.mark.parametrize("score", [expected_calibration_error, aurc, eaurc, risk_coverage])
def test_bad_input(score):
    good = torch.full((3, 2), 0.5)
    with pytest.raises(ValueError, match=r"probs must have shape \(n, c\)"):
        score(good[0], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="probs must have shape"):
        score(good[:0], torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\), got \(2,\)"):
        score(good, torch.tensor([0, 1]))


def test_bad_constants():
    good, labels = torch.full((3, 2), 0.5), torch.tensor([0, 1, 0])
    for score in (expected_calibration_error, reliability):
        with pytest.raises(ValueError, match="n_bins must be at least 1, got 0"):
            score(good, labels, 0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        fit_temperature(good, labels, steps=0)
    with pytest.raises(ValueError, match=r"logits must have shape \(r, n, c\)"):
        confidence_scores(good, labels)


def _outputs(g):
    """Outputs and labels of any number of examples and classes."""
    n, c = sizes(g, 2, least=2)
    return torch.randn(n, c, generator=g), torch.randint(c, (n,), generator=g)


def _probs(g):
    z, y = _outputs(g)
    return z.softmax(1), y


CASES = {
    "aurc": Case(_probs, lambda p, y: torch.tensor(aurc(p, y)), keeps_dtype=False),
    "confidence_scores": Case(
        _outputs, lambda z, y: confidence_scores(z[None], y[None]), keeps_dtype=False
    ),
    "eaurc": Case(_probs, lambda p, y: torch.tensor(eaurc(p, y)), keeps_dtype=False),
    "expected_calibration_error": Case(
        _probs, lambda p, y: torch.tensor(expected_calibration_error(p, y)), keeps_dtype=False
    ),
    "fit_temperature": Case(
        _outputs, lambda z, y: torch.tensor(fit_temperature(z, y)), keeps_dtype=False
    ),
    "reliability": Case(_probs, reliability, nan_means="an empty bin"),
    "risk_coverage": Case(_probs, risk_coverage),
}


def test_scores_of_no_classifier_are_refused():
    with pytest.raises(ValueError, match="r >= 1"):
        confidence_scores(torch.zeros(0, 3, 2), torch.zeros(0, 3, dtype=torch.int64))
