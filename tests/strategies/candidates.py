"""Rounds to select from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import strategies as st

from layerfed.strategies import Candidates


def candidates(
    budgets: Sequence[float],
    costs: Sequence[float],
    statistics: Mapping[str, Sequence[Sequence[float]]] | None = None,
    *,
    clients: Sequence[int] | None = None,
    server_round: int = 1,
    seed: int = 0,
) -> Candidates:
    return Candidates(
        round=server_round,
        clients=list(range(len(budgets))) if clients is None else clients,
        budgets=np.asarray(budgets, dtype=np.float64),
        costs=np.asarray(costs, dtype=np.float64),
        statistics={n: np.asarray(rows, np.float64) for n, rows in (statistics or {}).items()},
        seed=seed,
    )


@st.composite
def any_candidates(draw: st.DrawFn) -> Candidates:
    """Any budgets, zero and decimal fractions included, over unit or any costs."""
    n, layers = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    tenths = st.integers(1, 40).map(lambda x: x / 10)
    cost = draw(st.sampled_from([st.just(1.0), tenths]))
    costs = draw(st.lists(cost, min_size=layers, max_size=layers))
    budget = st.one_of(st.integers(0, 8).map(float), st.integers(0, 150).map(lambda x: x / 10))
    score = st.floats(0, 1e6, width=32)
    table = st.lists(st.lists(score, min_size=layers, max_size=layers), min_size=n, max_size=n)
    return candidates(
        draw(st.lists(budget, min_size=n, max_size=n)),
        costs,
        {name: draw(table) for name in ("grad_norm_sq", "param_norm_sq", "snr")},
        server_round=draw(st.integers(1, 100)),
        seed=draw(st.integers(0, 1000)),
    )


def spent(masks: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """What each client spends, added layer by layer."""
    return np.array([sum(costs[layer] for layer in np.flatnonzero(row)) for row in masks])
