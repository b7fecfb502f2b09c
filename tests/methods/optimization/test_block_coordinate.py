"""Tests of wellposed.methods.optimization.block_coordinate."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, softplus

from contract import Case
from wellposed.methods.optimization.block_coordinate import (
    GramBound,
    block_coordinate_descent,
    forest_block,
    forest_descent,
    forest_partition,
    label_propagation,
    select_fixed_block,
    select_variable_block,
    solve_forest,
)

F64 = torch.float64
TRIANGLE = [[1, 2], [0, 2], [0, 1]]
PATH = torch.tensor([[0, 1], [1, 2], [2, 3], [2, 4]])


def _spd(g: torch.Generator, n: int = 8) -> torch.Tensor:
    a = torch.randn(n + 4, n, generator=g, dtype=F64) * torch.logspace(-0.5, 0.5, n, dtype=F64)
    return a.T @ a


def _quadratic(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, b = _spd(g, n), torch.randn(n, generator=g, dtype=F64)
    return (lambda x: x @ h @ x / 2 - b @ x), h, b


def _run(h, b, **options):
    return block_coordinate_descent(
        lambda x: x @ h @ x / 2 - b @ x, h, torch.zeros_like(b), **options
    ).x


def _graph(weights, rhs):
    return torch.full_like(rhs, 4.0), PATH, weights, rhs


CASES = {
    "block_coordinate_descent": Case(
        inputs=lambda g: (_spd(g), torch.randn(8, generator=g)),
        call=lambda h, b: _run(
            h, b, block_size=3, rule="random", generator=torch.Generator().manual_seed(1)
        ),
    ),
    "forest_block": Case(
        inputs=lambda g: (torch.randperm(3, generator=g),),
        call=lambda order: forest_block(order, TRIANGLE),
    ),
    "forest_descent": Case(
        inputs=lambda g: (torch.rand(4, generator=g), torch.randn(5, generator=g)),
        call=lambda w, r: forest_descent(
            torch.full_like(r, 4.0), PATH.to(r.device), w, r, torch.zeros_like(r), num_iters=2
        ),
    ),
    "forest_partition": Case(
        inputs=lambda g: (torch.randperm(3, generator=g),),
        call=lambda order: forest_partition(order, TRIANGLE),
    ),
    "label_propagation": Case(
        inputs=lambda g: (torch.rand(4, generator=g) + 1, torch.randn(5, generator=g)),
        call=lambda w, y: label_propagation(
            PATH.to(y.device), w, y, torch.tensor([True, False, False, False, True]).to(y.device)
        ),
    ),
    "select_fixed_block": Case(
        inputs=lambda g: (torch.randn(4, generator=g),),
        call=lambda grad: select_fixed_block(grad, torch.arange(4).to(grad.device).split(2)),
    ),
    "select_variable_block": Case(
        inputs=lambda g: (torch.randn(8, generator=g), _spd(g)),
        call=lambda grad, h: select_variable_block(grad, 3, "gsq", hessian=h),
    ),
    "solve_forest": Case(
        inputs=lambda g: (torch.rand(4, generator=g), torch.randn(5, generator=g)),
        call=lambda w, r: solve_forest(torch.full_like(r, 4.0), PATH.to(r.device), w, r),
    ),
}


# --- selection ------------------------------------------------------------------------------------


def test_variable_rules_from_sorted_lists():
    """Fails if gsd divides by L instead of its root, or gs takes signed values."""
    gradient = torch.tensor([-4.0, 3.0, 1.0, 2.0], dtype=F64)
    lipschitz = torch.tensor([16.0, 4.0, 0.2, 1.0], dtype=F64)  # |g|/sqrt(L): 1, 1.5, 2.24, 2
    assert select_variable_block(gradient, 2).tolist() == [0, 1]
    assert select_variable_block(gradient, 2, "gsd", lipschitz=lipschitz).tolist() == [2, 3]


def test_gsq_comes_close_to_the_best_of_all_blocks():
    """Fails if thresholding starts at zero: it then returns the block of gs."""
    share = {"gsq": [], "gs": []}
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(30, 10, generator=g, dtype=F64) * torch.logspace(-1, 1, 10, dtype=F64)
        h, gradient = a.T @ a, a.T @ torch.randn(30, generator=g, dtype=F64)
        gain = {}
        for b in map(list, itertools.combinations(range(10), 3)):
            value = gradient[b] @ torch.linalg.solve(h[b][:, b], gradient[b])
            gain[tuple(b)] = float(value) / 2
        for rule, shares in share.items():
            found = select_variable_block(gradient, 3, rule, hessian=h)
            shares.append(gain[tuple(sorted(found.tolist()))] / max(gain.values()))
    assert min(share["gsq"]) > 0.5
    assert np.mean(share["gsq"]) > 0.8 > 0.7 > np.mean(share["gs"])


def test_gsq_is_exact_for_a_scaled_identity():
    gradient = torch.tensor([1.0, -3.0, 2.0, 0.5], dtype=F64)
    found = select_variable_block(gradient, 2, "gsq", hessian=3 * torch.eye(4, dtype=F64))
    assert sorted(found.tolist()) == [1, 2]


def test_more_thresholding_steps_change_some_blocks():
    changed = 0
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(30, 40, generator=g, dtype=F64) * torch.logspace(-1, 1, 40, dtype=F64)
        gradient, h = a.T @ torch.randn(30, generator=g, dtype=F64), a.T @ a
        one, many = (
            set(select_variable_block(gradient, 6, "gsq", hessian=h, num_iters=k).tolist())
            for k in (1, 30)
        )
        changed += one != many
    assert changed > 0


@pytest.mark.parametrize("sizes", [(3, 3, 2), (1, 4, 3)])
def test_fixed_rules_from_loops(sizes):
    """Fails with 1-norms in place of squared 2-norms, or if padding enters a score."""
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        h, gradient = _spd(g), torch.randn(8, generator=g, dtype=F64)
        blocks, diagonal = list(torch.randperm(8, generator=g).split(sizes)), h.diagonal()
        best = {}
        for rule in ("gs", "gsl", "gsd", "gsq"):
            scores = []
            for b in blocks:
                gb, hb = gradient[b], h[b][:, b]
                scores.append(
                    {
                        "gs": gb @ gb,
                        "gsl": gb @ gb / torch.linalg.eigvalsh(hb)[-1],
                        "gsd": (gb * gb / diagonal[b]).sum(),
                        "gsq": gb @ torch.linalg.solve(hb, gb),
                    }[rule]
                )
            best[rule] = int(np.argmax([float(s) for s in scores]))
            found = select_fixed_block(gradient, blocks, rule, lipschitz=diagonal, hessian=h)
            assert found == best[rule]
    assert isinstance(found, int)


def test_squared_norms_differ_from_sums_of_absolute_values():
    gradient = torch.tensor([3.0, 0.0, 2.0, 2.0])
    assert select_fixed_block(gradient, [torch.tensor([0, 1]), torch.tensor([2, 3])]) == 0


# --- descent --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["random", "cyclic", "lipschitz", "gs", "gsl", "gsd", "gsq"])
@pytest.mark.parametrize("update", ["gradient", "newton"])
@pytest.mark.parametrize("fixed", [False, True])
def test_every_arm_descends_to_the_solution(rule, update, fixed):
    if rule == "gsl" and not fixed:
        pytest.skip("for fixed blocks")
    f, h, b = _quadratic(6)
    blocks = torch.arange(6).split(2) if fixed else None
    options = {"generator": torch.Generator().manual_seed(0), "blocks": blocks, "rule": rule}
    result = block_coordinate_descent(
        f, h, b * 0, block_size=2, update=update, num_iters=600, **options
    )
    assert (result.objective.diff() <= 1e-12).all()
    gap = result.gap(f(torch.linalg.solve(h, b)))
    assert gap[-1] < (0.1 if rule == "lipschitz" else 1e-2)
    assert result.objective.shape == result.support.shape == (601,)
    assert result.support[0] == 0


def test_newton_keeps_the_promise_exactly_and_gradient_half_of_its_own():
    """Fails if the sign of the step or the factor 1/2 changes."""
    f, h, b = _quadratic()
    block = select_variable_block(-b, 3, "gsd", lipschitz=h.diagonal())
    gb, hb = b[block], h[block][:, block]
    for update, promise in (
        ("newton", gb @ torch.linalg.solve(hb, gb) / 2),
        ("gradient", gb @ gb / torch.linalg.eigvalsh(hb)[-1] / 2),
    ):
        run = block_coordinate_descent(f, h, b * 0, block_size=3, update=update, num_iters=1)
        gain = run.objective[0] - run.objective[1]
        if update == "newton":
            torch.testing.assert_close(gain, promise)
        else:
            assert gain >= promise


def test_a_block_of_everything_is_newtons_method():
    f, h, b = _quadratic()
    run = block_coordinate_descent(f, h, b * 0, block_size=8, num_iters=1)
    torch.testing.assert_close(run.x, torch.linalg.solve(h, b), rtol=1e-8, atol=1e-10)
    assert run.residual < 1e-9


def test_singular_blocks_and_columns_of_zeros():
    """Fails with 0/0 in gsd, or without the raised diagonal in Cholesky's method."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 12, generator=g, dtype=F64)
    a[:, 3], a[:, 7] = 0.0, a[:, 6]
    y = torch.randn(5, generator=g, dtype=F64)
    f = lambda x: (a @ x - y).square().sum() / 2  # noqa: E731
    for rule, size in (("gsd", 12), ("gsd", 8), ("gsq", 6), ("random", 9)):
        run = block_coordinate_descent(
            f, a.T @ a, y.new_zeros(12), block_size=size, rule=rule, num_iters=60, generator=g
        )
        assert run.x.isfinite().all()
        assert run.objective[-1] < 1e-12 * run.objective[0]


