"""How peaked and how long-tailed the weights of a network are."""

import math

import pytest
import torch

from contract import Case
from wellposed.ops.weight_statistics import weight_statistics


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def free(*shape, dtype=torch.float64, seed=0):
    return 3 * torch.randn(*shape, generator=gen(seed), dtype=dtype)


def test_statistics_against_scipy():
    """Fails if the third moment is taken, or if the mean is not subtracted."""
    from scipy import stats

    w = (free(9, 11) + 1).numpy()
    ours = weight_statistics(torch.from_numpy(w))
    assert ours["kurtosis"].item() == pytest.approx(stats.kurtosis(w, axis=None, fisher=False))
    assert ours["near_zero"].item() == pytest.approx((abs(w) < 0.1 * w.std()).mean())
    assert ours["max_over_std"].item() == pytest.approx(abs(w).max() / w.std())


def test_statistics_of_known_distributions():
    uniform = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    stats = weight_statistics(uniform)
    assert stats["kurtosis"].item() == pytest.approx(1.8, abs=1e-4)
    assert stats["near_zero"].item() == pytest.approx(0.1 / math.sqrt(3), abs=1e-4)
    assert stats["max_over_std"].item() == pytest.approx(math.sqrt(3), abs=1e-4)
    normal = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    assert weight_statistics(normal)["kurtosis"].item() == pytest.approx(3.0, abs=1e-2)
    torch.testing.assert_close(weight_statistics(7 * uniform), stats)
    with pytest.raises(ValueError, match="at least two weights"):
        weight_statistics(torch.ones(1))


def test_statistics_do_not_depend_on_the_scale():
    """Fails if fourth powers overflow or vanish."""
    w = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for scale in (1e-15, 1e15):
        for name, value in weight_statistics(scale * w).items():
            assert value.item() == pytest.approx(weight_statistics(w)[name].item(), rel=1e-4)
    with pytest.raises(ValueError, match="two different weights"):
        weight_statistics(torch.ones(3))


CASES = {
    "weight_statistics": Case(
        inputs=lambda g: (torch.randn(50, generator=g),), call=weight_statistics
    ),
}
