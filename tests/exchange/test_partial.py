"""Instructions beyond one mask: what is written is read, and what cannot be meant is refused."""

from __future__ import annotations

import numpy as np
import pytest

from layerfed.exchange import read_schedule, read_upload, scheduled, upload_of
from layerfed.models.layers import LayerMap
from tests.exchange.replies import ask, over_the_wire

MASKS = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]], dtype=bool)
UNION = MASKS.any(axis=0).astype(int).tolist()


def test_a_schedule_is_masks_and_the_steps_on_each(layers: LayerMap) -> None:
    message = over_the_wire(ask(mask=UNION, **scheduled(MASKS, 2)))
    found = read_schedule(message, layers, 5)
    assert [steps for _, steps in found] == [2, 2, 1], "the last has what is left"
    assert [list(mask) for mask, _ in found] == MASKS.tolist()


def test_without_a_schedule_the_mask_is_trained_to_the_end(layers: LayerMap) -> None:
    assert read_schedule(ask(mask=UNION), layers, 7) == [((True, True, True, False), 7)]


@pytest.mark.parametrize(
    ("steps", "each", "says"),
    [
        (4, 2, "a schedule of 12 entries, one mask every 2 steps; 4 steps on a model of 4"),
        (7, 2, "7 steps"),
        (5, 0, "every 0 steps"),
        (5, -2, "every -2 steps"),
    ],
)
def test_a_schedule_for_other_steps_is_refused(
    layers: LayerMap, steps: int, each: int, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        read_schedule(ask(mask=UNION, **scheduled(MASKS, each)), layers, steps)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1], [1, 1, 0, 0]])
def test_a_schedule_must_be_its_mask_taken_apart(layers: LayerMap, mask: list[int]) -> None:
    with pytest.raises(ValueError, match="together are not its mask"):
        read_schedule(ask(mask=mask, **scheduled(MASKS, 2)), layers, 5)


def test_an_upload_is_a_count_and_a_norm() -> None:
    assert read_upload(over_the_wire(ask(mask=UNION, **upload_of(2, "l1")))) == (2, "l1")
    assert read_upload(ask(mask=UNION)) is None
