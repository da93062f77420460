"""A client of a secure sum refuses requests that would reveal its update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from layerfed.secure.participant import Participant
from tests.secure.rounds import elsewhere, made


def roster(count: int = 4) -> tuple[Participant, dict[str, Any]]:
    clients = [Participant("run/1", c) for c in range(count)]
    keys = [c.keys() for c in clients]
    return clients[0], {
        "threshold": count // 2 + 1,
        "clients": list(range(count)),
        "sealing_keys": [k.sealing for k in keys],
        "padding_keys": [k.masking for k in keys],
    }


def test_the_roster_is_taken_as_it_is() -> None:
    mine, asked = roster()
    assert len(mine.share_secrets(**asked)) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threshold": 2}, "4 clients that 2 can open protects nobody"),
        ({"threshold": 5}, "4 clients that 5 can open protects nobody"),
        ({"clients": [4, 1, 2, 3]}, "named wrongly"),
        ({"clients": [0, 1, 1, 3]}, "named wrongly"),
        ({"clients": [1, 0, 2, 3]}, "other keys than this client's"),
    ],
)
def test_a_roster_that_is_wrong_is_refused(change: dict[str, Any], says: str) -> None:
    mine, asked = roster()
    with pytest.raises(ValueError, match=says):
        mine.share_secrets(**{**asked, **change})


def test_one_key_for_several_clients_is_refused() -> None:
    mine, asked = roster()
    asked["padding_keys"][2] = asked["padding_keys"][1]
    with pytest.raises(ValueError, match="the same key for several"):
        mine.share_secrets(**asked)


def test_a_sum_of_two_is_refused() -> None:
    mine, asked = roster(2)
    with pytest.raises(ValueError, match="protects nobody"):
        mine.share_secrets(**asked)


def test_secrets_are_shared_once_and_serve_one_update() -> None:
    round_ = made(3, 2)
    round_.agree()
    round_.train()
    mine = next(iter(round_.clients.values()))
    keys = round_.sum.keys.values()
    with pytest.raises(ValueError, match="shared already"):
        mine.share_secrets(
            2, round_.sum.clients, [k.sealing for k in keys], [k.masking for k in keys]
        )
    with pytest.raises(ValueError, match="padded with the secrets of this round already"):
        mine.pad(np.zeros(3, np.uint32), round_.sum.peers, round_.sum.sealed_for(mine.own))


def test_shares_meant_for_another_client_or_round_are_refused() -> None:
    round_ = made(3, 2)
    round_.agree()
    first, second, _ = round_.clients
    sealed = round_.sum.sealed_for(first)
    with pytest.raises(ValueError, match="cannot be opened"):
        round_.clients[second].pad(np.zeros(3, np.uint32), round_.sum.peers, sealed)
    other = elsewhere(round_.clients[first])
    other.purpose = "run/2"
    with pytest.raises(ValueError, match="cannot be opened"):
        other.pad(np.zeros(3, np.uint32), round_.sum.peers, sealed)


@pytest.mark.parametrize("survivors", [[0, 1, 9], [1, 2, 3], [0, 1, 1]])
def test_survivors_that_cannot_be_are_refused(survivors: list[int]) -> None:
    round_ = made(4, 3)
    names = list(round_.clients)
    round_.agree()
    round_.train()
    named = [names[s] if s < 4 else 99 for s in survivors]
    with pytest.raises(ValueError, match="named wrongly"):
        round_.clients[names[0]].reveal(named)


def test_a_client_reveals_one_of_the_two_secrets_of_each() -> None:
    """The share for a client that is said to have dropped out is not the share for a survivor."""
    round_ = made(4, 3)
    round_.agree()
    round_.train()
    one, *_, last = round_.sum.peers
    mine = round_.clients[one]
    everyone, without = mine.reveal(round_.sum.peers), mine.reveal(round_.sum.peers[:-1])
    assert everyone[:-1] == without[:-1]
    assert everyone[-1] != without[-1]
    assert last != one


def test_secrets_are_not_printed() -> None:
    mine = Participant("run/1", 0)
    for secret in (mine.sealing, mine.padding, mine.seed):
        assert repr(secret) not in repr(mine)