def test_gram_bound_is_the_same_as_its_matrix():
    g = torch.Generator().manual_seed(0)
    a, y = torch.randn(15, 6, generator=g, dtype=F64), torch.randint(4, (15,), generator=g)
    for classes, scale in ((1, 0.25), (4, 0.5)):
        bound, n = GramBound(a, scale, classes), 6 * classes
        center = torch.eye(classes, dtype=F64) - (1 / classes if classes > 1 else 0)
        matrix = scale * torch.kron(a.T @ a, center)
        sign = torch.where(y > 1, 1.0, -1.0)
        f = (
            (lambda x: cross_entropy(a @ x.view(6, 4), y, reduction="sum"))
            if classes > 1
            else (lambda x, s=sign: softplus(-s * (a @ x)).sum())
        )
        true = torch.autograd.functional.hessian(f, torch.randn(n, generator=g, dtype=F64))
        assert torch.linalg.eigvalsh(matrix - true)[0] > -1e-9
        for rule in ("gsd", "gsq"):
            one, two = (
                block_coordinate_descent(f, h, a.new_zeros(n), block_size=3, rule=rule)
                for h in (bound, matrix)
            )
            torch.testing.assert_close(one.x, two.x, rtol=1e-6, atol=1e-8)


def test_block_hessian_is_faster_than_the_bound_on_logistic_loss():
    g = torch.Generator().manual_seed(1)
    a = torch.randn(60, 10, generator=g, dtype=F64)
    y = torch.where(torch.rand(60, generator=g) < 0.5, -1.0, 1.0)
    f = lambda x: softplus(-y * (a @ x)).sum()  # noqa: E731

    def curvature(x, block):
        p = torch.sigmoid(a @ x)
        return (a[:, block].T * (p * (1 - p))) @ a[:, block]

    runs = [
        block_coordinate_descent(
            f, GramBound(a, 0.25), a.new_zeros(10), block_size=10, num_iters=5, block_hessian=k
        )
        for k in (None, curvature)
    ]
    assert runs[1].residual < 1e-9 < 1e-5 < runs[0].residual


