"""The choice between equally good selections.

Of two selections whose objectives are equal up to rounding, the preferred one has

1. fewer picks, since a layer that gains nothing is not worth a client's compute; then
2. the pick at the first place where the two differ. Clients are read in their order, and a client's
   layers from the output to the input: of equal layers, the one nearer the output needs the shorter
   backward pass.

For example, a client with two equal layers and room for one gets the one nearer the output.

An optimum is moved to a preferred one by single changes: of one client's mask, or of whole layers (all
clients drop a layer, or two layers swap). This resolves the usual ties: layers without gain, equal
layers, and clients with equal gains. Ties that need several different changes at once stay as they were
found. In either case the same instance gives the same masks.
"""

from __future__ import annotations

import numpy as np

from layerfed.selection.knapsack import ClientOracle
from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem

#: A change up to this share of the numbers in it is a rounding error.
EQUAL = 1e-12

#: Bonus of preferred layers during the search for them, relative to a client's numbers.
FAVOUR = 1e-9

#: Most passes over clients and layers; two or three are usually enough.
PASSES = 20


def break_ties(problem: SelectionProblem, masks: BoolArray, oracle: ClientOracle) -> BoolArray:
    """Return the preferred selection that single changes reach from the optimal `masks` (n, L)."""
    problem = problem.saturated()
    for _ in range(PASSES):
        moved = _move_layers(problem, _move_clients(problem, masks, oracle))
        if np.array_equal(moved, masks):
            break
        masks = moved
    return masks


def _move_clients(problem: SelectionProblem, masks: BoolArray, oracle: ClientOracle) -> BoolArray:
    """Give each client in turn its preferred one of equally good masks."""
    masks, layers = masks.copy(), problem.layers
    size = np.abs(problem.values).max(axis=1) + abs(problem.consistency) * problem.clients
    # A pick costs more than any move towards the output can gain.
    favour = FAVOUR * (np.arange(1, layers + 1) / layers**2 - 2.0)

    def answer(clients: slice) -> tuple[FloatArray, BoolArray]:
        others = masks.sum(axis=0) - masks[clients]
        marginal = problem.consistency * (2.0 * others + 1.0 - problem.clients)
        scores = problem.values[clients] + marginal
        return scores, oracle.best(scores + size[clients, None] * favour, clients)

    scores, rows = answer(slice(None))
    for client in np.flatnonzero((rows != masks).any(axis=1)):
        if problem.consistency:  # other clients may have moved
            alone = slice(client, client + 1)
            scores[alone], rows[alone] = answer(alone)
        new, old = rows[client], masks[client]
        loss = scores[client, old].sum() - scores[client, new].sum()
        if loss <= EQUAL * size[client] * layers and _key(new) < _key(old):
            masks[client] = new
    return masks


def _move_layers(problem: SelectionProblem, masks: BoolArray) -> BoolArray:
    """Drop a layer for all clients, and swap layers, if that costs nothing."""
    if problem.consistency == 0.0:
        return masks  # clients are independent then, and each has its own scale
    slack = EQUAL * problem.magnitude
    free = _worth(problem, masks).diagonal() + problem.penalties[masks.sum(axis=0)] <= slack
    masks = masks & ~free
    for _ in range(problem.layers):
        worth = _worth(problem, masks)
        own = worth.diagonal()
        same = worth + worth.T >= own[:, None] + own - slack
        pairs = np.argwhere(np.triu(same & masks.any(axis=0, keepdims=True).T, 1))
        for a, b in sorted(pairs.tolist(), key=lambda pair: -pair[1]):
            swapped = masks.copy()
            swapped[:, [a, b]] = masks[:, [b, a]]
            if _key(swapped) < _key(masks) and problem.feasible(swapped):
                masks = swapped
                break
        else:
            break
    return masks


def _worth(problem: SelectionProblem, masks: BoolArray) -> FloatArray:
    """Return the gain on layer b of the clients that pick layer a, shape (L, L)."""
    return np.asarray(masks.T.astype(np.float64) @ problem.values)


def _key(masks: BoolArray) -> tuple[int, bytes]:
    """Return the sort key of masks (n, L) or of one row (L,); the smallest is preferred."""
    return int(masks.sum()), (~masks[..., ::-1]).tobytes()
