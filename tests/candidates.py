"""Candidates for the tests of strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import strategies as st

from layerfed.server.candidates import Candidates


def candidates(
    budgets: Sequence[float],
    costs: Sequence[float] | Sequence[Sequence[float]],
    statistics: Mapping[str, Sequence[Sequence[float]]] | None = None,
    *,
    clients: Sequence[int] | None = None,
    server_round: int = 1,
    seed: int = 0,
    depth: Sequence[float] | Sequence[Sequence[float]] = (0.0,),
) -> Candidates:
    return Candidates(
        round=server_round,
        clients=list(range(len(budgets))) if clients is None else clients,
        budgets=np.asarray(budgets, dtype=np.float64),
        costs=np.asarray(costs, dtype=np.float64),
        statistics={n: np.asarray(rows, np.float64) for n, rows in (statistics or {}).items()},
        seed=seed,
        depth_costs=np.asarray(depth, dtype=np.float64),
    )


@st.composite
def any_candidates(draw: st.DrawFn) -> Candidates:
    """Draw any budgets and costs, with zero budgets and decimal fractions.

    Costs are one for each layer; or they differ by layer; or they differ by layer and client, with depth
    costs.
    """
    n, layers = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    tenths = st.integers(1, 40).map(lambda x: x / 10)
    kind = draw(st.sampled_from(["unit", "shared", "measured"]))
    rows = n if kind == "measured" else 1
    cost = st.just(1.0) if kind == "unit" else tenths
    row = st.lists(cost, min_size=layers, max_size=layers)
    costs = np.array(draw(st.lists(row, min_size=rows, max_size=rows)))
    depth = np.zeros_like(costs)
    if kind == "measured":
        depth = np.array(draw(st.lists(row, min_size=rows, max_size=rows)))[:, ::-1].cumsum(axis=1)
        depth = depth[:, ::-1]
    budget = st.one_of(st.integers(0, 8).map(float), st.integers(0, 150).map(lambda x: x / 10))
    score = st.floats(0, 1e6, width=32)
    table = st.lists(st.lists(score, min_size=layers, max_size=layers), min_size=n, max_size=n)
    return candidates(
        draw(st.lists(budget, min_size=n, max_size=n)),
        costs.tolist(),
        {name: draw(table) for name in ("grad_norm_sq", "param_norm_sq", "snr")},
        server_round=draw(st.integers(1, 100)),
        seed=draw(st.integers(0, 1000)),
        depth=depth.tolist(),
    )


def spent(case: Candidates, masks: np.ndarray) -> np.ndarray:
    """Return each client's costs, added layer by layer, with the depth cost of its lowest layer."""
    totals = []
    for row, costs, depth in zip(masks, case.costs, case.depth_costs, strict=True):
        chosen = np.flatnonzero(row)
        totals.append(sum(costs[chosen]) + (depth[chosen[0]] if len(chosen) else 0.0))
    return np.array(totals)


def within_budgets(case: Candidates, masks: np.ndarray) -> bool:
    return bool((spent(case, masks) <= case.budgets * (1 + 1e-9) + 1e-12).all())
