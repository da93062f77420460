"""`layerfed doctor`: looks at this machine and at a configuration, and says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from layerfed.config import RunConfig
from layerfed.doctor import flower, machine
from layerfed.doctor.credentials import credential_files
from layerfed.doctor.finding import Check, Finding, examine
from layerfed.doctor.job import tried

__all__ = ["Finding", "findings"]

# Seconds of one check of the machine; torch alone may take several to import.
SECONDS = 30.0


def findings(config: RunConfig | None, federation: Path, seconds: float) -> Iterator[Finding]:
    """Yield what is found, check by check. Nothing is changed, and every check ends.

    Parameters
    ----------
    config : RunConfig | None
        The configuration whose data, model and costs are looked at.
    federation : Path
        The folder of a federation on its server, with certificates; it need not exist.
    seconds : float
        The most that looking at the configuration may take.
    """
    checks: dict[str, Check] = {
        "python": machine.python,
        "packages": machine.packages,
        "torch": machine.torch_build,
        "gpu": machine.gpus,
        "memory": machine.memory,
        "disk": machine.disks,
        "ray": machine.ray,
        "flower": flower.flower_version,
        "flwr run": flower.installing,
        "flower home": flower.flower_home,
        "superlink": flower.superlinks,
        "ports": flower.ports,
        "credentials": partial(credential_files, federation),
    }
    yield from examine(checks, SECONDS)
    if config is not None:
        yield from tried(config, seconds)
