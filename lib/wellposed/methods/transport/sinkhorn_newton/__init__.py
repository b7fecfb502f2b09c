r"""Sinkhorn-Newton-Sparse: a few Sinkhorn sweeps, then Newton with a sparsified Hessian.

Xun Tang, Michael Shavlovsky, Holakou Rahmanian, Elisa Tardini, Kiran Koshy Thekumparampil, Tesi
Xiao and Lexing Ying, "Accelerating Sinkhorn Algorithm with Sparse Newton Iterations", ICLR 2024,
arXiv 2401.12253.

Claim: after a short warm-up the Hessian of the dual is nearly sparse, so that Newton's method
needs only the largest entries of the plan and ends in a handful of steps what takes Sinkhorn
thousands of sweeps.

The problem has a weight $1/\eta$ on the entropy, so a *large* $\eta$ means little regularization:

$$\min_{P\mathbf 1=r,\;P^\top\mathbf 1=c}\ \langle C,P\rangle
+\tfrac1\eta\sum_{ij}P_{ij}\log P_{ij}.$$

Its dual is the Lyapunov potential, which both stages maximize over $x\in\mathbb R^n,
y\in\mathbb R^m$:

$$f(x,y)=-\tfrac1\eta\sum_{ij}P_{ij}+r^\top x+c^\top y,\qquad P_{ij}=e^{\eta(x_i+y_j-C_{ij})-1},$$

$$\nabla f=\binom{r-P\mathbf 1}{c-P^\top\mathbf 1},\qquad
-\nabla^2f=\eta\begin{pmatrix}\mathrm{diag}(P\mathbf 1)&P\\P^\top&\mathrm{diag}(P^\top\mathbf 1)
\end{pmatrix}.$$

Departures from the paper: a sparsity $\lambda$ is the kept fraction of the $nm$ entries of $P$
(the paper appears to count entries of the $2n\times2n$ Hessian, so its $2/n$ is about our $4/n$);
conjugate gradients run on the Hessian after its diagonal has been scaled to one (the Jacobi
preconditioner) and its row block eliminated, which is exact and halves their number; their
tolerance tightens as the error falls (Nocedal and Wright, "Numerical Optimization", section 7.1);
what remains of the diagonal is raised by 50 units of rounding, and the line search skips steps
that are longer than the spread of the costs.
"""

from __future__ import annotations

from wellposed.data.transport_problems import image_transport, random_assignment

# The paper's page shows the source of these four.
from wellposed.methods.transport.sinkhorn_newton.newton import _direction as _direction
from wellposed.methods.transport.sinkhorn_newton.newton import _line_search as _line_search
from wellposed.methods.transport.sinkhorn_newton.newton import _newton_stage as _newton_stage
from wellposed.methods.transport.sinkhorn_newton.newton import _normalized as _normalized
from wellposed.methods.transport.sinkhorn_newton.potential import (
    lyapunov_potential,
    mass_outside,
    transport_plan,
)
from wellposed.methods.transport.sinkhorn_newton.solvers import (
    SinkhornResult,
    sinkhorn,
    sinkhorn_newton_sparse,
    sparse_newton_direction,
)

__all__ = [
    "SinkhornResult",
    "image_transport",
    "lyapunov_potential",
    "mass_outside",
    "random_assignment",
    "sinkhorn",
    "sinkhorn_newton_sparse",
    "sparse_newton_direction",
    "transport_plan",
]
