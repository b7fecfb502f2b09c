"""Linear tasks that share a basis."""

import pytest
import torch

from wellposed.data.linear_tasks import copied_tasks, random_tasks, source_samplers, target_sample


def _random(noise=0.5):
    g = torch.Generator().manual_seed(0)
    return random_tasks(3, dim=6, rank=2, num_tasks=5, noise=noise, generator=g), g


def test_random_tasks_have_unit_heads_and_an_orthonormal_basis():
    tasks, _ = _random()
    torch.testing.assert_close(tasks.basis.mT @ tasks.basis, torch.eye(2).double().expand(3, 2, 2))
    torch.testing.assert_close(tasks.heads.norm(dim=1), torch.ones(3, 5).double())
    ahead = tasks.heads[..., 0] + tasks.heads[..., 1]
    torch.testing.assert_close(tasks.target_head * ahead.norm(dim=1, keepdim=True), ahead)


def test_samples_have_the_right_mean_and_noise():
    tasks, g = _random()
    x, y = source_samplers(tasks, g)[1](3, 40_000)
    rest = y - x @ tasks.basis[1] @ tasks.heads[1, :, 3]
    assert rest.std().item() == pytest.approx(0.5, rel=0.02)
    assert abs(float((x * rest[:, None]).mean(0).abs().max())) < 0.02
    x, y = target_sample(tasks, 40_000, g)
    rest = y - (x @ tasks.basis @ tasks.target_head[..., None])[..., 0]
    torch.testing.assert_close(rest.std(1), torch.full((3,), 0.5).double(), rtol=0.02, atol=0)
    torch.testing.assert_close(x[0].T @ x[0] / 40_000, torch.eye(6).double(), rtol=0, atol=0.05)


def test_copied_tasks():
    g = torch.Generator().manual_seed(0)
    tasks = copied_tasks(2, dim=4, num_tasks=6, noise=0.0, generator=g, dtype=torch.float32)
    assert tasks.heads[0].tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert tasks.basis.dtype == torch.float32


def test_bad_input():
    tasks, g = _random()
    with pytest.raises(ValueError, match="random_tasks needs"):
        random_tasks(1, dim=2, rank=3, num_tasks=5, noise=1.0, generator=g)
    with pytest.raises(ValueError, match="copied_tasks needs"):
        copied_tasks(1, dim=1, num_tasks=5, noise=1.0, generator=g)
    with pytest.raises(ValueError, match="n must be at least 1"):
        target_sample(tasks, 0, g)
