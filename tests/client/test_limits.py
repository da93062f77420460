"""A node's own limits: its budget in any unit, its free memory, and its slowest step."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from layerfed.client import limits as node_limits
from layerfed.client.limits import (
    Allowance,
    LayerCosts,
    MaskRefused,
    StepTooSlow,
    free_memory,
    paced,
    translate,
)
from layerfed.config import BudgetUnit, ConfigError, NodeConfig
from layerfed.selection.problem import BUDGET_TOLERANCE

CPU = torch.device("cpu")
ONES = LayerCosts(np.ones(4), np.zeros(4))
# The memory that backward keeps grows towards the input.
BYTES = LayerCosts(np.full(4, 10.0), np.array([90.0, 60.0, 30.0, 0.0]))


def additive(*costs: float) -> LayerCosts:
    return LayerCosts(np.array(costs), np.zeros(len(costs)))


def test_the_tolerance_is_that_of_the_solvers() -> None:
    assert node_limits.TOLERANCE == BUDGET_TOLERANCE


# ------------------------------------------------------------------------------- translation
amounts = st.floats(0.01, 100)


@st.composite
def costs(draw: st.DrawFn, layers: int) -> LayerCosts:
    own = draw(st.lists(amounts, min_size=layers, max_size=layers))
    steps = draw(st.lists(st.floats(0, 50), min_size=layers, max_size=layers))
    return LayerCosts(np.array(own), np.cumsum(steps)[::-1].copy())


@given(st.data(), st.integers(1, 6), st.floats(0, 1.2))
def test_no_mask_within_a_translated_budget_exceeds_the_limit(
    data: st.DataObject, layers: int, share: float
) -> None:
    given_, wanted = data.draw(costs(layers)), data.draw(costs(layers))
    limit = share * given_.total
    budget = translate(limit, given_, wanted)
    for mask in product((False, True), repeat=layers):
        if wanted.of(mask) <= budget * (1 + BUDGET_TOLERANCE) and any(mask):
            assert given_.of(mask) <= limit * (1 + 2e-6)


@given(st.data(), st.integers(1, 6), st.floats(0, 1.2))
def test_into_layers_it_is_exact(data: st.DataObject, layers: int, share: float) -> None:
    given_ = data.draw(costs(layers))
    limit = share * given_.total
    count = LayerCosts(np.ones(layers), np.zeros(layers))
    found = int(np.floor(translate(limit, given_, count)))
    worst = [0.0] * (layers + 1)
    for mask in product((False, True), repeat=layers):
        worst[sum(mask)] = max(worst[sum(mask)], given_.of(mask))
    fits = [k for k, cost in enumerate(worst) if all(c <= limit for c in worst[: k + 1])]
    close = any(abs(cost - limit) <= 1e-5 * limit for cost in worst)
    assert found == max(fits) or close


def test_a_limit_of_exactly_two_layers_is_two_layers() -> None:
    assert np.floor(translate(20.0, additive(10, 10, 10), additive(1, 1, 1))) == 2
    assert np.floor(translate(19.0, additive(10, 10, 10), additive(1, 1, 1))) == 1


def test_enough_for_everything_is_the_whole_model() -> None:
    assert translate(130.0, BYTES, ONES) == 4


# -------------------------------------------------------------------------------- allowances
def allowed(
    unit: BudgetUnit = "layers", free: float = 1e9, head: float = 0.0, **settings: object
) -> Allowance | None:
    node = NodeConfig.read(
        {"partition-id": 0, **{k.replace("_", "-"): v for k, v in settings.items()}}
    )
    units = {"layers": ONES, "memory": BYTES}
    return Allowance.of(node, unit, units.__getitem__, lambda: free, lambda: head)


def test_a_node_without_a_budget_sets_no_limit() -> None:
    assert allowed() is None


def test_a_number_is_in_layers_unless_it_says_otherwise() -> None:
    found = allowed(budget=2)
    assert found is not None
    assert found.budget == 2
    assert allowed("memory", budget=50, budget_unit="memory").budget == 50  # type: ignore[union-attr]


def test_a_number_without_unit_is_refused_where_the_run_counts_otherwise() -> None:
    with pytest.raises(ConfigError, match=r"budget = 2 has no unit, and the run counts in memory"):
        allowed("memory", budget=2)


@pytest.mark.parametrize(
    ("limit", "layers"), [(9, 0), (99, 0), (100, 1), (109, 1), (110, 2), (130, 4)]
)
def test_another_unit_is_translated(limit: float, layers: float) -> None:
    # One layer costs up to 100 bytes (the lowest), two up to 110, three 120.
    assert allowed(budget=limit, budget_unit="memory").budget == layers  # type: ignore[union-attr]


@pytest.mark.parametrize(("free", "layers"), [(220, 1), (240, 2), (10_000, 4), (20, 0)])
def test_auto_is_half_of_the_free_memory_less_what_the_head_takes(
    free: float, layers: float
) -> None:
    assert allowed(budget="auto", free=free, head=10).budget == layers  # type: ignore[union-attr]


def test_auto_needs_room_for_the_head() -> None:
    with pytest.raises(
        ConfigError, match=r"half of the free memory is 1\.0 MB.*head alone takes 3"
    ):
        allowed(budget="auto", free=2e6, head=3e6)


def test_a_mask_above_the_budget_is_refused() -> None:
    found = allowed("memory", budget=50, budget_unit="memory")
    assert found is not None
    found.check([False, False, True, True])  # 10 + 10 + 30
    found.check([False] * 4)
    with pytest.raises(
        MaskRefused, match=r"1 layers that cost 70 memory; this node's own budget is 50"
    ):
        found.check([False, True, False, False])


def test_an_allowance_outlives_the_process() -> None:
    state = RecordDict()
    assert Allowance.recall(state, "memory") is None
    found = allowed("memory", budget=50, budget_unit="memory")
    assert found is not None
    found.remember(state)
    again = Allowance.recall(state, "memory")
    assert again is not None
    assert (again.budget, again.unit) == (50, "memory")
    assert np.array_equal(again.costs.own, BYTES.own)
    assert np.array_equal(again.costs.depth, BYTES.depth)
    assert Allowance.recall(state, "layers") is None


# ------------------------------------------------------------------------------- free memory
@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(node_limits, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(node_limits, "CGROUP", tmp_path)
    return tmp_path


def contain(folder: Path, limit: str, usage: str, cache: str) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")


def test_free_memory_is_what_the_kernel_has(machine: Path) -> None:
    assert free_memory(CPU) == 4000 * 1024
    contain(machine, "max", "100", "0")
    assert free_memory(CPU) == 4000 * 1024


def test_a_container_has_less(machine: Path) -> None:
    contain(machine, "1000000", "700000", "200000")
    assert free_memory(CPU) == 500_000


def test_an_old_kind_of_container_has_less(machine: Path) -> None:
    (machine / "memory").mkdir()
    (machine / "memory/memory.limit_in_bytes").write_text("1000000\n")
    (machine / "memory/memory.usage_in_bytes").write_text("700000\n")
    (machine / "memory/memory.stat").write_text("cache 1\ntotal_inactive_file 0\n")
    assert free_memory(CPU) == 300_000


def test_a_gpu_has_what_the_driver_and_the_allocator_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_memory(torch.device("cuda")) == 1300


def test_a_system_that_does_not_say_is_refused(machine: Path) -> None:
    (machine / "meminfo").unlink()
    with pytest.raises(ConfigError, match=r"does not say how much memory is free; state a number"):
        free_memory(CPU)


# ------------------------------------------------------------------------------------- pace
class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def work(
        self,
        durations: list[float],
        most: float,
        lengths: list[int] | None = None,
        fresh: tuple[int, ...] = (),
    ) -> int:
        """Train on a batch for each duration; return the number of trained batches."""
        lengths = lengths or [1] * len(durations)
        batches = [{"x": torch.zeros(length)} for length in lengths]
        done = 0
        for _ in paced(batches, most, CPU, fresh):
            self.now += durations[done]
            done += 1
        return done


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_steps_within_the_limit_all_run(clock: Clock) -> None:
    assert clock.work([9.0, 1.0, 1.0], most=2.0) == 3  # the first warms up


def test_a_slow_step_stops_the_training_there(clock: Clock) -> None:
    with pytest.raises(StepTooSlow, match=r"step 2 took 3 s, this node's max-step-seconds is 2"):
        clock.work([1.0, 3.0, 1.0], most=2.0)
    assert clock.now == 4.0


def test_the_first_step_of_a_shape_or_of_a_mask_is_not_timed(clock: Clock) -> None:
    """FLOPs and memory are counted again in it."""
    assert clock.work([9.0, 1.0, 9.0, 1.0], most=2.0, lengths=[1, 1, 2, 2]) == 4
    assert clock.work([9.0, 1.0, 9.0, 1.0], most=2.0, fresh=(1, 3)) == 4
    with pytest.raises(StepTooSlow, match="step 4 took 3 s"):
        clock.work([9.0, 1.0, 9.0, 3.0], most=2.0, lengths=[1, 1, 2, 2])


@pytest.mark.parametrize("durations", [[3.0], [1.0, 3.0]])
def test_the_last_step_is_timed_too(clock: Clock, durations: list[float]) -> None:
    with pytest.raises(StepTooSlow, match=f"step {len(durations)} took 3 s"):
        clock.work(durations, most=2.0)
