"""The privacy account of a run: ε at δ, for the client that was asked most often.

Two federations are neighbours if all data of *one client* are exchanged for any other data (replace-one,
at the level of clients). The exchange moves a vector that is clipped to C by at most 2C. So noise of z·C
is a Gaussian mechanism of noise multiplier z/2. In local mode it acts on a client's own update, and in
central mode on the sum.

A client that was asked k times went through k mechanisms, one after the other. They equal exactly one
mechanism of multiplier z/(2√k) (Dong, Roth and Su, *Gaussian differential privacy*, 2022). Its ε is
known in closed form (Balle and Wang, *Improving the Gaussian mechanism*, 2018), and Google's
dp-accounting computes it. Each noised statistic of a probe is one more mechanism of the client.

LayerFed claims no amplification by sampling, which would need a secret sample. The cohort follows from
`run.seed`, which every client is told. Even with a secret seed, the layers that move would reveal who
took part if budgets or random masks differ between clients.
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
        Σ_j s_j⁻² over the noise multipliers s_j, each the standard deviation over the sensitivity.
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
    return (2.0 / noise) * (2.0 / noise) if noise > 0 else math.inf


class PrivacyAccount:
    """Counts the privacy that each client has spent.

    The account depends only on the settings and on the clients that were asked in each round, so a
    resumed run restores it from its ledger. Every client that was asked counts, with or without a usable
    answer.

    Parameters
    ----------
    section : PrivacyConfig
    probed : Callable[[int], Iterable[str]]
        Returns the statistics of their data that clients are asked for in a round.
    rounds : int
        The rounds of the whole run.

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
        """Return the number of statistics of their data that clients are asked for in a round."""
        return len(set(self._probed(server_round)))

    def _cost(self, server_round: int) -> float:
        """Return a client's spending in a round: Σ s⁻² of its update and its statistics."""
        cost = _precision(self._section.noise)
        if self._section.statistics_noise > 0:
            cost += self._private_in(server_round) * _precision(self._section.statistics_noise)
        return cost

    @property
    def epsilon(self) -> float:
        """ε of the client that has spent most so far; infinite without noise."""
        worst = max(self._spent.values(), default=0.0) + self._again
        return epsilon_of(worst, self._section.delta)

    def count(self, server_round: int, clients: Iterable[int]) -> None:
        """Count a round for the clients (partition ids) that were asked in it."""
        for client in clients:
            self._spent[client] += self._cost(server_round)

    def recall(
        self, asked: Iterable[tuple[int, Iterable[int]]], repeated: Iterable[int] = ()
    ) -> None:
        """Count the rounds of a run before it was interrupted.

        Parameters
        ----------
        asked : Iterable[tuple[int, Iterable[int]]]
            The finished rounds, each with the clients that were asked.
        repeated : Iterable[int]
            Rounds that were cut off. They count for every client, and count again when they are
            repeated: their replies were sent, and the second time has new noise.
        """
        for server_round, clients in asked:
            self.count(server_round, clients)
        self._again += sum(self._cost(server_round) for server_round in repeated)

    def announce(self) -> None:
        """Log the final ε, and warn of updates or statistics that it does not cover."""
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
                "ε covers updates, not the choice of layers, which uses statistics of clients' data "
                "that are sent without noise; set privacy.statistics-clip and "
                "privacy.statistics-noise, or choose a strategy without a probe",
            )
