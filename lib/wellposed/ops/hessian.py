r"""Curvature of a scalar loss without its Hessian: products, trace, largest eigenvalue.

A Hessian $H$ of a million parameters does not fit into memory, but a product $Hv$ costs about two
gradients: it is the gradient of $\nabla L(\theta)^\top v$ (Pearlmutter 1994). Products are all
that is needed to estimate

- the trace, because $E[v^\top Hv]=\mathrm{Tr}\,H$ for independent signs $v_i=\pm1$
  (Hutchinson 1990), with the spread over probes as its standard error;
- the largest eigenvalue, by the Lanczos process, with the residual $\|Hq-\lambda q\|$ as its error
  bound: some eigenvalue lies within it.

A loss is a function without arguments, and its parameters are a module or a list of tensors that
require gradients. They are flattened in their order into one vector of length `p`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "EigenResult",
    "TraceEstimate",
    "hessian_trace",
    "hessian_vector_product",
    "lanczos",
    "per_sample_jacobian",
    "top_eigenvalue",
]

Parameters = nn.Module | Sequence[Tensor]
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class TraceEstimate:
    """Hutchinson's estimate of a trace; 0-d tensors in the dtype of the parameters."""

    trace: Tensor
    standard_error: Tensor  # of `trace`; 0 where the Hessian is diagonal
    probes: int


@dataclass(frozen=True)
class EigenResult:
    """The largest eigenvalue of a symmetric operator, as far as it was found."""

    value: Tensor  # 0-d, the Rayleigh quotient of `vector`
    vector: Tensor  # (p,), of norm 1
    residual: Tensor  # 0-d, the norm of (operator - value) vector
    n_iter: int  # products with the operator, without the last check
    converged: bool  # residual <= tol * max(|value|, tiny)


def hessian_vector_product(loss: Loss, parameters: Parameters, vector: Tensor) -> Tensor:
    r"""The product $Hv$ of a loss's Hessian with a vector, by two backward passes.

    $$Hv=\nabla_\theta\bigl(\nabla_\theta L(\theta)^\top v\bigr)$$

    Args:
        loss: computes the 0-d loss from the parameters' present values.
        parameters: a module (its parameters that require gradients) or a list of tensors that do,
            `p` numbers in all.
        vector: $v$, `(p,)`, of the parameters' dtype and device.

    Returns:
        $Hv$, `(p,)`, detached.

    Raises:
        TypeError: a parameter is not a floating-point tensor, or dtypes or devices differ.
        ValueError: no parameter, a parameter without `requires_grad`, a loss that is not 0-d or
            does not depend on any parameter, a vector of another shape.

    Source: Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> v = torch.tensor([1.0, 0.0])
        >>> hessian_vector_product(lambda: x[0] ** 2 * x[1], [x], v)     # (2 x1, 2 x0)
        tensor([4., 2.])
    """
    tensors, product = _operator(loss, parameters)
    like = tensors[0]
    size = sum(t.numel() for t in tensors)
    if vector.shape != (size,):
        raise ValueError(f"vector must have shape ({size},), got {tuple(vector.shape)}")
    if vector.dtype != like.dtype or vector.device != like.device:
        raise TypeError(
            f"vector must be {like.dtype} on {like.device} like the parameters, "
            f"got {vector.dtype} on {vector.device}"
        )
    return product(vector)


