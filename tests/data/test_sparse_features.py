"""Tests of wellposed.data.sparse_features."""

import numpy as np
import pytest
import torch

from wellposed.data.sparse_features import sparse_features


def test_sparse_features_follow_the_recipe_and_their_generator():
    a, b, c = (
        sparse_features(200, 400, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert a.equal(b)
    assert not a.equal(c)
    assert (a != 0).double().mean() == pytest.approx(10 * np.log(200) / 200, abs=0.02)
    sizes = a.sum(0) / (a != 0).sum(0)  # the mean of N(1, 1) times the size of the column
    assert sizes.std() == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (4, 0)])
def test_bad_sizes(rows, columns):
    with pytest.raises(ValueError, match="rows must be at least 2 and columns at least 1"):
        sparse_features(rows, columns, generator=torch.Generator())