def test_lipschitz_replaces_the_diagonal_of_gsd():
    f, h, b = _quadratic()
    runs = [
        block_coordinate_descent(f, h, b * 0, block_size=2, num_iters=3, lipschitz=d).objective
        for d in (None, h.diagonal(), h.abs().sum(1), torch.ones(8, dtype=F64))
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    gs = block_coordinate_descent(f, h, b * 0, block_size=2, num_iters=3, rule="gs").objective
    torch.testing.assert_close(runs[3], gs)
    assert not runs[0].equal(runs[3])


def test_hyper_parameters_change_the_output():
    f, h, b = _quadratic()
    base = {"block_size": 2, "rule": "random", "update": "newton", "num_iters": 4}
    start = torch.Generator()

    def run(**k):
        start.manual_seed(0)
        return block_coordinate_descent(f, h, b * 0, generator=start, **{**base, **k}).x

    for change in (
        {"block_size": 3},
        {"rule": "lipschitz"},
        {"rule": "cyclic", "num_iters": 8},
        {"update": "gradient"},
        {"num_iters": 5},
        {"blocks": torch.arange(8).split(2)},
        {"nonnegative": True},
    ):
        assert not run().equal(run(**change)), change
    other = block_coordinate_descent(f, h, b * 0, generator=start.manual_seed(1), **base).x
    assert not run().equal(other)


# --- x >= 0 ---------------------------------------------------------------------------------------


def _lasso(seed=0, rows=40, columns=100, share=0.2):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, columns, generator=g, dtype=F64) + 0.3
    y = a[:, :5].sum(1) + 0.1 * torch.randn(rows, generator=g, dtype=F64)
    penalty = float(share * (a.T @ y).abs().max())
    return a, y, penalty, (lambda x: (a @ x - y).square().sum() / 2 + penalty * x.sum())


