"""The expected cross-entropy of a random predictor, split."""

import math

import pytest
import torch
import torch.nn.functional as F

from contract import Case
from wellposed.ops.bias_variance import bias_variance

F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def _random_theorem(seed, draws=7, b=5, c=4):
    g = gen(seed)
    log_q = (2 * torch.randn(draws, b, c, generator=g, dtype=F64)).log_softmax(-1)
    return log_q, torch.randn(b, c, generator=g, dtype=F64).softmax(-1)


def test_bias_variance_against_the_definitions():
    """Both divergences by explicit loops; fails if the two arguments of a KL are swapped."""
    log_q, p = _random_theorem(0)
    bias = variance = entropy = 0.0
    for i in range(p.shape[0]):
        geometric = [math.exp(log_q[:, i, c].mean().item()) for c in range(4)]
        tilde = [v / sum(geometric) for v in geometric]
        bias += sum(a * math.log(a / t) for a, t in zip(p[i].tolist(), tilde)) / 5
        entropy -= sum(a * math.log(a) for a in p[i].tolist()) / 5
        for row in log_q[:, i].tolist():
            variance += sum(t * (math.log(t) - v) for t, v in zip(tilde, row)) / 5 / 7
    got = [v.item() for v in bias_variance(log_q, p)]
    assert got == pytest.approx([bias, variance, entropy], rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_sum_to_the_expected_loss(seed):
    """The theorem; fails if the sign of any term flips."""
    log_q, p = _random_theorem(seed)
    expected = -(p * log_q.mean(0)).sum(-1).mean()
    torch.testing.assert_close(torch.stack(bias_variance(log_q, p)).sum(), expected)


def test_without_randomness_there_is_no_variance_and_certain_labels_have_no_entropy():
    log_q, _ = _random_theorem(0, draws=1)
    p = F.one_hot(torch.arange(5) % 4, 4).to(F64)
    bias, variance, entropy = bias_variance(log_q.expand(6, -1, -1), p)
    assert abs(variance.item()) < 1e-12
    assert entropy == 0
    torch.testing.assert_close(bias, -(p * log_q[0]).sum(-1).mean())
    log_q[0, 0] = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])  # 0 * -inf must not be NaN
    assert bias_variance(log_q, p)[0].isfinite()


def test_bias_variance_is_differentiable_and_refuses_bad_shapes():
    logits, p = (
        torch.randn(3, 2, 3, generator=gen(), dtype=F64, requires_grad=True),
        torch.ones(2, 3),
    )
    p = (p / 3).to(F64)
    assert torch.autograd.gradcheck(lambda z: bias_variance(z.log_softmax(-1), p)[:2], (logits,))
    for bad in (torch.ones(2, 3), torch.ones(0, 2, 3), torch.ones(3, 3, 3)):
        with pytest.raises(ValueError, match="log_q and p must have shapes"):
            bias_variance(bad, p)


CASES = {
    "bias_variance": Case(
        inputs=lambda g: (
            torch.randn(4, 5, 3, generator=g).log_softmax(-1),
            torch.randn(5, 3, generator=g).softmax(-1),
        ),
        call=bias_variance,
    ),
}
