"""A tiny run of benchmarks/sparsity_constrained_transport.py."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "sparsity_constrained_transport.py"


def test_both_solvers_reach_the_same_value(capsys):
    spec = importlib.util.spec_from_file_location("benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = module.run(sizes=((24, 8),), k=6, repeats=1)
    assert set(results) == {"24 x 8, k = 6", "24 x 8, k = 24"}
    for row in results.values():
        assert row["ours_gap"] <= module.GAP
        assert row["pot_gap"] <= 1e-3
        assert row["ratio"] > 0
    assert "ratio" in capsys.readouterr().out
