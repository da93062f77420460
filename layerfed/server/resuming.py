"""A strategy's state as a checkpoint, and back."""

from __future__ import annotations

from logging import WARNING

from flwr.common.logger import log

from layerfed.config import ConfigError
from layerfed.runs.checkpoint import Checkpoint
from layerfed.server.global_model import GlobalModel
from layerfed.server.memory import Memory
from layerfed.server.optimizers import ServerOptimizer

__all__ = ["check_base", "check_data", "restore", "take"]

MEMORY, OPTIMIZER = "memory", "optimizer"


def take(
    server_round: int,
    run_token: str,
    model: GlobalModel,
    optimizer: ServerOptimizer,
    memory: Memory,
) -> Checkpoint:
    """Return a run's state after a round. Arrays are shared, not copied."""
    state = {f"{MEMORY}/{name}": array for name, array in memory.state().items()}
    for moment, tensors in optimizer.state.items():
        state |= {f"{OPTIMIZER}/{moment}/{name}": array for name, array in tensors.items()}
    base = model.manifest().base
    return Checkpoint(server_round, base, run_token, model.changed_tensors, state)


def check_base(checkpoint: Checkpoint, base: str) -> None:
    """Refuse a checkpoint of another pretrained model than the one of this fingerprint.

    Raises
    ------
    ConfigError
        If the fingerprints differ; the message names both.
    """
    if checkpoint.base != base:
        raise ConfigError(
            f"the checkpoint belongs to another pretrained model ({checkpoint.base}) than this run's "
            f"({base}); resume with the weights that the run began with"
        )


def check_data(checkpoint: Checkpoint, data: str, where: str) -> None:
    """Refuse a checkpoint of a run on other data than those of this fingerprint.

    Raises
    ------
    ConfigError
        Naming where the data lie.
    """
    if not checkpoint.data:
        log(WARNING, "the checkpoint does not say on which data it was made; nothing checks them")
    elif checkpoint.data != data:
        raise ConfigError(
            f"the checkpoint was made on other data ({checkpoint.data}) than {where} now holds "
            f"({data}); resume with the data that the run began with, or start a new run"
        )


def restore(
    checkpoint: Checkpoint, model: GlobalModel, optimizer: ServerOptimizer, memory: Memory
) -> None:
    """Set a new model, optimiser and memory to the state of a checkpoint.

    Raises
    ------
    ConfigError
        If the checkpoint belongs to another pretrained model.
    """
    check_base(checkpoint, model.manifest().base)
    for layer in model.layers.layers:
        if layer.tensors and all(tensor in checkpoint.layers for tensor in layer.tensors):
            model.replace(layer.name, {t: checkpoint.layers[t] for t in layer.tensors})
    remembered = {}
    for key, array in checkpoint.state.items():
        part, _, rest = key.partition("/")
        if part == MEMORY:
            remembered[rest] = array
        else:
            moment, _, tensor = rest.partition("/")
            optimizer.state[moment][tensor] = array
    memory.restore(remembered)
