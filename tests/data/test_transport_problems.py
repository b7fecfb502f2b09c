"""Transport problems: random costs, and images on their pixel grid."""

import pytest
import torch

from wellposed.data.transport_problems import image_transport, random_assignment

F64 = torch.float64


def test_random_assignment_follows_its_generator():
    draws = [random_assignment(9, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not draws[0].equal(draws[2])
    assert 0 <= draws[0].min() < 0.2 < 0.8 < draws[0].max() < 1
    with pytest.raises(ValueError, match="n must be at least 1"):
        random_assignment(0, generator=torch.Generator())


@pytest.mark.parametrize("power", [1, 2])
def test_image_transport_from_loops(power):
    source, target = (torch.rand(3, 4, dtype=F64) for _ in range(2))
    cost, r, c = image_transport(source, target, power=power, constant=0.1)
    largest = 2**power + 3**power
    for p in range(12):
        for q in range(12):
            distance = abs(p // 4 - q // 4) ** power + abs(p % 4 - q % 4) ** power
            assert cost[p, q].item() == pytest.approx(distance / largest)
    torch.testing.assert_close(r, (source.flatten() + 0.1) / (source.sum() + 1.2))
    torch.testing.assert_close(c.sum(), torch.ones((), dtype=F64))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target": torch.ones(3, 3)}, "must share a shape"),
        ({"source": -torch.ones(2, 2)}, "must not be negative"),
        ({"power": 3}, "power must be 1 or 2, got 3"),
        ({"constant": 0.0}, "constant must be positive"),
    ],
)
def test_bad_images(arguments, text):
    good = {"source": torch.ones(2, 2), "target": torch.ones(2, 2), "power": 1}
    with pytest.raises(ValueError, match=text):
        image_transport(**{**good, **arguments})
