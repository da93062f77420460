"""The cost of a secure sum by number of clients: CPU seconds of a client and of the server, and bytes.

    python benchmarks/secure_sum.py --json secure_sum.json

It measures the protocol alone, between objects of one process. All clients agree on pads and pad a
vector. Then a tenth of the clients drop out, and two thirds of all reveal their shares. The mean is
checked against the plain mean. A client's seconds are the mean over all clients; bytes are those sent
beside the vector.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from layerfed.config import SecAggConfig
from layerfed.secure.crypto import KEY_BYTES, SEALED_BYTES, SECRET_BYTES
from layerfed.secure.participant import Participant
from layerfed.secure.secure_sum import SecureSum

COLUMNS = ("clients", "agree", "pad", "unmask", "server", "extra_kb_up", "extra_kb_down")
console = Console()


class Seconds:
    """Adds up the processor time of parts of the work."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.of[part] = self.of.get(part, 0.0) + time.process_time() - began


def measure(clients: int, elements: int) -> dict[str, float]:
    """Return one row of the table."""
    seconds, rng = Seconds(), np.random.default_rng(0)
    needed = SecAggConfig().needed(clients)
    with seconds("agree"):
        members = [Participant("run/1", number) for number in range(clients)]
        keys = [member.keys() for member in members]
    total = SecureSum("run/1", needed)
    total.keys = dict(enumerate(keys))
    sealing, padding = [k.sealing for k in keys], [k.masking for k in keys]
    for member in members:
        with seconds("agree"):
            sealed = member.share_secrets(needed, range(clients), sealing, padding)
        total.take_sealed(member.own, sealed)
    point = total.begin(SecAggConfig().range, dict.fromkeys(range(clients), 100))
    exact, survivors = np.zeros(elements), clients - clients // 10
    for member in members:
        update = rng.standard_normal(elements, dtype=np.float32) / 100
        sealed = total.sealed_for(member.own)
        with seconds("pad"):
            vector, _ = point.encode([update], 100)
            member.pad(vector, total.peers, sealed)
        if member.own < survivors:
            total.add(member.own, vector)
            exact += update / survivors
    for member in members[:needed]:
        with seconds("unmask"):
            shares = member.reveal(total.survivors)
        total.take_shares(member.own, shares)
    with seconds("server"):
        mean, _ = total.open()
    assert np.abs(mean - exact).max() <= point.error(100 * survivors, survivors) + 1e-12
    up = 3 * KEY_BYTES + clients * (SEALED_BYTES + SECRET_BYTES)
    down = clients * (2 * KEY_BYTES + SEALED_BYTES + 8 + 8 + 8)
    return {
        "clients": clients,
        **{part: seconds.of[part] / clients for part in ("agree", "pad")},
        "unmask": seconds.of["unmask"] / needed,
        "server": seconds.of["server"],
        "extra_kb_up": up / 1e3,
        "extra_kb_down": down / 1e3,
    }


def main(
    clients: Annotated[list[int] | None, typer.Option(help="clients in the round")] = None,
    elements: Annotated[int, typer.Option(help="elements of an update")] = 1_000_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the table here")] = None,
) -> None:
    """Measure, print a table, and write it as JSON."""
    rows = [measure(count, elements) for count in clients or [5, 10, 20, 50]]
    table = Table(
        "clients",
        *(f"{who}, s" for who in ("client: agree", "client: pad", "client: unmask", "server")),
        "more up, kB",
        "more down, kB",
        title=f"{elements:,} elements",
    )
    for row in rows:
        table.add_row(f"{row['clients']}", *(f"{row[name]:.3g}" for name in COLUMNS[1:]))
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
