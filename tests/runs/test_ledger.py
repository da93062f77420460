"""The layers that each node holds, and the bytes that are counted for it."""

from __future__ import annotations

from layerfed.exchange import Manifest
from layerfed.runs.ledger import Ledger, Traffic
from layerfed.server.holdings import Holdings

MANIFEST = Manifest("base", {"embeddings": "e0", "blocks.0": "b1", "head": "h1"})
CHANGED = ("blocks.0", "head")


def test_a_node_lacks_what_it_did_not_say_it_holds() -> None:
    holdings = Holdings()
    assert holdings.lacks(7, MANIFEST, CHANGED) == CHANGED
    holdings.learn(7, ["b1", "other"])
    assert holdings.lacks(7, MANIFEST, CHANGED) == ("head",)
    holdings.learn(7, ["b1", "h1"])
    assert holdings.lacks(7, MANIFEST, CHANGED) == ()
    holdings.learn(7, [])
    assert holdings.lacks(7, MANIFEST, CHANGED) == CHANGED, "its store was wiped"
    assert holdings.lacks(8, MANIFEST, CHANGED) == CHANGED


def test_only_nodes_of_the_servers_own_store_share_it() -> None:
    holdings = Holdings("mine")
    assert not holdings.anyone_shares
    holdings.learn(1, [], "other")
    holdings.learn(2, [], "mine")
    assert [holdings.shares(node) for node in (1, 2, 3)] == [False, True, False]
    assert holdings.anyone_shares


def test_a_server_without_a_store_shares_with_nobody() -> None:
    holdings = Holdings()
    holdings.learn(1, [], "")
    assert not holdings.shares(1)
    assert not holdings.anyone_shares


def test_totals_are_sums_over_clients() -> None:
    ledger = Ledger()
    ledger[3].down += 10
    ledger[3].up += 1
    ledger[5].down += 5
    ledger[5].moved_up += 2
    assert ledger.total() == Traffic(down=15, up=1, moved_up=2)
