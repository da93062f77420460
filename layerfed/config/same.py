"""The rule for "the same configuration": which settings two configurations of one run may differ in."""

from __future__ import annotations

from collections.abc import Mapping

from layerfed.config.run import RunConfig, absolute

__all__ = ["differing"]

# A result does not depend on where and how fast it is computed, or on how long stragglers get.
FREE_SECTION, BUT = "run.", "run.seed"
FREE = "federation.timeout"
ROUNDS = "federation.rounds"


def differing(mine: RunConfig, theirs: Mapping[str, object], *, goes_on: bool = False) -> list[str]:
    """Return the keys by which a configuration is of another run than one that was written down.

    Parameters
    ----------
    mine : RunConfig
    theirs : Mapping[str, object]
        The content of a run folder's `config.json`.
    goes_on : bool (default: False)
        Whether the run is continued: it may then have more rounds than before. A run that counts as
        done must have as many as are asked for.

    Returns
    -------
    list[str]
        Empty for configurations of the same run.
    """
    free = {FREE, ROUNDS} if goes_on else {FREE}
    # Paths may be written in two ways, of which a run folder has the absolute one.
    theirs = absolute(theirs)
    return [
        key
        for key, value in mine.absolute().to_flat().items()
        if theirs.get(key) != value
        and key not in free
        and (key == BUT or not key.startswith(FREE_SECTION))
    ]
