"""Problem (P1), the selection of each client's layers in a round, as plain immutable data.

Sources are cited as [S]: Sun et al., *Exploring Selective Layer Fine-Tuning in Federated
Learning*, arXiv 2408.15600.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

#: Relative slack in the budget test. Sums of costs have rounding errors, and a budget of 0.3 must
#: afford layers that cost 0.1 and 0.2.
BUDGET_TOLERANCE = 1e-9

#: Bound and objective are equal if they differ by less than this share of the instance's magnitude:
#: they are float64 sums of the same terms in different orders.
ROUNDING = 1e-13

#: A relative gap up to this counts as a proof of optimality; integer programs have such tolerances.
PROVEN = 1e-8

#: A wanted gap up to this asks for a proof. With a proof the masks do not depend on the solver.
PROOF_ASKED = 1e-6


def proof_gap(gap: float) -> float:
    """Return the relative gap at which a solver may stop if `gap` is wanted."""
    return gap if gap > PROOF_ASKED else PROVEN


class SelectionError(RuntimeError):
    """A solver gave no usable answer; the message names it and the reason."""


@dataclass(frozen=True, eq=False)
class SelectionProblem:
    """One round's layer selection, problem (P1) of [S].

    ::

        maximise    Σ_{i,l} v_il m_il − λ Σ_{i<j} ‖m_i − m_j‖₁   over m in {0, 1}^(n × L)
        such that   Σ_l c_il m_il + D_{i, low(m_i)} ≤ R_i        for every client i

    With k_l = Σ_i m_il, the pairwise penalty equals λ Σ_l k_l (n − k_l). It depends on the number of
    clients that pick a layer, and not on which clients these are.

    Parameters
    ----------
    values : array of shape (n, L)
        Gain of training layer ``l`` on client ``i``: the squared norm of its probe gradient.
    costs : array of shape (L,) or (n, L)
        Cost of each layer, non-negative, in the unit of `budgets` (layers, parameters, bytes,
        FLOPs, seconds, ...).
    budgets : array of shape (n,)
        The most that each client can spend, non-negative.
    consistency : float
        λ in the unit of `values`. A positive λ makes clients' masks more equal. With 0 each client
        gets its own best layers. A negative λ rewards masks that differ.
    depth_costs : array of shape (L,) or (n, L), optional
        ``D``, non-negative and non-increasing in ``l``: the extra cost of a client whose lowest
        selected layer is ``l``, for backpropagation down to it. A client that selects nothing pays
        nothing. None means additive costs only.

    Raises
    ------
    ValueError
        If a shape does not fit, an entry is NaN or infinite, a cost or budget is negative, or
        `depth_costs` increases with ``l``.

    Notes
    -----
    Edge cases follow fixed rules:

    - NaN and infinite values are refused. Drop such a client from the round instead: its probe
      overflowed, and its gains cannot be compared.
    - Negative values are legal and mean a loss. Such a layer is picked only if the consistency term
      pays for it.
    - Ties go to the selection with the fewest picks. So a layer of zero gain, which costs compute and
      cannot move the model, is not picked, and part of the budget stays unspent.
      :mod:`layerfed.selection.ties` has the other rules.
    - ``n = 0`` is legal: the masks are empty, and objective and bound are 0.
    - A client that cannot afford its cheapest layer selects nothing. It still counts in the penalty,
      as in [S].
    - ``n = 1`` has no pairs, so λ has no effect. ``L = 1`` is an ordinary instance.
    """

    values: FloatArray
    costs: FloatArray
    budgets: FloatArray
    consistency: float
    depth_costs: FloatArray | None = None

    def __post_init__(self) -> None:
        """Check the arrays, and convert them to read-only float64."""
        costs = _finite("costs", self.costs)
        values = _finite("values", self.values)
        if values.ndim == 1 and values.size == 0:  # JSON writes an empty client set as []
            values = values.reshape(0, costs.shape[-1] if costs.ndim else 0)
        if values.ndim != 2 or values.shape[1] == 0:
            raise ValueError(
                f"values has shape {values.shape}; expected (clients, layers) with at least one "
                "layer: give one row per client and one column per selectable layer"
            )
        n, layers = values.shape
        budgets = _finite("budgets", self.budgets)
        if budgets.shape != (n,):
            raise ValueError(
                f"budgets has shape {budgets.shape}; expected ({n},): give one budget per row "
                "of values"
            )
        _check_matrix("costs", costs, n, layers)
        _check_non_negative("costs", costs)
        _check_non_negative("budgets", budgets)
        if not np.isfinite(self.consistency):
            raise ValueError(
                f"consistency is {self.consistency}; expected a finite number: for identical "
                "choices give any λ above the sum of the gains"
            )
        with np.errstate(over="ignore"):
            most = float(np.abs(values).sum()) + abs(float(self.consistency)) * n * n * layers
        if not np.isfinite(most):
            raise ValueError(
                "values and consistency are so large that the objective is no finite number; divide "
                "both by the same number"
            )
        depth = None
        if self.depth_costs is not None:
            depth = _finite("depth_costs", self.depth_costs)
            _check_matrix("depth_costs", depth, n, layers)
            _check_non_negative("depth_costs", depth)
            if np.any(np.diff(depth, axis=-1) > 0):
                raise ValueError(
                    "depth_costs increases with the layer index; expected non-increasing: "
                    "backward to a lower layer passes all layers above it, so order them from "
                    "the input to the output"
                )
        for name, array in (("values", values), ("costs", costs), ("budgets", budgets)):
            object.__setattr__(self, name, _frozen(array))
        object.__setattr__(self, "consistency", float(self.consistency))
        object.__setattr__(self, "depth_costs", None if depth is None else _frozen(depth))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SelectionProblem:
        """Build a problem from the parsed JSON of an instance file, a mapping with these fields.

        Raises ValueError if a key is missing or unknown, or an entry is not a legal number.
        """
        required = {"values", "costs", "budgets", "consistency"}
        if not isinstance(data, Mapping):
            raise ValueError(f"the instance is a {type(data).__name__}; expected a JSON object")
        missing = sorted(required - data.keys())
        unknown = sorted(data.keys() - required - {"depth_costs"})
        if missing or unknown:
            raise ValueError(
                f"the instance lacks {missing} and has unknown keys {unknown}; expected "
                f"{sorted(required)} and optionally 'depth_costs'"
            )
        consistency = data["consistency"]
        if isinstance(consistency, bool) or not isinstance(consistency, int | float):
            raise ValueError(f"consistency is {consistency!r}; expected a number")
        try:
            return cls(**{**data, "consistency": float(consistency)})
        except OverflowError:
            raise ValueError("the instance has a number beyond what a float holds") from None

    @property
    def clients(self) -> int:
        """Number of clients, n."""
        return int(self.values.shape[0])

    @property
    def layers(self) -> int:
        """Number of selectable layers, L."""
        return int(self.values.shape[1])

    @cached_property
    def cost_matrix(self) -> FloatArray:
        """Costs as an (n, L) array."""
        return np.broadcast_to(self.costs, self.values.shape)

    @cached_property
    def depth_matrix(self) -> FloatArray:
        """Depth costs as an (n, L) array; zeros if the problem has none."""
        depth = np.zeros(self.layers) if self.depth_costs is None else self.depth_costs
        return np.broadcast_to(depth, self.values.shape)

    @cached_property
    def limits(self) -> FloatArray:
        """Budgets of shape (n,), with the rounding slack of the budget test."""
        return self.budgets * (1.0 + BUDGET_TOLERANCE)

    @cached_property
    def affordable(self) -> BoolArray:
        """Booleans of shape (n, L): the layers that a client can afford as its only one."""
        return self.cost_matrix + self.depth_matrix <= self.limits[:, None]

    @cached_property
    def penalties(self) -> FloatArray:
        """Consistency term of one layer for counts 0..n, shape (n+1,): -λ k (n - k)."""
        counts = np.arange(self.clients + 1, dtype=np.float64)
        return -self.consistency * counts * (self.clients - counts)

    @cached_property
    def magnitude(self) -> float:
        """Scale of the numbers in good objectives; rounding errors are relative to it.

        With λ >= 0 an optimum's penalty is at most its gain, since selecting nothing scores 0.
        """
        reward = max(float(self.penalties.max()), 0.0) * self.layers
        return float(np.abs(self.values).sum()) + reward

    def saturated(self) -> SelectionProblem:
        """Return this problem with a large λ lowered to one that already forces identical masks.

        Any dissent on a layer costs at least λ (n - 1). If that exceeds every possible gain, no optimum
        has a dissent, and a larger λ only adds rounding errors to the values. The optimal masks and
        their objective stay the same, and bounds stay valid.
        """
        enough = (2.0 * float(np.abs(self.values).sum()) + 1e-300) / max(self.clients - 1, 1)
        return self if self.consistency <= enough else replace(self, consistency=enough)

    def objective(self, masks: ArrayLike) -> float:
        """Return (P1)'s objective, in the unit of `values`; budgets are not checked."""
        chosen = self._as_masks(masks)
        gain = float(self.values[chosen].sum())
        return gain + float(self.penalties[chosen.sum(axis=0)].sum())

    def spent(self, masks: ArrayLike, rows: NDArray[np.intp] | None = None) -> FloatArray:
        """Return the cost of each mask, shape (n,), in the unit of `budgets`; of some `rows` only."""
        rows = np.arange(self.clients) if rows is None else rows
        chosen = self._as_masks(masks, len(rows))
        additive = np.where(chosen, self.cost_matrix[rows], 0.0).sum(axis=1)
        depth = self.depth_matrix[rows, chosen.argmax(axis=1)]
        return np.asarray(additive + np.where(chosen.any(axis=1), depth, 0.0))

    def feasible(self, masks: ArrayLike) -> bool:
        """Return whether every client stays within its budget (up to `BUDGET_TOLERANCE`)."""
        return bool(np.all(self.spent(masks) <= self.limits))

    def relative_gap(self, objective: float, bound: float) -> float:
        """Return the difference of `bound` and `objective`, relative to the larger; never negative.

        A difference within the rounding error of the sums counts as 0. Without a bound the gap is
        infinite.
        """
        if np.isinf(bound):
            return np.inf
        difference = bound - objective
        if difference <= ROUNDING * self.magnitude:
            return 0.0
        return float(difference / max(abs(bound), abs(objective)))

    def _as_masks(self, masks: ArrayLike, rows: int | None = None) -> BoolArray:
        chosen = np.asarray(masks, dtype=bool)
        shape = (self.clients if rows is None else rows, self.layers)
        if chosen.shape != shape:
            raise ValueError(f"masks has shape {chosen.shape}; expected {shape}")
        return chosen


