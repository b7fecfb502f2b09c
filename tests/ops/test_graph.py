"""Tests of wellposed.ops.graph: forests, message passing, quadratics on graphs."""

import networkx as nx
import pytest
import torch

from contract import Case, sizes
from wellposed.ops.graph import (
    ForestPlan,
    forest_block,
    forest_partition,
    label_propagation,
    lattice_edges,
    nearest_neighbor_edges,
    restrict_to_block,
    solve_forest,
)

F64 = torch.float64


def _forest(n: int, seed: int, keep: float = 0.9):
    """Random forest with shuffled names, positive definite."""
    g = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(i, (1,), generator=g)) for i in range(1, n)]
    names = torch.randperm(n, generator=g)
    edges = names[torch.tensor([[p, i + 1] for i, p in enumerate(parents)])]
    edges = edges[torch.rand(n - 1, generator=g) < keep]
    weights = torch.randn(len(edges), generator=g, dtype=F64)
    sums = torch.zeros(n, dtype=F64).index_add_(
        0, edges.flatten(), weights.abs().repeat_interleave(2)
    )
    return sums + 0.5, edges, weights, torch.randn(n, generator=g, dtype=F64)


def _dense(diagonal, edges, weights):
    matrix = torch.diag(diagonal)
    for (i, j), w in zip(edges.tolist(), weights):
        matrix[i, j] = matrix[j, i] = w
    return matrix


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_solve_forest_from_a_dense_solve(n, seed):
    """Fails if a message has the wrong sign, or both nodes of a last pair are eliminated."""
    diagonal, edges, weights, rhs = (
        _forest(n, seed)
        if n > 1
        else (
            torch.tensor([2.0], dtype=F64),
            torch.zeros(0, 2).long(),
            torch.zeros(0).double(),
            torch.ones(1).double(),
        )
    )
    expected = torch.linalg.solve(_dense(diagonal, edges, weights), rhs)
    torch.testing.assert_close(solve_forest(diagonal, edges, weights, rhs), expected)


def test_solve_forest_has_the_gradients_of_a_dense_solve():
    diagonal, edges, weights, rhs = _forest(7, 1)
    inputs = [t.requires_grad_() for t in (diagonal, weights, rhs)]
    assert torch.autograd.gradcheck(lambda d, w, r: solve_forest(d, edges, w, r), inputs)


def test_a_plan_is_linear_in_its_edges():
    """Every edge is used once, and a path is peeled from both ends."""
    path = torch.stack([torch.arange(100), torch.arange(1, 101)], 1)
    plan = ForestPlan.of(101, path)
    assert sorted(plan.edge.tolist()) == list(range(100))
    assert plan.sizes == [2] * 50
    star = torch.stack([torch.zeros(50).long(), torch.arange(1, 51)], 1)
    assert ForestPlan.of(51, star).sizes == [50]


@pytest.mark.parametrize(
    "edges",
    [[[0, 1], [1, 2], [2, 0]], [[0, 1], [0, 1]], [[1, 1]], [[3, 0], [0, 1], [1, 2], [2, 0]]],
)
def test_cycles_are_refused(edges):
    edges = torch.tensor(edges)
    with pytest.raises(ValueError, match="edges must form a forest, found a cycle"):
        solve_forest(torch.ones(4), edges, torch.ones(len(edges)), torch.ones(4))


@pytest.mark.parametrize("seed", range(10))
def test_forest_block_is_a_maximal_forest_in_the_greedy_order(seed):
    """Fails if neighbors are counted instead of their trees being compared."""
    graph = nx.gnp_random_graph(30, 0.15, seed=seed)
    adjacency = [list(graph[i]) for i in range(30)]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    expected: list[int] = []
    for node in order.tolist():
        if nx.is_forest(graph.subgraph([*expected, node])):
            expected.append(node)
    assert forest_block(order, adjacency).tolist() == sorted(expected)


def test_a_node_may_join_two_trees():
    assert forest_block(torch.tensor([0, 2, 1]), [[1], [0, 2], [1]]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("independent", [False, True])
def test_forest_partition_covers_every_node_once(independent):
    graph = nx.gnp_random_graph(40, 0.15, seed=3)
    adjacency = [list(graph[i]) for i in range(40)]
    blocks = forest_partition(torch.randperm(40), adjacency, independent=independent)
    assert sorted(torch.cat(blocks).tolist()) == list(range(40))
    for block in blocks:
        part = graph.subgraph(block.tolist())
        assert nx.is_forest(part)
        assert not independent or part.number_of_edges() == 0
    assert len(forest_partition(torch.arange(40), adjacency)) < len(
        forest_partition(torch.arange(40), adjacency, independent=True)
    )


def test_label_propagation_from_loops():
    """Fails if unreachable nodes are kept, or labels enter with the wrong sign."""
    g = torch.Generator().manual_seed(0)
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3], [4, 5]])
    weights, y = torch.rand(6, generator=g, dtype=F64) + 0.1, torch.randn(6, generator=g, dtype=F64)
    labeled = torch.tensor([True, False, False, False, False, False])
    q = label_propagation(edges, weights, y, labeled)
    assert q.nodes.tolist() == [1, 2, 3]
    x = torch.randn(3, generator=g, dtype=F64)

    def energy(z):
        full = y.clone()
        full[[1, 2, 3]] = z
        pairs = [w * (full[i] - full[j]) ** 2 / 2 for (i, j), w in zip(edges.tolist(), weights)]
        return sum(pairs[:5])

    zero = torch.zeros(3, dtype=F64)
    torch.testing.assert_close(q.value(x), energy(x) - energy(zero))
    torch.testing.assert_close(q.dense(), torch.autograd.functional.hessian(energy, x))
    torch.testing.assert_close(q.product(x), q.dense() @ x)
    assert [sorted(row) for row in q.adjacency()] == [[1, 2], [0, 2], [0, 1]]


