"""Equally good selections: which of them is kept.

Of two selections whose objectives are equal up to rounding, the preferred one has

1. fewer picks: a layer that gains nothing is not worth a client's compute; then
2. the first pick at the first place where they differ, reading clients in their order and each
   client's layers from the output to the input: of equal layers the one nearer the output needs
   the shorter backward pass.

An optimum is moved to a preferred one as long as a single client's change, or one of whole layers
(all drop a layer, or two layers change places), leads there. This settles what ties are made of:
layers without gain, equal layers, clients with equal gains. Ties that only several unlike changes
at once would resolve stay as they were found. The same instance gives the same masks either way.
"""

from __future__ import annotations

import numpy as np

from layerfed.selection.knapsack import ClientOracle
from layerfed.selection.problem import BoolArray, FloatArray, SelectionProblem

#: Changes this small, relative to the numbers they are made of, are rounding errors.
EQUAL = 1e-12

#: What preferred layers get on top while looking for them, relative to a client's numbers.
FAVOUR = 1e-9

#: Passes over clients and layers; two or three settle what can be settled.
PASSES = 20


def break_ties(problem: SelectionProblem, masks: BoolArray, oracle: ClientOracle) -> BoolArray:
    """Return a selection as good as the optimal `masks` (n, L), moved as far as single changes go."""
    problem = problem.saturated()
    for _ in range(PASSES):
        moved = _move_layers(problem, _move_clients(problem, masks, oracle))
        if np.array_equal(moved, masks):
            break
        masks = moved
    return masks


def _move_clients(problem: SelectionProblem, masks: BoolArray, oracle: ClientOracle) -> BoolArray:
    """Let clients that have an equally good, preferred answer take it, one after the other."""
    masks, layers = masks.copy(), problem.layers
    size = np.abs(problem.values).max(axis=1) + abs(problem.consistency) * problem.clients
    # Each pick costs more than all that being nearer the output can gain.
    favour = FAVOUR * (np.arange(1, layers + 1) / layers**2 - 2.0)

    def answer(clients: slice) -> tuple[FloatArray, BoolArray]:
        others = masks.sum(axis=0) - masks[clients]
        marginal = problem.consistency * (2.0 * others + 1.0 - problem.clients)
        scores = problem.values[clients] + marginal
        return scores, oracle.best(scores + size[clients, None] * favour, clients)

    scores, rows = answer(slice(None))
    for client in np.flatnonzero((rows != masks).any(axis=1)):
        if problem.consistency:  # others may have moved
            alone = slice(client, client + 1)
            scores[alone], rows[alone] = answer(alone)
        new, old = rows[client], masks[client]
        loss = scores[client, old].sum() - scores[client, new].sum()
        if loss <= EQUAL * size[client] * layers and _key(new) < _key(old):
            masks[client] = new
    return masks


def _move_layers(problem: SelectionProblem, masks: BoolArray) -> BoolArray:
    """Drop layers for everyone, and let layers change places, where that costs nothing."""
    if problem.consistency == 0.0:
        return masks  # every change is a single client's, and each has a scale of its own
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
    """What the clients that pick layer a would gain on layer b, shape (L, L)."""
    return np.asarray(masks.T.astype(np.float64) @ problem.values)


def _key(masks: BoolArray) -> tuple[int, bytes]:
    """Sort key of masks (n, L) or of one row (L,): smaller is preferred."""
    return int(masks.sum()), (~masks[..., ::-1]).tobytes()
