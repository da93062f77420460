"""Strategies: which client trains which layers. Each is one file, one entry in `STRATEGIES`, and a test.

A strategy of your own can be in any module: `strategy.name = "my_package.my_module:MyStrategy"`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from layerfed.config import (
    ConfigError,
    RunConfig,
    StrategyConfig,
    nearest,
    nearest_key,
    refuse_different_masks,
    section_keys,
)
from layerfed.strategies.base import Masks, RoundSettings, SelectiveStrategy
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
    "Cyclic",
    "FedTLU",
    "Full",
    "Masks",
    "Random",
    "RoundSettings",
    "SelectiveStrategy",
    "Top",
    "checked",
    "load_strategy",
    "option_keys",
    "options_of",
]

STRATEGIES: dict[str, type[SelectiveStrategy]] = {
    strategy.name: strategy
    for strategy in (ILP, Full, Top, Bottom, Both, Random, Cyclic, SNR, RGN, FedTLU)
}


def load_strategy(name: str) -> type[SelectiveStrategy]:
    """Return the strategy class of a name, from `STRATEGIES` or as `module:Class`.

    Raises
    ------
    ConfigError
        If there is no such strategy, module or class, or the class is not a strategy.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"strategy.name = '{name}' is not allowed: it should be one of {', '.join(STRATEGIES)}, or "
            f"a strategy of your own as module:Class{nearest(name, STRATEGIES)}"
        )
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"strategy.name = '{name}' cannot be imported: {error}; its module must be installed where "
            "the server runs, or lie in the current folder"
        ) from None
    if not (isinstance(found, type) and issubclass(found, SelectiveStrategy)):
        raise ConfigError(
            f"strategy.name = '{name}' is not a subclass of layerfed.strategies.SelectiveStrategy"
        )
    if getattr(found, "__abstractmethods__", None):
        raise ConfigError(
            f"strategy.name = '{name}' does not say how it selects: override `select`"
        )
    if not hasattr(found, "name"):
        found.name = attribute
    return found


def option_keys() -> dict[str, str]:
    """Return the options of all built-in strategies: {key: the strategy's name}."""
    return {
        key: name
        for name, strategy in STRATEGIES.items()
        for key in section_keys(strategy.Options, "strategy.")
    }


def options_of(config: RunConfig) -> tuple[type[SelectiveStrategy], Any]:
    """Return the strategy that a configuration names, and its checked options.

    Options of the other built-in strategies are checked too and otherwise ignored, so that one file
    serves all strategies.

    Raises
    ------
    ConfigError
        If the strategy or a key is unknown, or a value is not allowed.
    """
    strategy = load_strategy(config.strategy.name)
    own = section_keys(strategy.Options)
    given = config.strategy.given
    known = [*section_keys(StrategyConfig, "strategy."), *option_keys()]
    known += [f"strategy.{key}" for key in own]
    if unknown := [key for key in given if f"strategy.{key}" not in known]:
        key = f"strategy.{unknown[0]}"
        raise ConfigError(
            f"unknown key '{key}'; strategy.name = '{config.strategy.name}' reads "
            f"{', '.join(own) or 'no options'}{nearest_key(key, known)}"
        )
    for other in STRATEGIES.values():
        names = set(section_keys(other.Options)) - set(own)
        other.read_options({k: v for k, v in given.items() if k in names})
    return strategy, strategy.read_options({k: v for k, v in given.items() if k in own})


def checked(config: RunConfig) -> RunConfig:
    """Check a configuration against its strategy; return it with the strategy's options filled in.

    Raises
    ------
    ConfigError
        If the strategy, its options, or other settings of the run are not allowed together.
    """
    strategy, options = options_of(config)
    strategy.refuse(options, config)
    filled = {f"strategy.{k}": v for k, v in options.model_dump(by_alias=True).items()}
    flat = config.to_flat() | filled
    refuse_different_masks(flat, strategy.masks_with(options))
    return RunConfig.from_flat(flat)
