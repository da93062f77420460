"""A node's own limits: a budget that the server cannot raise, and the slowest step it accepts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from flwr.app import MetricRecord, RecordDict

from layerfed.client.devices import synchronize
from layerfed.config import BudgetUnit, ConfigError, NodeConfig
from layerfed.task.base import Batch

__all__ = [
    "Allowance",
    "LayerCosts",
    "MaskRefused",
    "StepTooSlow",
    "free_memory",
    "paced",
    "translate",
]

# The server's tolerance for rounding, repeated here because clients do not import the solver
# (`selection.problem.BUDGET_TOLERANCE`).
TOLERANCE = 1e-9
# `budget=auto` uses half of the free memory. A measured step counts the memory that backward keeps and
# the gradients. The other half is for copies of the trained layers, the optimiser's state, the reply,
# and other programs on the device.
AUTO_SHARE = 0.5
# A translated budget may exceed the node's own by this share, so that a limit of exactly two layers is
# not lost to rounding. It stays below the first mask that exceeds more by a share larger than any
# solver's tolerance.
SLACK, MARGIN = 1e-6, 1e-8

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


class MaskRefused(ValueError):
    """Error for a mask above the node's budget, raised before any training."""


class StepTooSlow(RuntimeError):
    """Error for a training step that took longer than the node allows."""


@dataclass(frozen=True)
class LayerCosts:
    """The costs of training on this node, in one unit.

    Attributes
    ----------
    own : numpy.ndarray
        c_l, shape (L,).
    depth : numpy.ndarray
        D_l, the added cost if l is the lowest trained layer, shape (L,), non-increasing.
    """

    own: np.ndarray
    depth: np.ndarray

    def of(self, mask: Sequence[bool]) -> float:
        """Return the cost of a mask of length L, Σ_l c_l m(l) + D_low."""
        chosen = np.asarray(mask, dtype=bool)
        if not chosen.any():
            return 0.0
        return float(self.own[chosen].sum() + self.depth[chosen.argmax()])

    @property
    def total(self) -> float:
        """The cost of training all blocks."""
        return float(self.own.sum() + self.depth[0])


def translate(limit: float, given: LayerCosts, wanted: LayerCosts) -> float:
    """Return the budget in one unit that never exceeds a limit in another.

    Parameters
    ----------
    limit : float
        The most that training may cost, in the unit of `given`.
    given, wanted : LayerCosts
        The costs of the same L blocks in the two units.

    Returns
    -------
    float
        R such that every mask of at most R in the wanted unit costs at most `limit` in the given one
        (up to a millionth). R is below the cheapest layer if no layer fits.

    Notes
    -----
    For each lowest layer l the function bounds the cost of the cheapest mask that exceeds the limit. The
    layers above l form a covering knapsack, whose fractional relaxation is filled by price for what each
    layer adds. It bounds the knapsack from below, so R is safe. R is exact if the wanted unit is layers.
    """
    limit *= 1 + SLACK
    if given.total <= limit:
        return wanted.total
    cheapest = np.inf
    for low in range(len(given.own)):
        room = limit - given.own[low] - given.depth[low]
        price = wanted.own[low] + wanted.depth[low]
        sizes, prices = given.own[low + 1 :], wanted.own[low + 1 :]
        if room >= sizes.sum():
            continue  # no mask with this lowest layer exceeds the limit
        if room > 0:
            some = sizes > 0
            sizes, prices = sizes[some], prices[some]
            for item in np.argsort(prices / sizes):
                share = min(1.0, room / sizes[item])
                price += share * prices[item]
                room -= share * sizes[item]
                if room <= 0:
                    break
        cheapest = min(cheapest, price)
    return float(cheapest * (1 - MARGIN))


