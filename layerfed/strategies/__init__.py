"""Strategies: which client trains which layers. Each is one file, one entry in `STRATEGIES`, and a test.

A strategy of your own can be in any module: `strategy.name = "my_package.my_module:MyStrategy"`.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, get_args

from layerfed.config import (
    ConfigError,
    RunConfig,
    StrategyConfig,
    imported,
    nearest,
    nearest_key,
    refuse_different_masks,
    section_keys,
)
from layerfed.strategies.base import Masks, SelectiveStrategy
from layerfed.strategies.both import Both
from layerfed.strategies.bottom import Bottom
from layerfed.strategies.cyclic import Cyclic
from layerfed.strategies.f3ocus import F3OCUS
from layerfed.strategies.fed_hello import FedHeLLo
from layerfed.strategies.fedbcgd import FedBCGD
from layerfed.strategies.fedluar import FedLUAR
from layerfed.strategies.fedtlu import FedTLU
from layerfed.strategies.full import Full
from layerfed.strategies.head import Head
from layerfed.strategies.ilp import ILP
from layerfed.strategies.random import Random
from layerfed.strategies.ranks import Ranks
from layerfed.strategies.rgn import RGN
from layerfed.strategies.settings import RoundSettings
from layerfed.strategies.snr import SNR
from layerfed.strategies.top import Top

__all__ = [
    "F3OCUS",
    "ILP",
    "RGN",
    "SNR",
    "STRATEGIES",
    "Both",
    "Bottom",
    "Cyclic",
    "FedBCGD",
    "FedHeLLo",
    "FedLUAR",
    "FedTLU",
    "Full",
    "Head",
    "Masks",
    "Random",
    "Ranks",
    "RoundSettings",
    "SelectiveStrategy",
    "Top",
    "checked",
    "load_strategy",
    "option_defaults",
    "option_keys",
    "options_of",
]

STRATEGIES: dict[str, type[SelectiveStrategy]] = {
    strategy.name: strategy
    for strategy in (
        *(ILP, Full, Head, Top, Bottom, Both, Random, Cyclic, SNR, RGN),
        *(F3OCUS, FedHeLLo, FedTLU, FedLUAR, FedBCGD, Ranks),
    )
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
    if ":" not in name:
        raise ConfigError(
            f"strategy.name = '{name}' is not allowed: it should be one of {', '.join(STRATEGIES)}, or "
            f"a strategy of your own as module:Class{nearest(name, STRATEGIES)}"
        )
    found = imported(name, "strategy.name")
    if not (isinstance(found, type) and issubclass(found, SelectiveStrategy)):
        raise ConfigError(
            f"strategy.name = '{name}' is not a subclass of layerfed.strategies.SelectiveStrategy"
        )
    if getattr(found, "__abstractmethods__", None):
        raise ConfigError(
            f"strategy.name = '{name}' does not say how it selects: override `select`"
        )
    if found.masks not in get_args(Masks):
        raise ConfigError(
            f"strategy.name = '{name}': masks = {found.masks!r} is not allowed: it should be one of "
            f"{', '.join(get_args(Masks))}"
        )
    if isinstance(found.statistics, str):
        raise ConfigError(
            f"strategy.name = '{name}': statistics = '{found.statistics}' should be a tuple of names, "
            f"as in ('{found.statistics}',)"
        )
    if "name" not in vars(found):
        found.name = found.__name__
    _refuse_options(found)
    return found


def _refuse_options(strategy: type[SelectiveStrategy]) -> None:
    """Refuse options of a user's strategy whose keys mean something else already."""
    taken = {*StrategyConfig.model_fields, *signature(SelectiveStrategy).parameters}
    ours = {k: f for other in STRATEGIES.values() for k, f in other.Options.model_fields.items()}
    for name, field in strategy.Options.model_fields.items():
        if name in taken:
            raise ConfigError(f"{strategy.name}: no option can be called '{name}'; it is taken")
        if name in ours and field.default != ours[name].default:
            raise ConfigError(
                f"{strategy.name}: the option '{name}' is another strategy's, with the default "
                f"{ours[name].default!r}, which `flwr run` fills in; call yours something else"
            )
        if field.default is not None and not isinstance(field.default, str | int | float | bool):
            found = "has none" if field.is_required() else f"is {field.default!r}"
            raise ConfigError(
                f"{strategy.name}: the option '{name}' needs a default that is a text, a number or a "
                f"boolean, or None; it {found}"
            )


def option_keys() -> dict[str, str]:
    """Return the options of all built-in strategies: {key: the strategy's name}."""
    return {
        key: name
        for name, strategy in STRATEGIES.items()
        for key in section_keys(strategy.Options, "strategy.")
    }


def option_defaults(name: str) -> dict[str, Any]:
    """Return the defaults of one strategy's options, by key."""
    fields = load_strategy(name).Options.model_fields
    return {f"strategy.{k.replace('_', '-')}": field.default for k, field in fields.items()}


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
    own, section = section_keys(strategy.Options), config.strategy
    common = [*section_keys(StrategyConfig, "strategy."), *option_keys()]
    known = [*common, *(f"strategy.{key}" for key in own)]
    for words, allowed in ((section.keys, known), (section.own, known[len(common) :])):
        for key in (f"strategy.{word}" for word in words):
            if key not in allowed:
                raise ConfigError(
                    f"unknown key '{key}'; strategy.name = '{section.name}' reads "
                    f"{', '.join(own) or 'no options'}{nearest_key(key, known)}"
                )
    if twice := [k for k, v in section.own.items() if section.keys.get(k, v) != v and k in own]:
        raise ConfigError(
            f"strategy.{twice[0]} = {section.keys[twice[0]]!r}, and strategy.options says "
            f"{section.own[twice[0]]!r}; give it once"
        )
    for other in STRATEGIES.values():
        names = set(section_keys(other.Options)) - set(own)
        other.read_options({k: v for k, v in section.keys.items() if k in names})
    given = {**section.keys, **section.own}
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
    filled = options.model_dump(by_alias=True, exclude_none=True)
    flat = config.to_flat() | {f"strategy.{k}": v for k, v in filled.items()}
    flat["strategy.options"] = ""
    refuse_different_masks(flat, strategy.masks_with(options))
    return RunConfig.from_flat(flat)
