"""Cases for the contract sweep; the values are tested with the paper they serve
(tests/methods/structured_data/test_probabilistic_imputation.py)."""

import pytest
import torch

from contract import Case
from wellposed.ops import imputation


def _mask(g):
    return torch.rand(4, 5, 2, generator=g) > 0.4


def _steps(x):
    return torch.arange(5, device=x.device)


def _terms(g):
    return tuple(torch.randn(3, 4, generator=g) for _ in range(4))


def test_last_observed_by_loops():
    """Explicit loops; fails if the time counts from the step before."""
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(4, 5, 2, generator=g), _mask(g)
    times = torch.tensor([0.0, 2.0, 3.0, 7.0, 8.0])
    value, since = imputation.last_observed(x, mask, times)
    for n in range(4):
        for d in range(2):
            last = None
            for t in range(5):
                last = t if mask[n, t, d] else last
                expected = 0.0 if last is None else x[n, last, d].item()
                gap = torch.inf if last is None else (times[t] - times[last]).item()
                assert (value[n, t, d].item(), since[n, t, d].item()) == (expected, gap)


def test_check_series():
    with pytest.raises(ValueError, match="mask bool of the same shape"):
        imputation.check_series(torch.zeros(2, 3), torch.zeros(2, 3))


CASES = {
    "cauchy_kernel": Case(
        inputs=lambda g: (), call=lambda: imputation.cauchy_kernel(4), keeps_dtype=False
    ),
    "check_series": Case(
        inputs=lambda g: (torch.zeros(4, 5, 2), _mask(g)), call=imputation.check_series
    ),
    "observation_dropout": Case(
        inputs=lambda g: (_mask(g),),
        call=lambda m: imputation.observation_dropout(
            m, 0.3, torch.Generator(m.device).manual_seed(0)
        ),
        keeps_dtype=False,
        on_device=False,
    ),
    "last_observed": Case(
        inputs=lambda g: (torch.randn(4, 5, 2, generator=g), torch.ones(4, 5, 2).bool()),
        call=lambda x, m: imputation.last_observed(x, m, _steps(x)),
    ),
    "decay_impute": Case(
        inputs=lambda g: (torch.randn(4, 5, 2, generator=g), _mask(g), torch.rand(2, generator=g)),
        call=lambda x, m, w: imputation.decay_impute(x, 2 * x, m, _steps(x), w, w),
    ),
    "supervised_bound": Case(inputs=_terms, call=imputation.supervised_bound),
    "predictive_log_prob": Case(
        inputs=lambda g: (torch.randn(3, 4, 2, generator=g).log_softmax(-1), *_terms(g)[1:]),
        call=imputation.predictive_log_prob,
    ),
    "effective_sample_size": Case(
        inputs=lambda g: _terms(g)[:1], call=imputation.effective_sample_size
    ),
}
