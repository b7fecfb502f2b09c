"""What a comparison is made of: problems, and contenders that solve each to the same accuracy."""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

OURS = "ours"
SHORTEST_ROUND = 2e-3  # seconds; quicker calls are repeated inside a round
TIME_FOR_ROUNDS = 1.5
MOST_ROUNDS = 15


@dataclass(frozen=True)
class Contender:
    """One solver, ready to be timed.

    Attributes:
        call: solves the problem once, from the same start and with the same data as the others.
        error: distance of what `call` returns from the goal, as the comparison measures it.
        setting: what was chosen for this solver so that it reaches the goal, in words.
    """

    call: Callable[[], Any]
    error: Callable[[Any], float]
    setting: str = ""


def untouched(name: str) -> Any:
    """Import a peer past pytest, which would rewrite the assertions of all that it imports.

    That takes a minute for a large library, and numba cannot compile what it makes of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        finders = [f for f in sys.meta_path if not type(f).__module__.startswith("_pytest")]
        patch.setattr(sys, "meta_path", finders)
        try:
            return importlib.import_module(name)
        except ImportError:
            return pytest.skip(f"{name} is not installed")


def loosest(
    settings: Sequence[Any], solve: Callable[[Any], Any], error: Callable[[Any], float], goal: float
) -> Contender:
    """The first of the settings, from quick to careful, that reaches the goal; else the last."""
    for setting in settings:
        if setting == settings[-1] or error(solve(setting)) <= goal:
            break
    return Contender(lambda: solve(setting), error, f"at {setting:.2g}")


def contest(
    *solvers: str, goal: float, paper: bool = False
) -> Callable[[Callable[[bool], dict[str, Contender]]], Callable[..., None]]:
    """Turn a function that prepares a problem into one benchmark for each solver.

    Args:
        *solvers: names of the contenders, `OURS` among them.
        goal: largest error that counts as solved. Ours must reach it; a peer that does not is
            shown as such.
        paper: whether the problem is one of the paper's own cases.

    Returns:
        A decorator for a function of `small` (a toy size, for the tests) that returns the
        contenders by name. The first line of its docstring is the problem's name.
    """
    assert OURS in solvers

    def decorate(prepare: Callable[[bool], dict[str, Contender]]) -> Callable[..., None]:
        prepared = functools.cache(prepare)
        problem = (prepare.__doc__ or "").strip().splitlines()[0].rstrip(".")

        @pytest.mark.parametrize("solver", solvers)
        def race(solver: str, small: bool, benchmark: Any) -> None:
            contenders = prepared(small)
            assert set(contenders) == set(solvers)
            contender = contenders[solver]
            begin = time.process_time()
            result = contender.call()
            seconds = max(time.process_time() - begin, 1e-7)
            error = float(contender.error(result))
            if seconds < SHORTEST_ROUND:  # the first call of a quick one is mostly warming up
                begin = time.process_time()
                contender.call()
                seconds = max(time.process_time() - begin, 1e-7)
            if solver == OURS:
                assert error <= goal, f"ours misses the goal: {error} > {goal}"
            benchmark.group = problem
            benchmark.extra_info.update(
                comparison=prepare.__module__,
                solver=solver,
                paper=paper,
                error=error,
                goal=goal,
                setting=contender.setting,
            )
            benchmark.pedantic(
                contender.call,
                rounds=max(1, min(MOST_ROUNDS, round(TIME_FOR_ROUNDS / seconds))),
                iterations=max(1, round(SHORTEST_ROUND / seconds)),
            )

        race.__doc__ = prepare.__doc__
        race.__module__ = prepare.__module__
        return race

    return decorate