@pytest.mark.parametrize("update", ["newton", "gradient"])
@pytest.mark.parametrize("fixed", [False, True])
def test_nonnegative_lasso_agrees_with_scikit_learn(update, fixed):
    """Fails if variables at zero with a positive gradient are not held."""
    from sklearn.linear_model import Lasso

    a, y, penalty, f = _lasso(columns=60)
    model = Lasso(alpha=penalty / 40, fit_intercept=False, positive=True, tol=1e-14, max_iter=10**6)
    expected = model.fit(a.numpy(), y.numpy()).coef_
    steps = 200 if update == "newton" else 1500
    run = block_coordinate_descent(
        f,
        GramBound(a),
        a.new_zeros(60),
        block_size=20,
        update=update,
        num_iters=steps,
        nonnegative=True,
        blocks=torch.arange(60).split(20) if fixed else None,
    )
    assert (run.x >= 0).all()
    assert (run.objective.diff() <= 1e-12 * run.objective[0]).all()
    np.testing.assert_allclose(run.x.numpy(), expected, atol=1e-6)
    assert run.residual < 1e-6


@pytest.mark.slow  # numba compiles
def test_nonnegative_lasso_and_lasso_agree_with_skglm():
    """With a sign split the same solver does the ordinary lasso."""
    skglm = pytest.importorskip("skglm")
    a, y, penalty, f = _lasso(1)
    model = skglm.Lasso(alpha=penalty / 40, fit_intercept=False, positive=True, tol=1e-10)
    expected = model.fit(a.numpy(), y.numpy()).coef_
    options = {"block_size": 20, "nonnegative": True, "num_iters": 60}
    run = block_coordinate_descent(f, GramBound(a), a.new_zeros(100), **options)
    np.testing.assert_allclose(run.x.numpy(), expected, atol=1e-5)
    model = skglm.Lasso(alpha=penalty / 40, fit_intercept=False, tol=1e-10)
    expected = model.fit(a.numpy(), y.numpy()).coef_
    both = torch.cat([a, -a], 1)
    split = lambda x: (both @ x - y).square().sum() / 2 + penalty * x.sum()  # noqa: E731
    run = block_coordinate_descent(split, GramBound(both), a.new_zeros(200), **options)
    np.testing.assert_allclose((run.x[:100] - run.x[100:]).numpy(), expected, atol=1e-5)


