"""The device that a process works on."""

from __future__ import annotations

import torch

from layerfed.config import ConfigError

__all__ = ["choose_device", "synchronize"]


def choose_device(name: str) -> torch.device:
    """Return the device that `run.device` names, with its number.

    Raises
    ------
    ConfigError
        If this machine, or this process, does not have it.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if there else "cpu"
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("run.device = 'mps', but there is no such device; use auto or cpu")
    if device.type != "cuda":
        return device
    if not there:
        raise ConfigError(f"run.device = '{name}', but there is no CUDA device; use auto or cpu")
    index = device.index or 0
    if index >= there:
        raise ConfigError(
            f"run.device = '{name}', but this process sees {there} CUDA devices, cuda:0 to "
            f"cuda:{there - 1}; use auto"
        )
    return torch.device("cuda", index)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