@dataclass(frozen=True, eq=False)
class Selection:
    """The masks of one round, with a certificate of how good they are.

    Attributes
    ----------
    masks : array of bool, shape (n, L)
        True if the client trains the layer.
    objective : float
        (P1)'s objective at `masks`.
    bound : float
        Upper bound on the objective of all feasible masks.
    gap : float
        ``(bound - objective) / max(|bound|, |objective|)``; 0 proves the masks optimal.
    solver : str
        The solver or solvers behind the result, e.g. ``"lagrangian"`` or ``"lagrangian+milp-highs"``.
    seconds : float
        Wall-clock time.
    """

    masks: BoolArray
    objective: float
    bound: float
    gap: float
    solver: str
    seconds: float

    @classmethod
    def certified(
        cls, problem: SelectionProblem, masks: BoolArray, bound: float, solver: str, seconds: float
    ) -> Selection:
        """Return feasible `masks` with their objective and the gap to `bound`."""
        objective = problem.objective(masks)
        # A bound below a feasible objective is a rounding error.
        bound = float(max(bound, objective))
        gap = problem.relative_gap(objective, bound)
        return cls(_frozen(masks), objective, bound, gap, solver, seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the result as data for JSON, with masks as rows of 0 and 1."""
        return {**vars(self), "masks": self.masks.astype(int).tolist()}


def _finite(name: str, data: ArrayLike) -> FloatArray:
    try:
        array = np.array(data, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not a rectangular array of numbers: {error}") from error
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = tuple(int(index) for index in bad[0])
        raise ValueError(
            f"{name}{list(place)} is {array[place]}; expected finite numbers: drop clients whose "
            "probe gave NaN or infinity before selecting"
        )
    return array


def _check_matrix(name: str, array: FloatArray, n: int, layers: int) -> None:
    if array.shape not in ((layers,), (n, layers)):
        raise ValueError(
            f"{name} has shape {array.shape}; expected ({layers},) for all clients alike or "
            f"({n}, {layers}) for each client its own"
        )


def _check_non_negative(name: str, array: FloatArray) -> None:
    bad = np.argwhere(array < 0)
    if len(bad):
        place = tuple(int(index) for index in bad[0])
        raise ValueError(f"{name}{list(place)} is {array[place]}; expected 0 or more")


def _frozen(array: Any) -> Any:
    array.setflags(write=False)
    return array
