"""The `[secagg]` section, and which other settings secure aggregation cannot work with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from layerfed.config.section import ConfigError, Section, Switch

__all__ = ["SecAggConfig", "refuse_with_secagg"]


class SecAggConfig(Section):
    """Whether the server may see sums of updates only."""

    enabled: Switch = False
    # Above one half: see `Participant.share_secrets`.
    threshold: Annotated[float, Field(gt=0.5, le=1)] = 0.66
    range: Annotated[float, Field(gt=0, le=1e6)] = 8.0

    def needed(self, clients: int) -> int:
        """Return t, how many of so many clients must get to the end of a round."""
        return math.ceil(self.threshold * clients)


OWN_LAYERS = "each client gets layers of its own"
SINGLE_UPDATES = "it needs single updates, and the server sees their sum only"
# What each key may be, the value to recommend first, and why another cannot work. A key that a
# configuration does not have is passed over.
ALLOWED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "exchange.codec": (("float32",), "updates travel as masked 32-bit integers"),
    "server.aggregation": (("mean",), SINGLE_UPDATES),
    "server.clip": ((0.0,), SINGLE_UPDATES),
    "federation.max-examples": ((0,), SINGLE_UPDATES),
    "privacy.mode": (("none", "local"), SINGLE_UPDATES),
}
# Strategies whose clients have equal masks only by chance.
NEVER_SHARED = ("random", "snr", "rgn")
# Strategies that follow the budgets: with equal ones all clients get the same layers.
FOLLOW_BUDGETS = ("top", "bottom", "both", "cyclic")


def refuse_with_secagg(flat: Mapping[str, Any]) -> None:
    """Refuse settings of a run with secure aggregation that no round could work with.

    What depends on the clients (their own budgets, what an integer program selects) is seen in the
    round, see `strategies/secure_round.py`.

    Parameters
    ----------
    flat : Mapping[str, Any]
        All settings of a run, by dotted key.

    Raises
    ------
    ConfigError
        Naming the settings that exclude each other.
    """
    for key, (values, why) in ALLOWED.items():
        if key in flat and flat[key] not in values:
            raise _refused(key, flat[key], why, f"set {key}={values[0]}")
    _refuse_masks_that_differ(flat)
    clients = flat["federation.clients-per-round"] or flat["federation.clients"]
    if not clients:
        return  # the federation states its size; this is checked once it is known
    more = flat["federation.over-provision"]
    if clients < 3:
        raise _refused(
            "federation.clients-per-round",
            clients,
            "in a sum of two each client learns the other's update",
            "ask at least 3",
        )
    asked = math.ceil(clients * (1 + more))
    needed = math.ceil(flat["secagg.threshold"] * asked)
    if needed > clients:
        raise _refused(
            "federation.over-provision",
            more,
            f"of {asked} clients asked, secagg.threshold = {flat['secagg.threshold']:g} needs "
            f"{needed}, and a round ends with {clients}",
            "lower either",
        )


def _refuse_masks_that_differ(flat: Mapping[str, Any]) -> None:
    strategy = flat["strategy.name"]
    if strategy in NEVER_SHARED:
        raise _refused(
            "strategy.name", strategy, OWN_LAYERS, "use ilp, top, bottom, cyclic or full"
        )
    if strategy == "fedtlu" and flat["strategy.side"] == "client":
        raise _refused("strategy.side", "client", OWN_LAYERS, "set strategy.side=server")
    if strategy == "ilp" and flat["strategy.consistency"] <= 0:
        raise _refused(
            "strategy.consistency", flat["strategy.consistency"], OWN_LAYERS, "make it large"
        )
    kind, low, high = flat["budget.kind"], flat["budget.min"], flat["budget.max"]
    if strategy in FOLLOW_BUDGETS and (
        kind == "per-node" or (kind == "half-normal" and low != high)
    ):
        raise _refused(
            "budget.kind",
            kind,
            f"with strategy.name = '{strategy}' clients of different budgets get different layers",
            "set budget.kind=identical",
        )


def _refused(key: str, value: Any, why: str, instead: str) -> ConfigError:
    return ConfigError(
        f"{key} = {value!r} does not go with secagg.enabled = true: {why}; {instead}, or set "
        "secagg.enabled=false"
    )
