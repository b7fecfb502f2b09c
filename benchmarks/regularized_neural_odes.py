"""The adaptive Runge-Kutta solver beside torchdiffeq and torchode, to the same true error.

One small network as vector field, its weights enlarged so that the solution is not trivial. All use
a pair of orders 5 and 4: torchdiffeq its dopri5, torchode its Tsit5. At equal tolerance solvers are
not equally accurate, so each gets the loosest tolerance that keeps the error against a solution at
1e-12 below the goal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contest import OURS, Contender, contest, loosest
from wellposed.ops.ode import odeint, odeint_rows

GOAL = 1e-5
TOLERANCES = [10.0 ** (-k / 2) for k in range(6, 21)]
SOLVERS = (OURS, "ours, a step for each row", "torchdiffeq", "torchode")


class Field(nn.Module):
    """A network with the time as a further input; understands both shapes of time."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim + 1, width), nn.Linear(width, dim)

    def forward(self, t: Tensor | float, y: Tensor) -> Tensor:
        """Derivative at one time, or at one time for each row."""
        clock = torch.as_tensor(t, dtype=y.dtype).reshape(-1, 1).expand(len(y), 1)
        return self.second(torch.tanh(self.first(torch.cat([y, clock], 1))))


def contenders(small: bool, gradient: bool) -> dict[str, Contender]:
    """Solvers from time 0 to 1, alone or with the gradient in the weights."""
    torchdiffeq, torchode = pytest.importorskip("torchdiffeq"), pytest.importorskip("torchode")
    batch, dim, width = (3, 2, 4) if small else (128, 16, 64)
    torch.manual_seed(0)
    field = Field(dim, width).double()
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(2.5)
    y = torch.randn(batch, dim, dtype=torch.float64)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def ours(tol: float) -> Tensor:
        return odeint(field, y, rtol=tol, atol=tol).y

    def rows(tol: float) -> Tensor:
        return odeint_rows(field, y, rtol=tol, atol=tol).y

    def diffeq(tol: float) -> Tensor:
        end: Tensor = torchdiffeq.odeint(field, y, times, rtol=tol, atol=tol, method="dopri5")[-1]
        return end

    def ode(tol: float) -> Tensor:
        term = torchode.ODETerm(field)
        control = torchode.IntegralController(atol=tol, rtol=tol, term=term)
        problem = torchode.InitialValueProblem(
            y0=y, t_start=torch.zeros(len(y)).to(y), t_end=torch.ones(len(y)).to(y)
        )
        solved = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), control).solve(problem)
        return solved.ys[:, -1]

    def run(solve: Callable[[float], Tensor], tol: float) -> Tensor:
        if not gradient:
            with torch.no_grad():
                return solve(tol)
        field.zero_grad()
        end = solve(tol)
        end.square().sum().backward()
        return end.detach()

    with torch.no_grad():
        exact = odeint(field, y, rtol=1e-12, atol=1e-12).y

    def error(end: Any) -> float:
        return float((end - exact).abs().max())

    return {
        name: loosest(TOLERANCES, lambda tol, f=f: run(f, tol), error, GOAL)  # type: ignore[misc]
        for name, f in zip(SOLVERS, (ours, rows, diffeq, ode))
    }


@contest(*SOLVERS, goal=GOAL, paper=True)
def test_prediction(small: bool) -> dict[str, Contender]:
    """128 states of dimension 16, the solution alone."""
    return contenders(small, gradient=False)


@contest(*SOLVERS, goal=GOAL, paper=True)
def test_training(small: bool) -> dict[str, Contender]:
    """128 states of dimension 16, with the gradient through the solver's steps."""
    return contenders(small, gradient=True)
