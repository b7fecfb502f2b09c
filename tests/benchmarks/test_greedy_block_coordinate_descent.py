"""A tiny run of benchmarks/greedy_block_coordinate_descent.py."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "greedy_block_coordinate_descent.py"


@pytest.mark.slow  # numba compiles
def test_every_solver_reaches_the_gap():
    pytest.importorskip("skglm")
    spec = importlib.util.spec_from_file_location("benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = module.run(rows=40, columns=80, shares=(0.3,), block_sizes=(20,), repeats=2)
    assert set(results) == {"sparse, 0.3", "gaussian, 0.3"}
    for lines in results.values():
        assert set(lines) == {"ours", "scikit-learn", "skglm"}
        assert all(line["reached"] for line in lines.values())
        assert lines["ours"]["ratio"] == 1
