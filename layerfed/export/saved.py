"""A finished run, opened again: its task, and its model with the layers that the run changed."""

from __future__ import annotations

from dataclasses import dataclass
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.common.logger import log
from safetensors import SafetensorError, safe_open
from torch import nn

from layerfed.client.resident import ResidentModel
from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.digests import digest
from layerfed.exchange.messages import Manifest
from layerfed.models.layers import LayerMap
from layerfed.runs.files import read_json, read_lines
from layerfed.task import Task, load_task

__all__ = ["SavedRun"]


@dataclass(frozen=True)
class SavedRun:
    """A run that has its final model.

    Attributes
    ----------
    folder : Path
    config : RunConfig
    task : Task
    model : torch.nn.Module
        The base with the changed layers of the chosen round, in evaluation mode.
    layers : LayerMap
    round : int
        The round after which the model was this one.
    """

    folder: Path
    config: RunConfig
    task: Task
    model: nn.Module
    layers: LayerMap
    round: int

    @classmethod
    def open(cls, folder: Path, *, best: bool = False) -> SavedRun:
        """Load the base that the run's configuration names, and put the changed layers into it.

        Parameters
        ----------
        folder : Path
            The run folder.
        best : bool
            Whether to take the best round's layers instead of the last round's.

        Raises
        ------
        ConfigError
            If the folder holds no finished run, no best model, or a damaged one, or if the base is not
            the one that the run began with.
        """
        file = folder / ("best.safetensors" if best else "final.safetensors")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is no run folder: it has no config.json")
        if not file.is_file():
            raise ConfigError(
                f"{folder} has no {file.name}"
                + (
                    "; leave out --best for the last round's model"
                    if best and (folder / "final.safetensors").is_file()
                    else f": the run has not ended; finish it by layerfed run --resume {folder}"
                )
            )
        config = load_config(folder / "config.json")
        task = load_task(config)
        try:
            task.recall(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{folder} lacks what the task needs of it: {error}") from None
        try:
            with safe_open(file, framework="numpy") as stored:
                about = {"round": "", "base": "", **(stored.metadata() or {})}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} is damaged: {error}") from None
        if not about["round"].isdigit() or not about["base"]:
            raise ConfigError(f"{file} is damaged: its header lacks the round or the base")
        cpu = torch.device("cpu")
        resident = ResidentModel(task.build_model, task.layers, cpu, "float32", task.adapted)
        if about["base"] != resident.base:
            raise ConfigError(
                f"model.weights = '{config.model.weights}' now holds another base ({resident.base}) "
                f"than the run {folder} began with ({about['base']}); put the former weights there"
            )
        digests = {
            layer.name: digest({name: tensors[name] for name in layer.tensors})
            if layer.tensors and layer.tensors[0] in tensors
            else resident.base_version(layer.name)
            for layer in resident.layers.layers
        }
        resident.move_to(Manifest(resident.base, digests), tensors)
        if personal := sorted(resident.layers.personal):
            log(
                WARNING,
                "model.personal: %s stayed on the clients; here they are as the run began",
                ", ".join(personal),
            )
        if config.model.storage not in ("checkpoint", "float32"):
            log(
                WARNING,
                "model.storage = '%s': the run scored its model with frozen layers in that type; here "
                "they are as in the checkpoint, so scores may differ",
                config.model.storage,
            )
        if config.model.personal_rank:
            log(WARNING, "model.personal-rank: second adapters stayed on the clients; none is here")
        round_ = int(about["round"])
        return cls(folder, config, task, resident.model.eval(), resident.layers, round_)

    def rounds(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`."""
        return read_lines(self.folder / "metrics.jsonl")

    def read(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the run folder; empty if this run has none."""
        file = self.folder / name
        return read_json(file) if file.is_file() else {}
