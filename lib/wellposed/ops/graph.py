r"""Systems and quadratics whose matrix has the shape of a graph; forests are solved in linear time.

A symmetric matrix is given by its diagonal and, for each pair of nodes once, an edge and the entry
off the diagonal. If the edges have no cycle, Gaussian elimination from the leaves fills nothing in:
this is message passing, exact after one pass up and one pass down.

Source: Nutini, Laradji and Schmidt, JMLR 2022, section on message passing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "ForestPlan",
    "GraphQuadratic",
    "forest_block",
    "forest_partition",
    "label_propagation",
    "lattice_edges",
    "nearest_neighbor_edges",
    "restrict_to_block",
    "solve_forest",
]

Adjacency = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ForestPlan:
    """In which order the nodes of a forest are eliminated; made once, used for many systems."""

    leaf: Tensor  # (m,), every node but the roots, the outermost first
    parent: Tensor  # (m,), where it sends its message
    edge: Tensor  # (m,), along which edge
    sizes: list[int]  # leaves of each round: they go side by side

    @classmethod
    def of(cls, n: int, edges: Tensor) -> ForestPlan:
        """Peel off the leaves round by round; ValueError where there is a cycle."""
        pairs = edges.cpu().numpy()  # many tiny steps, which the host does faster
        ends, both = pairs.ravel(), pairs.sum(1)
        degree = np.bincount(ends, minlength=n)
        # Of a leaf, the sum of its remaining edges is its only edge.
        last = np.zeros(n, dtype=np.int64)
        np.add.at(last, ends, np.arange(len(pairs)).repeat(2))
        rounds: list[NDArray[np.int64]] = []
        leaf = np.flatnonzero(degree == 1)
        while leaf.size:
            edge = last[leaf]
            parent = both[edge] - leaf
            first = (degree[parent] > 1) | (leaf < parent)  # of a last pair, one is the root
            step = np.stack([leaf, parent, edge])[:, first]
            rounds.append(step)
            np.subtract.at(degree, step[1], 1)
            np.subtract.at(last, step[1], step[2])
            leaf = np.unique(step[1][degree[step[1]] == 1])
        if sum(step.shape[1] for step in rounds) < len(pairs):
            raise ValueError("edges must form a forest, found a cycle")
        steps = np.concatenate([np.zeros((3, 0), dtype=np.int64), *rounds], axis=1)
        leaves, parents, order = torch.from_numpy(steps).to(edges.device)
        return cls(leaves, parents, order, [step.shape[1] for step in rounds])

    def solve(self, diagonal: Tensor, weights: Tensor, rhs: Tensor) -> Tensor:
        """Solve for one matrix and right-hand side; see :func:`solve_forest`."""
        d, r = diagonal.clone(), rhs.clone()
        leaves, parents = self.leaf.split(self.sizes), self.parent.split(self.sizes)
        ratios = []
        for leaf, parent, w in zip(leaves, parents, weights[self.edge].split(self.sizes)):
            ratio = w / d[leaf]
            d.index_add_(0, parent, ratio * w, alpha=-1)
            r.index_add_(0, parent, ratio * r[leaf], alpha=-1)
            ratios.append(ratio)
        x = r / d
        for leaf, parent, ratio in zip(reversed(leaves), reversed(parents), reversed(ratios)):
            x.index_add_(0, leaf, ratio * x[parent], alpha=-1)
        return x


def restrict_to_block(block: Tensor, edges: Tensor, n: int) -> tuple[Tensor, Tensor, ForestPlan]:
    """Which nodes are in a block, `(n,)`, which edges are inside it, and how to eliminate them."""
    inside = torch.zeros(n, dtype=torch.bool, device=edges.device).index_fill_(0, block, True)
    kept = inside[edges].all(1).nonzero()[:, 0]
    return inside, kept, ForestPlan.of(n, edges[kept])


def _scan(order: list[int], adjacency: Adjacency, independent: bool) -> list[int]:
    """Accept nodes in turn unless they close a cycle (or, if `independent`, touch another)."""
    parent = [-1] * len(adjacency)  # of accepted nodes, in the forest of union-find
    taken = []
    for node in order:
        if parent[node] >= 0:
            continue
        roots: list[int] = []
        for root in adjacency[node]:
            if parent[root] < 0:
                continue
            while parent[root] != root:
                parent[root] = parent[parent[root]]
                root = parent[root]
            if independent or root in roots:
                break
            roots.append(root)
        else:
            parent[node] = node
            for root in roots:
                parent[root] = node
            taken.append(node)
    return taken


def forest_block(order: Tensor, adjacency: Adjacency) -> Tensor:
    r"""Choose greedily a block whose graph has no cycle.

    A node is accepted unless two of its already accepted neighbors are in the same tree
    (union-find). The cost is almost linear in nodes and edges.

    Args:
        order: int64 nodes, the most wanted first, e.g. by $|g_i|/\sqrt{L_i}$; may leave some out.
        adjacency: the neighbors of every node.

    Returns:
        int64 accepted nodes, sorted.

    Raises:
        ValueError: `order` is not one row of node numbers.

    Source: Nutini et al. 2022, section on message passing, greedy trees.

    Example:
        >>> forest_block(torch.tensor([2, 1, 0]), [[1, 2], [0, 2], [0, 1]]).tolist()   # a triangle
        [1, 2]
    """
    taken = _scan(_check_order(order, adjacency), adjacency, independent=False)
    return torch.tensor(sorted(taken), dtype=torch.int64, device=order.device)


def forest_partition(
    order: Tensor, adjacency: Adjacency, *, independent: bool = False
) -> list[Tensor]:
    r"""Cut a graph into forests, or into sets without edges (a coloring), first-fit.

    Args:
        order: int64 nodes, `(n,)`.
        adjacency: the neighbors of every node.
        independent: True for red-black blocks, whose systems are diagonal.

    Returns:
        Sorted int64 blocks that hold every node of `order` once.

    Raises:
        ValueError: `order` is not one row of node numbers.

    Source: Nutini et al. 2022, section on message passing, tree partitions and red-black blocks.

    Example:
        >>> triangle = [[1, 2], [0, 2], [0, 1]]
        >>> [b.tolist() for b in forest_partition(torch.arange(3), triangle)]
        [[0, 1], [2]]
    """
    left, blocks = _check_order(order, adjacency), []
    while left:
        taken = _scan(left, adjacency, independent)
        inside = set(taken)
        left = [node for node in left if node not in inside]
        blocks.append(torch.tensor(sorted(taken), dtype=torch.int64, device=order.device))
    return blocks


def solve_forest(diagonal: Tensor, edges: Tensor, weights: Tensor, rhs: Tensor) -> Tensor:
    r"""Solve a system whose graph is a forest, in linear time.

    Leaves send messages to their parents, $d_p\leftarrow d_p-w^2/d_i$ and
    $r_p\leftarrow r_p-wr_i/d_i$, round by round. Then values flow back from the roots,
    $x_i=(r_i-wx_p)/d_i$. All leaves of a round go side by side.

    Args:
        diagonal: $d$, `(n,)`, of a positive definite matrix.
        edges: int64 `(m, 2)`, each pair once, without cycles.
        weights: $w$, `(m,)`, the entries of the matrix off its diagonal.
        rhs: $r$, `(n,)`.

    Returns:
        $x$, `(n,)`. Differentiable.

    Raises:
        ValueError: shapes that do not fit, nodes out of range, edges with a cycle, a singular
            matrix.

    Source: Nutini et al. 2022, section on message passing (Gaussian elimination without fill-in).

    Example:
        >>> d, r = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([3.0, 4.0, 3.0])
        >>> solve_forest(d, torch.tensor([[0, 1], [1, 2]]), torch.ones(2), r)   # a path
        tensor([1., 1., 1.])
    """
    n = check_graph(diagonal, edges, weights, rhs)
    x = ForestPlan.of(n, edges).solve(diagonal, weights, rhs)
    if bool(x.isnan().any()):  # 0 / 0, once elimination has left nothing of a diagonal entry
        raise ValueError("diagonal and weights must form a positive definite matrix")
    return x


def lattice_edges(side: int) -> Tensor:
    """Edges between the neighbors in a square lattice.

    Args:
        side: nodes along one side, at least 1; node `i` stands in row `i // side`.

    Returns:
        int64 `(2 side (side - 1), 2)`.

    Raises:
        ValueError: `side` is below 1.

    Example:
        >>> lattice_edges(2).tolist()
        [[0, 1], [2, 3], [0, 2], [1, 3]]
    """
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    node = torch.arange(side * side).reshape(side, side)
    across = torch.stack([node[:, :-1].flatten(), node[:, 1:].flatten()], 1)
    down = torch.stack([node[:-1].flatten(), node[1:].flatten()], 1)
    return torch.cat([across, down])


def nearest_neighbor_edges(points: Tensor, num_neighbors: int) -> Tensor:
    """Connect every point with its nearest neighbors; an edge counts once, whoever asked for it.

    Args:
        points: `(n, d)`.
        num_neighbors: from 1 to n - 1.

    Returns:
        int64 `(m, 2)`, sorted, the smaller node first.

    Raises:
        ValueError: `points` is not a matrix, `num_neighbors` out of range.

    Example:
        >>> nearest_neighbor_edges(torch.tensor([[0.0], [1.0], [3.0]]), 1).tolist()
        [[0, 1], [1, 2]]
    """
    if points.ndim != 2 or not 1 <= num_neighbors < len(points):
        raise ValueError(
            f"points must be (n, d) and num_neighbors from 1 to n - 1, got {tuple(points.shape)} "
            f"and {num_neighbors}"
        )
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    near = distance.topk(num_neighbors, largest=False).indices
    here = torch.arange(len(points), device=points.device).repeat_interleave(num_neighbors)
    first, second = torch.minimum(here, near.flatten()), torch.maximum(here, near.flatten())
    pair = (first * len(points) + second).unique()  # much faster than the unique rows of a matrix
    return torch.stack([pair // len(points), pair % len(points)], 1)


@dataclass(frozen=True)
class GraphQuadratic:
    r"""$\frac12x^\top Hx-r^\top x$ with a sparse $H$ in the shape of a graph."""

    diagonal: Tensor  # (n,)
    edges: Tensor  # (m, 2), int64, each pair once
    weights: Tensor  # (m,), entries of H off its diagonal
    rhs: Tensor  # (n,)
    nodes: Tensor  # (n,), int64, which nodes of a larger graph the variables are

    def product(self, x: Tensor) -> Tensor:
        """$Hx$, `(n,)`."""
        one, two = self.edges.T
        parts = torch.cat([self.weights * x[two], self.weights * x[one]])
        return (self.diagonal * x).index_add(0, torch.cat([one, two]), parts)

    def value(self, x: Tensor) -> Tensor:
        """The quadratic, 0-d."""
        one, two = self.edges.T
        cross = (self.weights * x[one] * x[two]).sum()
        return (self.diagonal * x.square()).sum() / 2 + cross - self.rhs @ x

    def dense(self) -> Tensor:
        """$H$ as a matrix, `(n, n)`."""
        one, two = self.edges.T
        matrix = torch.diag(self.diagonal)
        matrix[one, two] = matrix[two, one] = self.weights
        return matrix

    def adjacency(self) -> list[list[int]]:
        """The neighbors of every node, as :func:`forest_block` wants them."""
        lists: list[list[int]] = [[] for _ in range(len(self.diagonal))]
        for i, j in self.edges.tolist():
            lists[i].append(j)
            lists[j].append(i)
        return lists


def label_propagation(
    edges: Tensor, weights: Tensor, labels: Tensor, labeled: Tensor
) -> GraphQuadratic:
    r"""Data sets D and E: spread labels over a graph.

    Minimize $\frac12\sum_{(i,j)}w_{ij}(y_i-y_j)^2$ over the nodes without a label. Nodes that no
    label can reach are left out, which keeps $H$ positive definite.

    Args:
        edges: int64 `(m, 2)`, each pair once.
        weights: $w$, `(m,)`, positive.
        labels: $y$, `(n,)`, read where `labeled`.
        labeled: bool, `(n,)`.

    Returns:
        A :class:`GraphQuadratic` over the remaining nodes.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, no label, or no node
            left to label.

    Source: Nutini et al. 2022, section on experiments, quadratic labeling criterion.

    Example:
        >>> path, y = torch.tensor([[0, 1], [1, 2]]), torch.tensor([-1.0, 0.0, 3.0])
        >>> problem = label_propagation(path, torch.ones(2), y, torch.tensor([True, False, True]))
        >>> (problem.rhs / problem.diagonal).tolist()    # the mean of both neighbors
        [1.0]
    """
    n = check_graph(labels, edges, weights, labels)
    if labeled.shape != labels.shape or labeled.dtype != torch.bool:
        raise ValueError(f"labeled must be bool of shape ({n},), got {tuple(labeled.shape)}")
    if not (weights > 0).all():
        raise ValueError("weights must be positive")
    reached, before = labeled, -1
    while (count := int(reached.sum())) > before:
        near = edges[reached[edges].any(1)].flatten()
        reached, before = reached.index_fill(0, near, True), count
    free = reached & ~labeled
    if not free.any():
        raise ValueError("labeled must hold a label and leave a node that it reaches")
    ends, both = edges.flatten(), weights.repeat_interleave(2)
    degree = torch.zeros_like(labels).index_add_(0, ends, both)
    pull = torch.where(labeled, labels, 0.0)[edges.flip(1).flatten()] * both
    rhs = torch.zeros_like(labels).index_add_(0, ends, pull)
    kept = free[edges].all(1)
    place = free.cumsum(0) - 1
    return GraphQuadratic(
        degree[free], place[edges[kept]], -weights[kept], rhs[free], free.nonzero()[:, 0]
    )


def _check_order(order: Tensor, adjacency: Adjacency) -> list[int]:
    if order.ndim != 1 or order.dtype != torch.int64:
        raise ValueError(f"order must be int64 of shape (n,), got {tuple(order.shape)}")
    nodes: list[int] = order.tolist()
    if nodes and not 0 <= min(nodes) <= max(nodes) < len(adjacency):
        raise ValueError(f"order must hold nodes from 0 to {len(adjacency) - 1}")
    return nodes


def check_graph(diagonal: Tensor, edges: Tensor, weights: Tensor, rhs: Tensor) -> int:
    """Return the number of nodes, or raise a ValueError that names what does not fit."""
    if diagonal.ndim != 1 or not len(diagonal) or not diagonal.is_floating_point():
        shape = tuple(diagonal.shape)
        raise ValueError(f"diagonal must be floating and of shape (n,), got {shape}")
    n = len(diagonal)
    if rhs.shape != diagonal.shape:
        raise ValueError(f"rhs must have shape ({n},), got {tuple(rhs.shape)}")
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype != torch.int64:
        raise ValueError(f"edges must be int64 of shape (m, 2), got {tuple(edges.shape)}")
    if weights.shape != edges.shape[:1]:
        raise ValueError(f"weights must have shape ({len(edges)},), got {tuple(weights.shape)}")
    if len(edges) and (int(edges.min()) < 0 or int(edges.max()) >= n):
        raise ValueError(f"edges must hold nodes from 0 to {n - 1}")
    return n
