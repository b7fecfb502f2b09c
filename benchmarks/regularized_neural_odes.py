"""Our adaptive Runge-Kutta solver beside torchdiffeq and torchode, at the same tolerance.

One thread, float64, one small network as vector field, its weights enlarged so that the solution is
not trivial. All solvers use a pair of orders 5 and 4: torchdiffeq its dopri5, torchode its Tsit5.
They take turns, and the median CPU time of several rounds counts, once for the solution alone and
once with the gradient through the solver's steps. Beside the times stand the true errors, against a
solution at a tolerance of 1e-12, because at equal tolerance solvers are not equally accurate. A
ratio above 1 means that the other solver takes longer than ours.

Run it with ``python benchmarks/regularized_neural_odes.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torchdiffeq
import torchode
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from wellposed.ops.ode import odeint, odeint_rows

Solver = Callable[[Tensor, float], Tensor]


class Field(nn.Module):
    """A network with the time as a further input; understands both shapes of time."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim + 1, width), nn.Linear(width, dim)

    def forward(self, t: Tensor | float, y: Tensor) -> Tensor:
        """Derivative at one time, or at one time for each row."""
        clock = torch.as_tensor(t, dtype=y.dtype).reshape(-1, 1).expand(len(y), 1)
        return self.second(torch.tanh(self.first(torch.cat([y, clock], 1))))


def solvers(field: Field) -> dict[str, Solver]:
    """Each solver as a function of state and tolerance that gives the state at time one."""
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def ours(y: Tensor, tol: float) -> Tensor:
        return odeint(field, y, rtol=tol, atol=tol).y

    def rows(y: Tensor, tol: float) -> Tensor:
        return odeint_rows(field, y, rtol=tol, atol=tol).y

    def diffeq(y: Tensor, tol: float) -> Tensor:
        return torchdiffeq.odeint(field, y, times, rtol=tol, atol=tol, method="dopri5")[-1]

    def ode(y: Tensor, tol: float) -> Tensor:
        term = torchode.ODETerm(field)
        control = torchode.IntegralController(atol=tol, rtol=tol, term=term)
        problem = torchode.InitialValueProblem(
            y0=y, t_start=torch.zeros(len(y)).to(y), t_end=torch.ones(len(y)).to(y)
        )
        solved = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), control).solve(problem)
        return solved.ys[:, -1]

    return {"ours": ours, "ours, rows": rows, "torchdiffeq": diffeq, "torchode": ode}


def seconds(solve: Solver, field: Field, y: Tensor, tol: float, backward: bool) -> float:
    """CPU seconds of one run."""
    begin = time.process_time()
    if backward:
        field.zero_grad()
        solve(y, tol).square().sum().backward()
    else:
        with torch.no_grad():
            solve(y, tol)
    return time.process_time() - begin


def run(*, batch: int = 128, dim: int = 16, width: int = 64, rounds: int = 11) -> dict:
    """Ratios of time and the errors, for three tolerances.

    Returns:
        For each tolerance a dictionary: for each solver its `error`, and the ratios `forward` and
        `with_gradient` of its median time to that of ours.
    """
    torch.manual_seed(0)
    field = Field(dim, width).double()
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(2.5)
    y = torch.randn(batch, dim, dtype=torch.float64)
    with torch.no_grad():
        exact = odeint(field, y, rtol=1e-12, atol=1e-12).y
    found: dict = {}
    with threadpool_limits(1):
        torch.set_num_threads(1)
        for tol in (1e-4, 1e-6, 1e-8):
            names = solvers(field)
            times: dict = {(n, b): [] for n in names for b in (False, True)}
            for _ in range(rounds + 1):  # the first round warms up
                for (name, backward), spent in times.items():
                    spent.append(seconds(names[name], field, y, tol, backward))
            median = {key: statistics.median(spent[1:] or spent) for key, spent in times.items()}
            with torch.no_grad():
                found[tol] = {
                    name: {
                        "error": float((solve(y, tol) - exact).abs().max()),
                        "forward": median[name, False] / median["ours", False],
                        "with_gradient": median[name, True] / median["ours", True],
                        "forward_ms": 1e3 * median[name, False],
                    }
                    for name, solve in names.items()
                }
    return found


def main() -> None:
    """Print the table."""
    print("tolerance  solver        error    time / ours   with gradient   forward, ms")
    for tol, row in run().items():
        for name, got in row.items():
            print(
                f"{tol:9.0e}  {name:12s} {got['error']:8.1e} {got['forward']:12.2f} "
                f"{got['with_gradient']:15.2f} {got['forward_ms']:13.2f}"
            )


if __name__ == "__main__":
    main()
