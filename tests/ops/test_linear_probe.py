"""Linear classifiers on frozen features."""

import pytest
import torch
import torch.nn.functional as F

from contract import Case
from wellposed.ops import linear_probe as module
from wellposed.ops.linear_probe import ProbeTask, linear_probe, linear_probes


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def blobs(n=40, seed=0, dtype=torch.float64):
    y = torch.arange(n) % 2
    x = randn(n, 2, seed=seed, dtype=dtype) + 2.0 * (2 * y[:, None] - 1)
    return x, y


def _labels(x):
    return torch.arange(len(x), device=x.device) % 2


def _points(g):
    return (torch.randn(10, 2, generator=g),)


def _task(x):
    return ProbeTask(x, _labels(x), x, _labels(x))


@pytest.mark.parametrize("c", [0.01, 0.1, 10.0])
def test_probe_against_scikit_learn(c):
    """Same predictions on all test points; fails if the ridge term misses its factor n."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    y = torch.arange(90) % 3
    x = randn(90, 5) * torch.arange(1.0, 6.0) + y[:, None]
    z, w = randn(300, 5, seed=1) * 4, torch.arange(300) % 3
    scaler = StandardScaler().fit(x)
    peer = LogisticRegression(C=c, tol=1e-8, max_iter=1000).fit(scaler.transform(x), y)
    score = peer.score(scaler.transform(z), w)
    assert linear_probe(x, y, z, w, c=c) == pytest.approx(score, abs=0.005)


def test_probe_ignores_scale_shift_and_constants():
    x, y = blobs()
    z, w = blobs(seed=1)
    plain = linear_probe(x, y, z, w)
    assert plain > 0.9
    assert linear_probe(3 * x + 7, y, 3 * z + 7, w) == plain
    wide, deep = F.pad(x, (0, 2), value=4.0), F.pad(z, (0, 2), value=4.0)
    assert linear_probe(wide, y, deep, w) == plain
    assert linear_probe(x.float(), y, z.float(), w) == pytest.approx(plain, abs=0.03)
    assert linear_probe(torch.zeros_like(x), y, z, w) == 0.5  # nothing to read off


def test_probe_strength_changes_the_result():
    y = torch.arange(40) % 2
    x = randn(40, 30)
    weak = linear_probe(x, y, x, y, c=1e3)
    assert weak == 1.0
    assert linear_probe(x, y, x, y, c=1e-4) < weak


def test_probes_side_by_side_are_probes_alone():
    """Fails if tasks share weights, momentum or the places where it restarts."""
    tasks = []
    for seed in range(6):  # more than are solved at a time
        (x, y), (z, w) = blobs(seed=seed), blobs(300, seed=seed + 10)
        tasks.append(ProbeTask(x * (seed - 2.5) + randn(40, 2, seed=seed), y, z, w))
    alone = [linear_probe(t.x, t.y, t.x_test, t.y_test) for t in tasks]
    assert linear_probes(tasks).tolist() == pytest.approx(alone, abs=0.005)
    assert max(alone) > 0.9
    assert min(alone) < 0.5


def test_a_probe_that_does_not_converge_says_so(monkeypatch):
    monkeypatch.setattr(module, "PROBE_STEPS", 1)
    x, y = blobs()
    with pytest.warns(UserWarning, match="stopped before it converged"):
        early = linear_probe(x, y, x, y)
    assert 0.0 <= early <= 1.0, "what it found is returned all the same"


def test_probe_refuses():
    x, y = blobs()
    with pytest.raises(ValueError, match="c must be positive"):
        linear_probe(x, y, x, y, c=0.0)
    with pytest.raises(ValueError, match="same length"):
        linear_probe(x, y[:-1], x, y)
    with pytest.raises(ValueError, match="tasks not be empty"):
        linear_probes([])
    with pytest.raises(ValueError, match="not 0"):
        linear_probe(x[:0], y[:0], x[:0], y[:0])


CASES = {
    "linear_probe": Case(
        inputs=_points,
        call=lambda x: torch.tensor(linear_probe(x, _labels(x), x, _labels(x))),
        keeps_dtype=False,
    ),
    "linear_probes": Case(
        inputs=_points, call=lambda x: linear_probes([_task(x)] * 2), keeps_dtype=False
    ),
}
