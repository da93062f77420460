"""The `[secagg]` section, and the settings that secure aggregation cannot work with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from layerfed.config.section import ConfigError, Section, Switch

__all__ = ["SMALLEST", "SecAggConfig", "refuse_different_masks", "refuse_with_secagg"]


SMALLEST = 3
"""The fewest clients of a sum: in one of two, each learns the other's update."""


class SecAggConfig(Section):
    """Secure aggregation: whether the server sees sums of updates only."""

    enabled: Switch = False
    # Above one half: see `Participant.share_secrets`.
    threshold: Annotated[float, Field(gt=0.5, le=1)] = 0.66
    range: Annotated[float, Field(gt=0, le=1e6)] = 8.0

    def needed(self, clients: int) -> int:
        """Return t, the number of `clients` that must reach the end of a round, at least `SMALLEST`."""
        # Without the rounding error of a product such as 0.56 · 25.
        return max(SMALLEST, math.ceil(self.threshold * clients - 1e-9))


OWN_LAYERS = "each client gets layers of its own"
SINGLE_UPDATES = "it needs single updates, and the server sees their sum only"
# For each key the allowed values, the recommended one first, and why another cannot work. A key that a
# configuration does not have is skipped.
ALLOWED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "exchange.codec": (("float32",), "updates travel as padded 32-bit integers"),
    "server.aggregation": (("mean",), SINGLE_UPDATES),
    "server.clip": ((0.0,), SINGLE_UPDATES),
    "federation.max-examples": ((0,), SINGLE_UPDATES),
    "train.skip": (("none",), OWN_LAYERS),
    "federation.deadline": ((0.0,), "a client that is out of time sends fewer layers than others"),
    "privacy.mode": (("none", "local"), SINGLE_UPDATES),
}


def refuse_with_secagg(flat: Mapping[str, Any]) -> None:
    """Refuse settings with which no round of a secure sum could work.

    Conflicts that depend on the clients show only in a round, for example their own budgets or the
    masks of the integer program; `server/secure_sums.py` refuses those.

    Parameters
    ----------
    flat : Mapping[str, Any]
        All settings of a run, by dotted key.

    Raises
    ------
    ConfigError
        If two settings exclude each other; the message names them.
    """
    for key, (values, why) in ALLOWED.items():
        if key in flat and flat[key] not in values:
            raise _refused(key, flat[key], why, f"set {key}={values[0]}")
    there = flat["federation.clients"]
    clients = flat["federation.clients-per-round"] or there
    if not clients:
        return  # the federation states its size later, and this is checked then
    more = flat["federation.over-provision"]
    if clients < SMALLEST:
        raise _refused(
            "federation.clients-per-round",
            clients,
            "in a sum of two each client learns the other's update",
            f"ask at least {SMALLEST}",
        )
    asked = math.ceil(clients * (1 + more) - 1e-9)
    asked = min(asked, there or asked)
    needed = SecAggConfig(threshold=flat["secagg.threshold"]).needed(asked)
    if needed > clients:
        raise _refused(
            "federation.over-provision",
            more,
            f"of {asked} clients asked, secagg.threshold = {flat['secagg.threshold']:g} needs "
            f"{needed}, and a round ends with {clients}",
            "lower either",
        )


def refuse_different_masks(flat: Mapping[str, Any], masks: str) -> None:
    """Refuse a strategy whose clients train different layers.

    Parameters
    ----------
    flat : Mapping[str, Any]
        All settings of a run, by dotted key.
    masks : {"shared", "within-budget", "own"}
        Whether the strategy's masks agree; see `SelectiveStrategy.masks`.

    Raises
    ------
    ConfigError
        If masks can differ; the message names the setting and what to do.
    """
    if not flat["secagg.enabled"] or masks == "shared":
        return
    strategy = flat["strategy.name"]
    if masks == "own":
        raise _refused(
            "strategy.name",
            strategy,
            OWN_LAYERS,
            "use top, bottom, cyclic, full, head, fedtlu with side=server, or ilp with a large "
            "consistency (strategy.consistency=100)",
        )
    kind, low, high = flat["budget.kind"], flat["budget.min"], flat["budget.max"]
    if kind == "per-node" or (kind == "half-normal" and low != high):
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
