"""The rule for "the same run": the settings in which two of its configurations may differ."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from layerfed.config.errors import ConfigError
from layerfed.config.paths import absolute
from layerfed.config.run import RunConfig

__all__ = ["differing"]

# The result does not depend on the place and speed of the computation, or on the timeout.
FREE_SECTION, BUT = "run.", "run.seed"
# Options that came in `strategy.options` stand under keys of their own as well.
FREE = {"federation.timeout", "strategy.options"}
ROUNDS, PATIENCE = "federation.rounds", "federation.patience"


def differing(
    mine: RunConfig,
    theirs: Mapping[str, object],
    defaults: Mapping[str, object],
    *,
    goes_on: bool = False,
) -> list[str]:
    """Return the keys whose values make a configuration belong to another run than a written one.

    Parameters
    ----------
    mine : RunConfig
    theirs : Mapping[str, object]
        The content of a run folder's `config.json`.
    defaults : Mapping[str, object]
        Those of the strategy's options (`strategies.option_defaults`).
    goes_on : bool (default: False)
        Whether the run is continued, and may then end at another time than before: after more rounds,
        unless its learning rate depends on their number, or with another patience.

    Returns
    -------
    list[str]
        The keys; an empty list means the same run.
    """
    # A cosine's rate in each round depends on the number of rounds.
    to_the_end = "cosine" in (mine.train.lr_schedule, mine.server.lr_schedule)
    end = {PATIENCE} if to_the_end else {PATIENCE, ROUNDS}
    free = FREE | end if goes_on else FREE
    # A path may be written in two ways, of which a run folder has the absolute one.
    theirs = absolute(theirs)
    # If a setting is gone or has another meaning now, the written values are compared.
    with suppress(ConfigError):
        # A setting that did not exist when the run began had the effect of its default.
        theirs = {**defaults, **RunConfig.from_flat(theirs).to_flat(), **theirs}
    ours = mine.absolute().to_flat()
    # Settings of a user's own task or strategy stand in a configuration only where they were given.
    own = [key for key in theirs if key in defaults or key.startswith("task.")]
    return [
        key
        for key in dict.fromkeys([*ours, *own])
        if theirs.get(key, defaults.get(key)) != ours.get(key, defaults.get(key))
        and key not in free
        and (key == BUT or not key.startswith(FREE_SECTION))
    ]