def test_edges_of_lattices_and_neighbors():
    graph = nx.grid_2d_graph(4, 4)
    assert {tuple(e) for e in lattice_edges(4).tolist()} == {
        (a[0] * 4 + a[1], b[0] * 4 + b[1]) for a, b in graph.edges
    }
    points = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    found = {tuple(e) for e in nearest_neighbor_edges(points, 2).tolist()}
    expected = set()
    for i in range(30):
        near = sorted(range(30), key=lambda j: float((points[i] - points[j]).norm()))[1:3]
        expected |= {(min(i, j), max(i, j)) for j in near}
    assert found == expected


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: forest_block(torch.tensor([3]), [[], []]), "order must hold nodes from 0 to 1"),
        (lambda: forest_block(torch.tensor([0.5]), [[]]), "order must be int64"),
        (lambda: lattice_edges(0), "side must be at least 1"),
        (lambda: nearest_neighbor_edges(torch.ones(3, 1), 3), "num_neighbors from 1 to n - 1"),
        (
            lambda: solve_forest(
                torch.ones(2), torch.tensor([[0, 2]]), torch.ones(1), torch.ones(2)
            ),
            "edges must hold nodes from 0 to 1",
        ),
        (
            lambda: solve_forest(
                torch.ones(2), torch.tensor([[0, 1]]), torch.ones(2), torch.ones(2)
            ),
            "weights must have shape",
        ),
        (
            lambda: solve_forest(
                torch.ones(2), torch.tensor([[0, 1]]), torch.ones(1), torch.ones(3)
            ),
            "rhs must have shape",
        ),
        (
            lambda: label_propagation(
                torch.tensor([[0, 1]]), -torch.ones(1), torch.ones(2), torch.tensor([True, False])
            ),
            "weights must be positive",
        ),
        (
            lambda: label_propagation(
                torch.tensor([[0, 1]]), torch.ones(1), torch.ones(2), torch.tensor([False, False])
            ),
            "labeled must hold a label",
        ),
        (
            lambda: label_propagation(
                torch.tensor([[0, 1]]), torch.ones(1), torch.ones(2), torch.ones(2)
            ),
            "labeled must be bool",
        ),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def _tree(g):
    """A random tree over any number of nodes: edges, weights, a diagonal, a right-hand side."""
    (n,) = sizes(g, 1, least=2)
    parents = torch.stack([torch.randint(i, (), generator=g) for i in range(1, n)])
    weights, rhs = torch.rand(n - 1, generator=g), torch.randn(n, generator=g)
    return torch.stack([parents, torch.arange(1, n)], 1), weights, torch.full((n,), 2.0 * n), rhs


def _neighbors(edges):
    lists = [[] for _ in range(len(edges) + 1)]
    for i, j in edges.tolist():
        lists[i].append(j)
        lists[j].append(i)
    return lists


CASES = {
    "forest_block": Case(
        _tree, lambda e, w, d, r: forest_block(torch.arange(len(e) + 1), _neighbors(e))
    ),
    "forest_partition": Case(
        _tree, lambda e, w, d, r: forest_partition(torch.arange(len(e) + 1), _neighbors(e))
    ),
    "label_propagation": Case(
        _tree, lambda e, w, d, r: label_propagation(e, w, r, torch.arange(len(r)).to(e.device) == 0)
    ),
    "lattice_edges": Case(lambda g: tuple(sizes(g, 1)), lattice_edges),
    "nearest_neighbor_edges": Case(
        lambda g: (torch.randn(*sizes(g, 2, least=2), generator=g),),
        lambda x: nearest_neighbor_edges(x, 1),
    ),
    "restrict_to_block": Case(
        _tree, lambda e, w, d, r: restrict_to_block(e[:1, 1], e, len(e) + 1)[:2]
    ),
    "solve_forest": Case(_tree, lambda e, w, d, r: solve_forest(d, e, w, r)),
}


def test_a_singular_forest_is_refused():
    with pytest.raises(ValueError, match="positive definite"):
        solve_forest(torch.zeros(2), torch.tensor([[0, 1]]), torch.zeros(1), torch.ones(2) * 0)
