"""One typed configuration: sections, the rules between them, a node's own settings, files."""

from layerfed.config.node import NodeConfig
from layerfed.config.privacy import PrivacyConfig
from layerfed.config.run import (
    TASK_NAMES,
    BudgetConfig,
    BudgetUnit,
    DeviceName,
    ExchangeConfig,
    Flat,
    ModelConfig,
    RunConfig,
    Scalar,
    ServerConfig,
    StrategyConfig,
    StrategyName,
    TaskConfig,
    TrainConfig,
    explain,
    flatten,
    load_config,
    nearest,
    parse_override,
    run_keys,
)
from layerfed.config.secagg import SecAggConfig, refuse_with_secagg
from layerfed.config.section import ConfigError, Section

__all__ = [
    "TASK_NAMES",
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
    "StrategyConfig",
    "StrategyName",
    "TaskConfig",
    "TrainConfig",
    "explain",
    "flatten",
    "load_config",
    "nearest",
    "parse_override",
    "refuse_with_secagg",
    "run_keys",
]