def test_nonnegative_least_squares_agrees_with_scipy():
    from scipy.optimize import nnls

    g = torch.Generator().manual_seed(2)
    a, y = torch.randn(30, 12, generator=g, dtype=F64), torch.randn(30, generator=g, dtype=F64)
    f = lambda x: (a @ x - y).square().sum() / 2  # noqa: E731
    start = torch.rand(12, generator=g, dtype=F64)
    run = block_coordinate_descent(f, a.T @ a, start, block_size=12, nonnegative=True, num_iters=30)
    np.testing.assert_allclose(run.x.numpy(), nnls(a.numpy(), y.numpy())[0], atol=1e-9)


def test_two_metric_projection_ends_and_gradient_steps_do_not():
    a, _, _, f = _lasso(3)
    reference = block_coordinate_descent(
        f, GramBound(a), a.new_zeros(100), block_size=30, nonnegative=True, num_iters=100
    )
    gaps = [
        block_coordinate_descent(
            f,
            GramBound(a),
            a.new_zeros(100),
            block_size=20,
            nonnegative=True,
            update=u,
            num_iters=15,
        ).gap(reference.objective[-1])
        for u in ("newton", "gradient")
    ]
    assert gaps[0][-1] < 1e-12 < 1e-6 < gaps[1][-1]


def test_blocks_beyond_the_rank_do_not_jam():
    """Fails without the gradient step after failed halvings."""
    a, _, _, f = _lasso(4, rows=20, columns=80, share=0.01)
    run = block_coordinate_descent(
        f, GramBound(a), a.new_zeros(80), block_size=80, nonnegative=True, num_iters=400
    )
    assert run.residual < 1e-6


def test_zero_columns_leave_under_a_penalty():
    a, y, penalty, _ = _lasso(5, columns=30)
    a[:, 4] = 0
    f = lambda x: (a @ x - y).square().sum() / 2 + penalty * x.sum()  # noqa: E731
    run = block_coordinate_descent(
        f, GramBound(a), a.new_ones(30), block_size=10, nonnegative=True, num_iters=60
    )
    assert run.x[4] == 0
    assert run.residual < 1e-8


# --- graphs ---------------------------------------------------------------------------------------