def hessian_trace(
    loss: Loss,
    parameters: Parameters,
    *,
    probes: int = 100,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    r"""Estimate the trace of a loss's Hessian with random signs.

    $$\mathrm{Tr}\,H\approx\frac1k\sum_{j=1}^k v_j^\top Hv_j,\qquad v_j\in\{-1,1\}^p$$

    Args:
        loss: computes the 0-d loss from the parameters' present values.
        parameters: a module or a list of tensors, see :func:`hessian_vector_product`.
        probes: number $k$ of random vectors, at least 2; the error falls as $1/\sqrt k$.
        generator: source of the signs.

    Returns:
        The mean over probes and its standard error, $\sqrt{2\sum_{i\ne j}H_{ij}^2/k}$ in
        expectation.

    Raises:
        TypeError, ValueError: see :func:`hessian_vector_product`; `probes` below 2.

    Source: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", 1990.

    Example:
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> hessian_trace(lambda: (x ** 4).sum(), [x]).trace     # diagonal: 12 + 12, no error
        tensor(24.)
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    tensors, product = _operator(loss, parameters)
    like = tensors[0]
    size = sum(t.numel() for t in tensors)
    where = like.device if generator is None else generator.device
    samples = []
    for _ in range(probes):
        signs = torch.randint(0, 2, (size,), generator=generator, device=where)
        vector = (2 * signs - 1).to(like)
        samples.append(vector @ product(vector))
    values = torch.stack(samples)
    return TraceEstimate(values.mean(), values.std() / probes**0.5, probes)


def top_eigenvalue(
    loss: Loss,
    parameters: Parameters,
    *,
    max_iter: int = 100,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> EigenResult:
    r"""The largest eigenvalue of a loss's Hessian by the Lanczos process.

    Largest means rightmost: a negative eigenvalue of larger size does not count.

    Args:
        loss: computes the 0-d loss from the parameters' present values.
        parameters: a module or a list of tensors, see :func:`hessian_vector_product`.
        max_iter: most Hessian-vector products, at least 1; as many vectors are kept.
        tol: residual, relative to the eigenvalue, at which to stop, positive.
        generator: source of the random start.

    Returns:
        Rayleigh quotient, vector, residual and whether it is small enough; a RuntimeWarning if it
        is not.

    Raises:
        TypeError, ValueError: see :func:`hessian_vector_product`; `max_iter` below 1, `tol` not
            positive.

    Source: Golub and Van Loan, "Matrix Computations", section 10.1.

    Example:
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> found = top_eigenvalue(lambda: x[0] ** 2 - 3 * x[1] ** 2, [x])     # 2 and -6
        >>> round(found.value.item(), 4), found.converged
        (2.0, True)
    """
    tensors, product = _operator(loss, parameters)
    like = tensors[0]
    size = sum(t.numel() for t in tensors)
    where = like.device if generator is None else generator.device
    start = torch.randn(size, generator=generator, device=where).to(like)
    return lanczos(product, start, max_iter=max_iter, tol=tol)


@torch.no_grad()
def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, *, max_iter: int = 100, tol: float = 1e-4
) -> EigenResult:
    r"""The largest eigenvalue of a symmetric operator from products with vectors.

    The largest eigenvalue of $Q^\top AQ$, where $Q$ is an orthonormal basis of
    $\{s,As,A^2s,\dots\}$. Every new vector is made orthogonal to all earlier ones twice, so
    rounding brings no copies.

    Args:
        product: $v\mapsto Av$ with $A$ symmetric, `(p,)` to `(p,)`.
        start: $s$, `(p,)`, not zero; an eigenvector orthogonal to it is not found.
        max_iter: most products, at least 1.
        tol: residual, relative to the eigenvalue, at which to stop, positive.

    Returns:
        Rayleigh quotient, vector, residual and whether it is small enough; a RuntimeWarning if it
        is not.

    Raises:
        ValueError: `start` is not a finite nonzero vector, `max_iter` below 1, `tol` not positive.

    Source: Golub and Van Loan, "Matrix Computations", section 10.1.

    Example:
        >>> found = lanczos(lambda v: torch.tensor([1.0, 3.0]) * v, torch.ones(2))
        >>> round(found.value.item(), 4), found.n_iter
        (3.0, 2)
    """
    if start.ndim != 1 or not start.isfinite().all() or not start.any():
        raise ValueError(f"start must be a finite nonzero vector, got shape {tuple(start.shape)}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    eps = torch.finfo(start.dtype).eps
    basis = start.new_zeros(min(max_iter, start.numel()), start.numel())
    basis[0] = start / start.norm()
    images = torch.zeros_like(basis)
    for k in range(1, len(basis) + 1):
        images[k - 1] = product(basis[k - 1])
        used, rest = basis[:k], images[k - 1].clone()
        for _ in range(2):
            rest = rest - used.T @ (used @ rest)
        small = used @ images[:k].T
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        scale, beta = values.abs().max(), rest.norm()
        # The residual of the Ritz vector is beta times its last entry; see the source.
        done = (beta * vectors[-1, -1].abs() <= tol * values[-1].abs()) | (beta <= eps * scale)
        if k == len(basis) or bool(done):
            break
        basis[k] = rest / beta
    vector = used.T @ vectors[:, -1]
    vector = vector / vector.norm()
    image = product(vector)
    value = vector @ image
    residual = (image - value * vector).norm()
    bound = torch.maximum(tol * value.abs(), 10 * eps * scale)
    converged = bool(residual <= bound)
    if not converged:
        warnings.warn(
            f"lanczos stopped at residual {float(residual):.1e} after {k} products; a larger "
            f"max_iter (now {max_iter}) or tol (now {tol:g}) may help",
            RuntimeWarning,
            stacklevel=2,
        )
    return EigenResult(value, vector, residual, k, converged)


@torch.no_grad()
def per_sample_jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    r"""The gradient of every prediction: rows $g_i=\nabla_\theta f(x_i;\theta)$.

    Args:
        model: maps `(n, ...)` to `(n,)`, each row on its own.
        inputs: `(n, ...)`.

    Returns:
        $J$, `(n, p)`, detached; columns in the order of `model.parameters()`.

    Raises:
        ValueError: no inputs, or a model whose output is not `(n,)`.

    With zero residuals $J^\top J/n$ is the Hessian of half the mean square, and in general its
    Gauss-Newton part.

    Source: the chain rule, by reverse mode vectorized over examples.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
        >>> per_sample_jacobian(net, torch.tensor([[3.0, 4.0]]))     # weights, then bias
        tensor([[3., 4., 1.]])
    """
    if len(inputs) == 0:
        raise ValueError("inputs must hold at least one example")
    shape = tuple(model(inputs).shape)
    if shape != (len(inputs),):
        raise ValueError(f"model must return shape ({len(inputs)},), got {shape}")
    n = len(inputs)
    # Every example gets its own copy of the parameters; then one backward pass gives all rows.
    copies = {
        name: p.detach().expand(n, *p.shape).requires_grad_()
        for name, p in model.named_parameters()
    }

    def predict(values: dict[str, Tensor], one: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, values, (one[None],))
        return out[0]

    with torch.enable_grad():
        total = torch.func.vmap(predict)(copies, inputs.detach()).sum()
    gradients = torch.autograd.grad(
        total, list(copies.values()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.reshape(n, -1) for g in gradients], 1)


def _operator(
    loss: Loss, parameters: Parameters
) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """The checked parameters, and products with the Hessian from one graph of the gradient."""
    tensors = _tensors(parameters)
    with torch.enable_grad():
        value = loss()
        if not isinstance(value, Tensor) or value.ndim != 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return a 0-d tensor, got {shape}")
        if not value.requires_grad:
            raise ValueError("loss must depend on the parameters, got a constant")
        slopes = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
    if all(slope is None for slope in slopes):
        raise ValueError("loss must depend on the parameters, got one that uses none of them")
    # A parameter that enters linearly has a gradient without a graph: its rows of H are zero.
    curved = [(i, s) for i, s in enumerate(slopes) if s is not None and s.requires_grad]
    sizes = [t.numel() for t in tensors]

    def product(vector: Tensor) -> Tensor:
        pieces = vector.split(sizes)
        if not curved:
            return torch.zeros_like(vector)
        with torch.enable_grad():
            # A sum instead of `grad_outputs`, whose first use in torch imports all of sympy.
            along = torch.stack([(s * pieces[i].view_as(s)).sum() for i, s in curved]).sum()
        rows = torch.autograd.grad(along, tensors, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(t) if r is None else r for r, t in zip(rows, tensors)]
        return torch.cat([row.reshape(-1) for row in filled]).detach()

    return tensors, product


def _tensors(parameters: Parameters) -> list[Tensor]:
    if isinstance(parameters, nn.Module):
        tensors: list[Tensor] = [p for p in parameters.parameters() if p.requires_grad]
    elif isinstance(parameters, Tensor):
        raise TypeError("parameters must be a module or a list of tensors, got one tensor")
    else:
        tensors = list(parameters)
    if not tensors:
        raise ValueError("parameters must hold at least one tensor that requires a gradient")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"parameters[{i}] must be a floating-point tensor")
        if not tensor.requires_grad:
            raise ValueError(f"parameters[{i}] must require a gradient")
        if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device:
            raise TypeError("parameters must share a dtype and a device")
    return tensors
