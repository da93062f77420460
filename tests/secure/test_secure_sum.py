"""A secure sum gives the mean of the survivors after any dropouts, and nothing if too few are left."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfed.config.secagg import SMALLEST
from tests.secure.rounds import Round, made


@st.composite
def dropouts(draw: st.DrawFn) -> tuple[int, int, list[set[int]], int]:
    """Clients, threshold, who leaves before each phase (by position), and a seed."""
    count = draw(st.integers(3, 8))
    threshold = draw(st.integers(max(SMALLEST, count // 2 + 1), count))
    gone = draw(st.permutations(range(count)))[: draw(st.integers(0, count - threshold))]
    phase = [draw(st.integers(0, 2)) for _ in gone]
    leaving = [{c for c, when in zip(gone, phase, strict=True) if when == p} for p in range(3)]
    return count, threshold, leaving, draw(st.integers(0, 2**16))


@settings(max_examples=30, deadline=None)
@given(dropouts())
def test_the_opened_sum_is_the_mean_of_the_survivors(
    case: tuple[int, int, list[set[int]], int],
) -> None:
    count, threshold, leaving, seed = case
    round_ = made(count, threshold, seed=seed)
    names = list(round_.updates)
    before, training, after = ([names[p] for p in places] for places in leaving)
    round_.agree(away=before)
    round_.train(away=training)
    round_.unmask(away=after)
    mean, examples = round_.sum.open()
    survivors = set(names) - {*before, *training}
    assert set(round_.sum.survivors) == survivors
    assert examples == sum(round_.examples[c] for c in survivors)
    error = np.abs(mean - round_.exact_mean()).max()
    assert error <= round_.point.error(examples, len(survivors))


def test_below_the_threshold_nothing_can_be_opened() -> None:
    round_ = made(5, 4)
    round_.agree()
    first, second, *_ = round_.updates
    round_.train()
    round_.unmask(away=[first, second])
    with pytest.raises(ValueError, match="3 clients revealed shares, 4 are needed"):
        round_.sum.open()


def test_clients_reveal_nothing_of_a_sum_of_too_few() -> None:
    round_ = made(5, 4)
    round_.agree()
    first, second, *_ = round_.updates
    round_.train(away=[first, second])
    with pytest.raises(ValueError, match="3 survivors, 4 are needed"):
        round_.unmask()


def test_a_padded_update_looks_random_whatever_is_in_it() -> None:
    """For zeros, bytes are uniform by a χ² test at 10⁻⁶, and no two clients send the same ones."""
    round_ = made(3, 2, size=50_000)
    for update in round_.updates.values():
        update[:] = 0
    round_.agree()
    round_.train()
    padded = list(round_.padded.values())
    for vector in padded:
        for place in range(4):
            counts = np.bincount(vector.view(np.uint8)[place::4], minlength=256)
            expected = vector.size / 256
            assert ((counts - expected) ** 2 / expected).sum() < 380  # 255 degrees of freedom
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (padded[one] == padded[other]).mean() < 1e-3
    # Only common pads cancel in the sum; each client's own pad still hides it.
    assert np.count_nonzero(padded[0] + padded[1] + padded[2]) > 49_000
    round_.unmask()
    mean, _ = round_.sum.open()
    assert not mean.any()


def test_two_rounds_of_the_same_updates_have_nothing_in_common() -> None:
    one, two = made(3, 2), made(3, 2)
    for round_ in (one, two):
        round_.agree()
        round_.train()
    for client, vector in one.padded.items():
        assert not np.array_equal(vector, two.padded[client])


def change_seed_share(round_: Round) -> None:
    survivor, peer = round_.sum.survivors[0], round_.sum.peers[0]
    place = round_.sum.clients.index(survivor)
    share = round_.sum._shares[peer][place]
    round_.sum._shares[peer][place] = bytes([share[0] ^ 1]) + share[1:]


def change_key_share(round_: Round) -> None:
    survivor, dropped = round_.sum.survivors[0], round_.sum.peers[-1]
    place = round_.sum.clients.index(survivor)
    share = round_.sum._shares[dropped][place]
    round_.sum._shares[dropped][place] = share[:-1] + bytes([share[-1] ^ 128])


@pytest.mark.parametrize("change", [change_seed_share, change_key_share], ids=lambda f: f.__name__)
def test_a_wrong_share_is_noticed(change: Callable[[Round], None]) -> None:
    round_ = made(4, 3)
    round_.agree()
    round_.train(away=[list(round_.updates)[-1]])
    round_.unmask()
    change(round_)
    with pytest.raises(ValueError, match="not of what it agreed on"):
        round_.sum.open()


def test_a_stray_vector_is_noticed_by_its_examples() -> None:
    round_ = made(3, 2)
    round_.agree()
    round_.train()
    assert round_.sum._total is not None
    round_.sum._total[-1:] += np.uint32(2**31)
    round_.unmask()
    with pytest.raises(ValueError, match="the sum states -"):
        round_.sum.open()