def test_forest_descent_agrees_with_a_loop_of_dense_solves():
    """Fails if edges to nodes outside the block enter the system."""
    g = torch.Generator().manual_seed(0)
    edges = torch.combinations(torch.arange(9))[torch.rand(36, generator=g) < 0.4]
    weights = -torch.rand(len(edges), generator=g, dtype=F64)
    h = torch.diag(torch.full((9,), 5.0, dtype=F64))
    h[edges[:, 0], edges[:, 1]] = h[edges[:, 1], edges[:, 0]] = weights
    rhs, near = (
        torch.randn(9, generator=g, dtype=F64),
        [h[i].nonzero()[:, 0].tolist() for i in range(9)],
    )
    near = [[j for j in row if j != i] for i, row in enumerate(near)]
    run = forest_descent(h.diagonal(), edges, weights, rhs, rhs * 0, num_iters=4, rule="gs")
    x = torch.zeros_like(rhs)
    for t in range(4):
        gradient = h @ x - rhs
        torch.testing.assert_close(run.objective[t], x @ h @ x / 2 - rhs @ x)
        block = forest_block(gradient.abs().argsort(descending=True), near)
        x[block] -= torch.linalg.solve(h[block][:, block], gradient[block])
    torch.testing.assert_close(run.x, x)
    arms = [
        forest_descent(h.diagonal(), edges, weights, rhs, rhs * 0, num_iters=2, generator=g, **k).x
        for k in ({}, {"rule": "random"}, {"blocks": [torch.arange(2), torch.arange(2, 4)]})
    ]
    assert not arms[0].equal(arms[1])
    assert arms[2][4:].eq(0).all()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rule": "best"}, ValueError, "rule must be one of"),
        ({"rule": "gsl"}, ValueError, "rule must be one of"),
        ({"update": "exact"}, ValueError, "update must be one of"),
        ({"block_size": 0}, ValueError, "block_size must lie between 1 and 8, got 0"),
        ({"block_size": 9}, ValueError, "block_size must lie between 1 and 8, got 9"),
        ({"num_iters": -1}, ValueError, "num_iters must be at least 0"),
        ({"hessian": torch.eye(7)}, ValueError, r"hessian must be of shape \(8, 8\)"),
        ({"x0": torch.zeros(2, 4)}, ValueError, "x0 must be floating"),
        ({"x0": torch.zeros(8).half()}, TypeError, "float32 or float64"),
        ({"x0": -torch.ones(8), "nonnegative": True}, ValueError, "x0 must be at least 0"),
        ({"blocks": []}, ValueError, "blocks must hold at least one"),
        ({"blocks": [torch.tensor([8])]}, ValueError, "coordinates from 0 to 7"),
        ({"blocks": [torch.tensor([0.5])]}, ValueError, "int64"),
        ({"lipschitz": -torch.ones(8)}, ValueError, "lipschitz must be at least 0"),
        ({"objective": lambda x: x.sum()[None]}, ValueError, "0-d tensor"),
    ],
)
def test_bad_descent(change, error, text):
    good = {"objective": lambda x: x @ x / 2, "hessian": torch.eye(8), "x0": torch.zeros(8)}
    with pytest.raises(error, match=text):
        block_coordinate_descent(**{**good, "block_size": 2, **change})


def test_bad_selection():
    g = torch.ones(4)
    with pytest.raises(ValueError, match="rule must be one of gs, gsd, gsq"):
        select_variable_block(g, 2, "gsl")
    with pytest.raises(ValueError, match="size must lie between 1 and 4"):
        select_variable_block(g, 5)
    with pytest.raises(ValueError, match="lipschitz must be at least 0 and of shape"):
        select_variable_block(g, 2, "gsd")
    with pytest.raises(ValueError, match="hessian must be of shape"):
        select_variable_block(g, 2, "gsq")
    with pytest.raises(ValueError, match="num_iters must be at least 1"):
        select_variable_block(g, 2, "gsq", hessian=torch.eye(4), num_iters=0)
    with pytest.raises(ValueError, match="hessian must be of shape"):
        select_fixed_block(g, [torch.arange(4)], "gsl")
    with pytest.raises(ValueError, match="rule must be one of"):
        select_fixed_block(g, [torch.arange(4)], "greedy")
    with pytest.raises(ValueError, match="blocks must hold"):
        select_fixed_block(g, [])


def test_bad_graphs():
    w, r = torch.ones(4), torch.ones(5)
    with pytest.raises(ValueError, match="rule must be one of"):
        forest_descent(*_graph(w, r), r, rule="gsq")
    with pytest.raises(ValueError, match=r"x0 must have shape \(5,\)"):
        forest_descent(*_graph(w, r), torch.zeros(4))
    with pytest.raises(ValueError, match="cycle"):
        forest_descent(
            r[:3],
            torch.tensor([[0, 1], [1, 2], [0, 2]]),
            w[:3],
            r[:3],
            r[:3],
            blocks=[torch.arange(3)],
        )


def test_gsq_of_a_bound_of_zeros():
    """Fails if its largest eigenvalue is divided by."""
    assert len(select_variable_block(torch.ones(4), 2, "gsq", hessian=torch.zeros(4, 4))) == 2


def test_a_bound_of_another_dtype_is_refused():
    """It used to fail in the middle of a product."""
    f, h, _ = _quadratic()
    with pytest.raises(TypeError, match="hessian must be"):
        select_variable_block(torch.ones(8), 2, "gsq", hessian=h)
    with pytest.raises(TypeError, match="hessian must be"):
        block_coordinate_descent(f, h, torch.zeros(8), block_size=2)
