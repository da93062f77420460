"""A train instruction is read as it was written, and impossible ones are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfed.config import ConfigError
from layerfed.exchange import Probe, TrainInstruction, Upload
from layerfed.exchange.instruction import as_masks, train_config
from layerfed.models.layers import LayerMap
from tests.exchange.replies import ask, over_the_wire

MASKS = as_masks(np.array([[1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]], dtype=bool))
UNION = [1, 1, 1, 0]
SCHEDULED = TrainInstruction(round=3, masks=MASKS, steps_each=2)


def sent(instruction: TrainInstruction) -> TrainInstruction:
    return TrainInstruction.read(over_the_wire(ask(**instruction.to_config())), 4)


@given(
    masks=st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=5),
    each=st.integers(1, 9),
    lr=st.none() | st.floats(1e-6, 10),
    codec=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
    upload=st.none() | st.builds(Upload, st.integers(1, 4), st.sampled_from(["l1", "l2"])),
    kept=st.none() | st.tuples(*[st.booleans()] * 4),
    probe=st.none()
    | st.builds(
        Probe,
        st.lists(st.sampled_from(["snr", "fisher"]), min_size=1, unique=True).map(tuple),
        st.tuples(*[st.booleans()] * 4).filter(any),
        st.integers(0, 3),
        st.integers(0, 9),
    ),
)
def test_what_is_written_is_read(
    masks: list[tuple[bool, ...]],
    each: int,
    lr: float | None,
    codec: str,
    upload: Upload | None,
    kept: tuple[bool, ...] | None,
    probe: Probe | None,
) -> None:
    steps = each if len(masks) > 1 else 0
    trained = sum(map(any, zip(*masks, strict=True)))
    upload = Upload(min(upload.count, trained), upload.norm) if upload and trained else None
    own = {"weight-decay": 0.1, "name": "mine"}
    instruction = TrainInstruction(3, tuple(masks), steps, "run", lr, codec, upload, own)
    instruction = replace(instruction, probe=probe)
    if kept is not None and upload is None:
        sends = tuple(a and b for a, b in zip(kept, instruction.mask, strict=True))
        instruction = replace(instruction, sends=sends)
    assert sent(instruction) == instruction


def test_a_schedule_is_masks_and_the_steps_on_each() -> None:
    found = sent(SCHEDULED).schedule(5)
    assert [steps for _, steps in found] == [2, 2, 1], "the last has what is left"
    assert tuple(mask for mask, _ in found) == MASKS


def test_without_a_schedule_the_mask_is_trained_to_the_end() -> None:
    found = TrainInstruction.read(ask(mask=UNION), 4).schedule(7)
    assert found == [((True, True, True, False), 7)]


@pytest.mark.parametrize(("steps", "says"), [(4, "one every 2 steps; 4 steps"), (7, "7 steps")])
def test_a_schedule_for_other_steps_is_refused(steps: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SCHEDULED.schedule(steps)


@pytest.mark.parametrize("each", [0, -2])
def test_a_schedule_without_steps_is_refused(each: int) -> None:
    with pytest.raises(ConfigError, match=f"3 masks to train in turn .* it is {each}"):
        replace(SCHEDULED, steps_each=each).to_config()
    with pytest.raises(ValueError, match=f"a schedule of 12 entries, one mask every {each} steps"):
        TrainInstruction.read(ask(**SCHEDULED.to_config() | {"schedule-steps": each}), 4)


def test_a_schedule_over_another_number_of_layers_is_refused() -> None:
    config = SCHEDULED.to_config()
    config["schedule"] = config["schedule"][:-1]
    with pytest.raises(ValueError, match="a schedule of 11 entries"):
        TrainInstruction.read(ask(**config), 4)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1], [1, 1, 0, 0]])
def test_a_schedule_must_be_its_mask_taken_apart(mask: list[int]) -> None:
    with pytest.raises(ValueError, match="together are not its mask"):
        TrainInstruction.read(ask(**{**SCHEDULED.to_config(), "mask": mask}), 4)


@pytest.mark.parametrize("length", [0, 3, 5])
def test_a_mask_over_another_number_of_layers_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"over {length} layers, this model has 4"):
        TrainInstruction.read(ask(mask=[1] * length), 4)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="codec 'zip'; known are float32"):
        TrainInstruction.read(ask(mask=UNION, codec="zip"), 4)


def test_all_that_was_trained_is_sent_or_what_changed_most(layers: LayerMap) -> None:
    plain = TrainInstruction.read(ask(mask=UNION), 4)
    update = {t: np.zeros(layers.shapes[t], np.float32) for x in layers.layers for t in x.tensors}
    for name in layers["blocks.1"].parameters:
        update[name] = np.ones(layers.shapes[name], np.float32)
    assert plain.sent(layers, update) == ["blocks.0", "blocks.1", "blocks.2", "head"]
    chosen = replace(plain, upload=Upload(1, "l2"))
    assert chosen.sent(layers, update) == ["blocks.1", "head"]


def test_a_block_moves_in_the_steps_of_its_masks_and_in_one_at_least(layers: LayerMap) -> None:
    found = SCHEDULED.layer_steps(layers, 5)
    assert found == {"blocks.0": 3.0, "blocks.1": 1.0, "blocks.2": 2.0, "blocks.3": 1.0}


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("mask", None, "no 'mask' of zeros and ones"),
        ("mask", 3, "no 'mask' of zeros and ones"),
        ("mask", "0101", "no 'mask' of zeros and ones"),
        ("mask", [2.5, -1.0, 0.0, 0.0], "no 'mask' of zeros and ones"),
        ("schedule", [1, 0, 0, 0], "every 0 steps"),
        ("lr", "high", "a learning rate of 'high'"),
        ("lr", float("nan"), "a learning rate of nan"),
        ("lr", 0.0, "a learning rate of 0.0"),
        ("upload", 1, "by norm 'None'"),
        ("upload", -1, "-1 of 3 trained blocks"),
        ("upload", 4, "4 of 3 trained blocks"),
    ],
)
def test_entries_that_none_can_be_are_refused(entry: str, value: object, says: str) -> None:
    config = {"mask": UNION, entry: value}
    message = ask(**{k: v for k, v in config.items() if v is not None})
    with pytest.raises(ValueError, match=says):
        TrainInstruction.read(message, 4)


def test_the_rate_is_taken_out_of_a_train_config() -> None:
    assert train_config({"lr": 2, "warmup": 3}) == (2.0, {"warmup": 3})
    assert train_config({"warmup": 3}) == (None, {"warmup": 3})


@pytest.mark.parametrize("lr", ["0.1", True, 0, float("inf")])
def test_a_train_config_without_a_number_for_the_rate_is_refused(lr: object) -> None:
    with pytest.raises(ConfigError, match="the train config's lr"):
        train_config({"lr": lr})


def test_masks_must_be_there_and_over_the_same_layers() -> None:
    for masks in ((), ((True,), (True, False))):
        with pytest.raises(ValueError, match="masks over the same layers"):
            TrainInstruction(1, masks)


@pytest.mark.parametrize("blocks", [[0, 0, 0, 0], [1, 1, 1], [1, 0, 2, 0], "all"])
def test_a_probe_of_no_blocks_or_of_another_model_is_refused(blocks: object) -> None:
    with pytest.raises(ValueError, match="blocks"):
        Probe.read({"statistics": ["snr"], "batches": 1, "blocks": blocks}, 4)
