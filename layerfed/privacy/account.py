"""What a run has spent of privacy: ε at δ, for the client that was asked most often.

Two federations are neighbours if all data of *one client* are exchanged for any others (replace-one, at
the level of clients). That moves what is clipped to C by at most 2C, so noise of z·C is a Gaussian
mechanism of noise multiplier z/2: in local mode on a client's own update, in central mode on the sum it
is part of. A client that was asked k times ran through k of them, one after the other, and those are
one of multiplier z/(2√k) exactly (Dong, Roth and Su, *Gaussian differential privacy*, 2022), whose ε is
known in closed form (Balle and Wang, *Improving the Gaussian mechanism*, 2018); Google's dp-accounting
computes it. A noised statistic of a probe is one more mechanism of the same client.

No amplification by sampling is claimed, which would need a sample that nobody knows. Who takes part
follows from `run.seed`, which every client is told; and even if it were secret, which layers move says
who was there, wherever budgets or random masks differ by client.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from logging import INFO, WARNING
from typing import Literal

from flwr.common.logger import log

from layerfed.config import ConfigError, PrivacyConfig

__all__ = ["Covers", "PrivacyAccount", "epsilon_of"]

Covers = Literal["updates", "updates and selection"]


def epsilon_of(precision: float, delta: float) -> float:
    """Return ε at δ of Gaussian mechanisms run one after the other.

    Parameters
    ----------
    precision : float
        Σ_j s_j⁻² over their noise multipliers s_j: each one's standard deviation over its sensitivity.
    delta : float

    Raises
    ------
    ConfigError
        If dp-accounting is not installed.
    """
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError:
        raise ConfigError(
            "privacy.mode needs an accountant, Google's dp-accounting, which is not installed: "
            "pip install '.[privacy]' in the clone of LayerFed"
        ) from None
    if precision == 0:
        return 0.0
    return float(get_epsilon_gaussian(precision**-0.5, delta)) if precision < math.inf else math.inf


def _precision(noise: float) -> float:
    """Return s⁻² of one release with noise multiplier z, under replace-one: s = z/2."""
    return 4.0 / noise**2 if noise > 0 else math.inf


class PrivacyAccount:
    """Adds up what each client has revealed.

    It depends on the settings and on who was asked in which round, and on nothing else: a resumed run
    gets it back from its ledger. Whoever was asked counts, whether or not a usable answer came.

    Parameters
    ----------
    section : PrivacyConfig
    probed : Callable[[int], Iterable[str]]
        The statistics of its data that a client is asked for in a round.
    rounds : int
        Of the whole run.

    Raises
    ------
    ConfigError
        If dp-accounting is not installed.
    """

    def __init__(
        self, section: PrivacyConfig, probed: Callable[[int], Iterable[str]], rounds: int
    ) -> None:
        self._section = section
        self._probed = probed
        self._rounds = rounds
        self._spent: dict[int, float] = defaultdict(float)
        self._again = 0.0
        asks = any(self._private_in(number) for number in range(1, rounds + 1))
        self.covers: Covers = (
            "updates" if asks and section.statistics_noise == 0 else "updates and selection"
        )
        epsilon_of(0.0, section.delta)

    def _private_in(self, server_round: int) -> int:
        """Return how many statistics of its data a client is asked for in a round."""
        return len(set(self._probed(server_round)))

    def _cost(self, server_round: int) -> float:
        """Return what a client reveals in a round, Σ s⁻² of its update and its statistics."""
        cost = _precision(self._section.noise)
        if self._section.statistics_noise > 0:
            cost += self._private_in(server_round) * _precision(self._section.statistics_noise)
        return cost

    @property
    def epsilon(self) -> float:
        """ε of the client that revealed most so far; infinite where there is no noise."""
        worst = max(self._spent.values(), default=0.0) + self._again
        return epsilon_of(worst, self._section.delta)

    def count(self, server_round: int, clients: Iterable[int]) -> None:
        """Count a round for the clients, by partition id, that were asked in it."""
        for client in clients:
            self._spent[client] += self._cost(server_round)

    def recall(
        self, asked: Iterable[tuple[int, Iterable[int]]], repeated: Iterable[int] = ()
    ) -> None:
        """Take in what a run revealed before it was interrupted.

        Parameters
        ----------
        asked : Iterable[tuple[int, Iterable[int]]]
            The rounds that stay, each with the clients that were asked.
        repeated : Iterable[int]
            Rounds that were cut off. They count for everyone, and once more when they are done again:
            their replies were sent, and the noise on them is not that of the second time.
        """
        for server_round, clients in asked:
            self.count(server_round, clients)
        self._again += sum(self._cost(server_round) for server_round in repeated)

    def announce(self) -> None:
        """Log what is protected, and what is not."""
        section, rounds = self._section, self._rounds
        most = sum(self._cost(number) for number in range(1, rounds + 1))
        log(
            INFO,
            "privacy: %s, ε = %.3g at δ = %g after %d rounds for a client that takes part in all",
            section.mode,
            epsilon_of(most, section.delta),
            section.delta,
            rounds,
        )
        if section.noise == 0:
            log(WARNING, "privacy.noise = 0: updates are only clipped, and ε is infinite")
        if self.covers == "updates":
            log(
                WARNING,
                "ε covers updates, not the choice of layers: it rests on statistics of clients' data "
                "that are sent without noise; set privacy.statistics-clip and "
                "privacy.statistics-noise, or choose a strategy without a probe",
            )