@dataclass(frozen=True)
class Allowance:
    """A node's budget in the unit of a run, with the costs behind it.

    Attributes
    ----------
    budget : float
        R_i.
    unit : str
    costs : LayerCosts
        Costs in the same unit.
    """

    budget: float
    unit: BudgetUnit
    costs: LayerCosts

    @classmethod
    def of(
        cls,
        node: NodeConfig,
        unit: BudgetUnit,
        costs: Callable[[BudgetUnit], LayerCosts],
        free: Callable[[], float],
        head: Callable[[], float],
    ) -> Allowance | None:
        """Return a node's allowance in a run, or None if the node states no budget.

        Parameters
        ----------
        node : NodeConfig
        unit : str
            The run's `budget.unit`.
        costs : Callable[[str], LayerCosts]
            Returns the blocks' costs on this node in a unit.
        free, head : Callable[[], float]
            Return the free bytes, and the bytes of a step that trains the head alone.

        Raises
        ------
        ConfigError
            If the node's number has no unit and the run's unit is not layers, or if a step on the head
            alone does not fit into the free memory.
        """
        if node.budget is None:
            return None
        of: BudgetUnit = node.budget_unit or "layers"
        if node.budget == "auto":
            available, needed = AUTO_SHARE * free(), head()
            if available < needed:
                raise ConfigError(
                    f"budget = 'auto': half of the free memory is {available / 1e6:.1f} MB, and "
                    f"training the head alone takes {needed / 1e6:.1f} MB; free some, lower "
                    "train.batch-size, or state a number"
                )
            limit, of = available - needed, "memory"
        else:
            limit = float(node.budget)
            if node.budget_unit is None and unit != "layers":
                raise ConfigError(
                    f"this node's budget = {limit:g} has no unit, and the run counts in {unit}; "
                    f"state budget-unit={unit} (or another unit) in --node-config"
                )
        wanted = costs(unit)
        if of != unit:
            limit = translate(limit, costs(of), wanted)
            limit = float(np.floor(limit)) if unit == "layers" else limit
        return cls(limit, unit, wanted)

    def check(self, mask: Sequence[bool], share: float = 1.0) -> None:
        """Refuse a mask above the budget.

        Parameters
        ----------
        mask : Sequence[bool]
        share : float (default: 1)
            The part of each block that is trained.

        Raises
        ------
        MaskRefused
            If the mask costs more. The message gives its cost and the budget.
        """
        cost = share * self.costs.of(mask)
        if cost > self.budget * (1 + TOLERANCE):
            raise MaskRefused(
                f"the server asks for {sum(map(bool, mask))} layers that cost {cost:g} {self.unit}; "
                f"this node's own budget is {self.budget:g}, and only its owner can raise it"
            )

    def remember(self, state: RecordDict) -> None:
        """Store the allowance for this node's later messages, which another process may serve."""
        state[f"allowance.{self.unit}"] = MetricRecord(
            {
                "budget": self.budget,
                "costs": self.costs.own.tolist(),
                "depth-costs": self.costs.depth.tolist(),
            }
        )

    @classmethod
    def recall(cls, state: RecordDict, unit: BudgetUnit) -> Allowance | None:
        """Return the allowance stored by an earlier message of the run, or None after a restart."""
        record = state.metric_records.get(f"allowance.{unit}")
        if record is None:
            return None
        costs = LayerCosts(np.array(record["costs"]), np.array(record["depth-costs"]))
        return cls(cast(float, record["budget"]), unit, costs)


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process can still allocate on a device.

    On a GPU these are the driver's free bytes and those that torch's allocator holds unused. Elsewhere
    they are the kernel's available bytes or the container's remaining bytes, whichever is less.

    Raises
    ------
    ConfigError
        If the system does not report its free memory.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        available = float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        raise ConfigError(
            "budget = 'auto' cannot be measured: this system does not say how much memory is free; "
            "state a number, with budget-unit=memory for bytes"
        ) from None
    return min(available, _left_in_container())


def _left_in_container() -> float:
    """Return the bytes that control groups still allow; reclaimable page cache counts as free."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = (CGROUP / limit).read_text().strip()
            taken = float((CGROUP / usage).read_text())
            counters = (CGROUP / limit).with_name("memory.stat").read_text().split()
        except OSError:
            continue
        if most == "max":
            break
        reclaimable = float(dict(zip(counters[::2], counters[1::2], strict=True))[cache])
        return max(0.0, float(most) - taken + reclaimable)
    return np.inf


def paced(
    batches: Iterable[Batch], most: float, device: torch.device, fresh: Collection[int] = ()
) -> Iterator[Batch]:
    """Yield batches, and stop if the work on one takes longer than `most` seconds.

    The first of several batches is not timed, since it warms the device up and counts FLOPs and memory.
    Nor is the first of each shape, and of each mask: `fresh` has the steps, from 1, that begin one.

    Raises
    ------
    StepTooSlow
        If a step took too long. The message gives the step and its duration.
    """
    step, seconds, new = 0, 0.0, True
    seen = set[object]()
    for batch in batches:
        if not new:
            _refuse_slow(step, seconds, most)
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())
        began = time.monotonic()
        yield batch
        synchronize(device)
        step, seconds = step + 1, time.monotonic() - began
        new = step in fresh or shapes not in seen
        seen.add(shapes)
    if step == 1 or not new:
        _refuse_slow(step, seconds, most)


def _refuse_slow(step: int, seconds: float, most: float) -> None:
    if seconds > most:
        raise StepTooSlow(
            f"training step {step} took {seconds:.3g} s, this node's max-step-seconds is {most:g}; "
            "lower its budget or train.batch-size"
        )
