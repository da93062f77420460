"""The device that a process works on."""

from __future__ import annotations

import os

import torch

from layerfed.config import ConfigError

__all__ = ["autocast", "choose_device", "chosen_precision", "synchronize", "wide"]


def choose_device(name: str) -> torch.device:
    """Return the device that `run.device` names, with its number.

    Ray shows each client's process only the card that it was given, as number 0. `cuda:1` is then this
    card if it is the machine's number 1.

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
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if str(index) not in visible[:there]:
            raise ConfigError(
                f"run.device = '{name}', but this process sees {there} CUDA devices"
                f"{f' (number {visible[0]} of the machine)' if visible[0] else ''}; use run.device=cuda "
                f"and start the run with CUDA_VISIBLE_DEVICES={index}"
            )
        index = visible.index(str(index))
    return torch.device("cuda", index)


def chosen_precision(asked: str, device: torch.device) -> str:
    """Return the precision that `train.precision` names; "auto" is bfloat16 where the device has it.

    A GPU or processor that only emulates bfloat16 is several times slower in it than in float32.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Asked by name, since not every version of torch has them.
        units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_arm_bf16_supported")
        fast = any(getattr(torch.cpu, unit, bool)() for unit in units)
    else:
        fast = False
    return "bfloat16" if fast else "float32"


def wide(device: torch.device) -> torch.dtype:
    """Return the type for sums of many numbers: float64, or float32 where a device has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context for mixed precision; weights and updates stay in float32."""
    kind = "cpu" if device.type == "meta" else device.type  # which has none
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16")
