"""The typed configuration: its sections, the rules between them, a node's own settings, and files."""

from layerfed.config.node import NodeConfig
from layerfed.config.paths import expanded
from layerfed.config.privacy import PrivacyConfig
from layerfed.config.reading import flatten, load_config, overridden, shipped
from layerfed.config.run import (
    FAMILIES,
    BudgetConfig,
    BudgetUnit,
    ExchangeConfig,
    Flat,
    ModelConfig,
    RunConfig,
    Scalar,
    ServerConfig,
    Storage,
    StrategyConfig,
    TaskConfig,
    TrainConfig,
    run_keys,
)
from layerfed.config.secagg import SecAggConfig, refuse_different_masks, refuse_with_secagg
from layerfed.config.section import (
    ConfigError,
    DeviceName,
    Section,
    explain,
    imported,
    nearest,
    nearest_key,
    parse_override,
    section_keys,
)

__all__ = [
    "FAMILIES",
    "BudgetConfig",
    "BudgetUnit",
    "ConfigError",
    "DeviceName",
    "ExchangeConfig",
    "Flat",
    "ModelConfig",
    "NodeConfig",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "SecAggConfig",
    "Section",
    "ServerConfig",
    "Storage",
    "StrategyConfig",
    "TaskConfig",
    "TrainConfig",
    "expanded",
    "explain",
    "flatten",
    "imported",
    "load_config",
    "nearest",
    "nearest_key",
    "overridden",
    "parse_override",
    "refuse_different_masks",
    "refuse_with_secagg",
    "run_keys",
    "section_keys",
    "shipped",
]
