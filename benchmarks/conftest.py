"""Options of the comparisons, one thread for all, and the summary that the book shows."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits

# Jax reads these when it is first imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
RESULTS = Path(__file__).with_name("results.json")
PEERS = (
    "POT",
    "geomloss",
    "ott-jax",
    "scikit-learn",
    "skglm",
    "torchdiffeq",
    "torchode",
    "scipy",
    "dagma",
    "gcastle",
    "dcor",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="toy problems, to see that all runs")


@pytest.fixture(scope="session")
def small(request: pytest.FixtureRequest) -> bool:
    """Whether the problems are toys."""
    return bool(request.config.getoption("--small"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Everybody computes on one thread."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield


def summary(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each problem and solver, with the ratio of its time to ours.

    The range of a ratio sets the quartiles of one solver's rounds against the opposite quartiles
    of ours.
    """
    ours = {
        (b["extra_info"]["comparison"], b["group"]): b["stats"]
        for b in benchmarks
        if b["extra_info"]["solver"] == "ours"
    }
    rows = []
    for b in benchmarks:
        info, stats = b["extra_info"], b["stats"]
        own = ours[info["comparison"], b["group"]]
        rows.append(
            {
                "comparison": info["comparison"],
                "problem": b["group"],
                "paper": info["paper"],
                "solver": info["solver"],
                "setting": info["setting"],
                "error": info["error"],
                "reached": info["error"] <= info["goal"],
                "seconds": stats["median"],
                "ratio": stats["median"] / own["median"],
                "low": stats["q1"] / own["q3"],
                "high": stats["q3"] / own["q1"],
                "rounds": stats["rounds"],
            }
        )
    return rows


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Write what the book's page shows beside the full record of pytest-benchmark."""
    if config.getoption("--small"):
        return
    found = {
        "machine": f"{output_json['machine_info']['cpu']['brand_raw']}, one thread",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", *PEERS)},
        "rows": summary(output_json["benchmarks"]),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
