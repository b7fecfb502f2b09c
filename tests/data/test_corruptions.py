"""Corrupted images and the tasks made of them."""

import pytest
import torch

from wellposed.data.corruptions import (
    CORRUPTIONS,
    balanced_accuracy,
    corrupt,
    corrupted_tasks,
    draw_task,
)


def _images(n=40, size=12):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, size, size, generator=g), torch.arange(n) % 4


def _tasks():
    images, labels = _images()
    g = torch.Generator().manual_seed(1)
    return corrupted_tasks(images, labels, dim=5, num_train=30, generator=g)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_corruption(name):
    """Changes the image, keeps shape, dtype and range, same twice, harmless to its input."""
    images, _ = _images()
    before = images.clone()
    one, two = (corrupt(images, name, generator=torch.Generator().manual_seed(2)) for _ in "ab")
    assert torch.equal(one, two)
    assert torch.equal(images, before)
    assert one.shape == images.shape
    assert one.dtype == images.dtype
    assert 0 <= one.min() <= one.max() <= 1
    assert (one - images).abs().mean() > 0.01


def test_known_values():
    g = torch.Generator()
    gray = torch.full((1, 1, 12, 12), 0.5)
    assert torch.equal(corrupt(gray, "inversion", generator=g), gray)
    assert torch.equal(corrupt(gray, "contrast", generator=g), gray)
    assert torch.equal(corrupt(gray, "brightness", generator=g), gray + 0.25)
    assert corrupt(gray, "blur", generator=g)[0, 0, 6, 6].item() == pytest.approx(0.5, abs=0.02)
    dark = corrupt(gray, "occlusion", generator=g) == 0
    assert 9 <= dark.sum() <= 30
    point = torch.zeros(1, 1, 13, 13)
    point[0, 0, 6, 6] = 1
    turned = corrupt(point, "rotation", generator=g)
    assert turned[0, 0, 6, 6].item() == pytest.approx(1.0)  # the center stays


def test_tasks_are_whitened_and_split():
    tasks = _tasks()
    assert tasks.features.shape == (10, 30, 6)
    assert tasks.test_features.shape == (10, 10, 6)
    flat = tasks.features.flatten(0, 1)[:, :5]
    torch.testing.assert_close(flat.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(flat.T @ flat / 300, torch.eye(5).double(), rtol=0, atol=1e-6)
    assert sum(tasks.positives) == 30


def test_draws_are_balanced_and_from_the_task():
    tasks = _tasks()
    x, y = draw_task(tasks, 4 * 7 + 2, 400, torch.Generator().manual_seed(3))
    assert y.sum() == 0
    place = (x[:, None] == tasks.features[7]).all(-1)
    assert place.any(1).all()
    inside = tasks.labels[place.to(torch.uint8).argmax(1)] == 2
    assert torch.equal(inside, y > 0)


def test_balanced_accuracy_by_counting():
    tasks = _tasks()
    chosen = torch.tensor([5, 38])
    beta = torch.randn(2, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = balanced_accuracy(tasks, chosen, beta)
    for i, task in enumerate(chosen.tolist()):
        right = {True: [], False: []}
        for x, label in zip(tasks.test_features[task // 4], tasks.test_labels):
            inside = bool(label == task % 4)
            right[inside].append(float(bool(x @ beta[i] > 0) == inside))
        expected = sum(sum(v) / len(v) for v in right.values()) / 2
        assert found[i].item() == pytest.approx(expected)


def test_bad_input():
    images, labels = _images()
    g = torch.Generator()
    with pytest.raises(ValueError, match="name must be one of noise"):
        corrupt(images, "fog", generator=g)
    with pytest.raises(ValueError, match="images must have shape"):
        corrupt(images[0], "blur", generator=g)
    with pytest.raises(TypeError, match="floating point"):
        corrupt(images.long(), "blur", generator=g)
    with pytest.raises(ValueError, match="num_train"):
        corrupted_tasks(images, labels, dim=5, num_train=40, generator=g)
    with pytest.raises(ValueError, match="dim must lie"):
        corrupted_tasks(images, labels, dim=50, num_train=30, generator=g)
    with pytest.raises(ValueError, match="task must lie"):
        draw_task(_tasks(), 40, 5, g)
    with pytest.raises(ValueError, match="coefficients must have shape"):
        balanced_accuracy(_tasks(), torch.tensor([1]), torch.ones(1, 3))
