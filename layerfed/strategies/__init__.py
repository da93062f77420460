"""Who trains which layers. A strategy is one file here, one line in `STRATEGIES`, and a test."""

from __future__ import annotations

from layerfed.server.candidates import Candidates
from layerfed.server.population import RoundFailed
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.both import Both
from layerfed.strategies.bottom import Bottom
from layerfed.strategies.cyclic import Cyclic
from layerfed.strategies.fedtlu import FedTLU
from layerfed.strategies.full import Full
from layerfed.strategies.ilp import ILP
from layerfed.strategies.random import Random
from layerfed.strategies.rgn import RGN
from layerfed.strategies.snr import SNR
from layerfed.strategies.top import Top

__all__ = [
    "ILP",
    "RGN",
    "SNR",
    "STRATEGIES",
    "Both",
    "Bottom",
    "Candidates",
    "Cyclic",
    "FedTLU",
    "Full",
    "Random",
    "RoundFailed",
    "SelectiveStrategy",
    "Top",
]

STRATEGIES: dict[str, type[SelectiveStrategy]] = {
    strategy.name: strategy
    for strategy in (ILP, Full, Top, Bottom, Both, Random, Cyclic, SNR, RGN, FedTLU)
}
