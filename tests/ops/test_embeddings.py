"""How spread out embeddings are."""

import pytest
import torch
import torch.nn.functional as F

from contract import Case
from wellposed.ops.embeddings import embedding_geometry


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def _images(g):
    return (torch.randn(10, 4, generator=g),)


def test_geometry_against_loops():
    x = randn(6, 3)
    pairs = [F.cosine_similarity(x[i], x[j], dim=0) for i in range(6) for j in range(6) if i != j]
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    share = values / values.sum()
    found = embedding_geometry(x)
    torch.testing.assert_close(found.cosine, torch.stack(pairs).mean())
    torch.testing.assert_close(found.rank, torch.exp(-(share * share.log()).sum()))


def test_geometry_limits():
    line = torch.linspace(1, 2, 5, dtype=torch.float64)[:, None] * torch.tensor([[3.0, 4.0]])
    found = embedding_geometry(line.double())
    assert found.cosine.item() == pytest.approx(1.0)
    assert found.rank.item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="embeddings must have shape"):
        embedding_geometry(torch.ones(3))


def test_equal_embeddings_have_rank_one():
    """Fails if the eigenvalues, all zero, are divided by their sum."""
    found = embedding_geometry(torch.full((4, 3), 2.0))
    assert found.rank.item() == 1.0
    assert found.cosine.item() == pytest.approx(1.0)


CASES = {
    "embedding_geometry": Case(inputs=_images, call=embedding_geometry),
}
