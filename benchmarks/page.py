"""Size of a run's page, seconds to write it, and seconds until Chromium has drawn it.

    python benchmarks/page.py --rounds 100 --clients 100 --layers 12 --layers 24 --json page.json

The run is made up: gradient norms and masks are drawn, which compress worse than those of a real run.
The browser is the system's Chromium; the page is opened from disk as often as `--repeat` says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]


def measure(rounds: int, clients: int, layers: int, repeat: int) -> dict[str, float]:
    """Return the figures of one page."""
    from layerfed.report import PAGE, run_view, write_page
    from tests.report.chromium import chromium, ready, watched
    from tests.report.made_folder import make_folder

    with TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch) / "run", rounds, clients, layers)
        began = time.monotonic()
        file = write_page(run_view(folder), folder / PAGE)
        written, drawn = time.monotonic() - began, []
        with chromium() as browser:
            for _ in range(repeat):
                page, bad = watched(browser)
                began = time.monotonic()
                page.goto(file.as_uri())
                ready(page)
                drawn.append(time.monotonic() - began)
                page.close()
                if bad:
                    raise SystemExit(f"the page has errors: {bad}")
        return {
            "layers": layers,
            "bytes": file.stat().st_size,
            "seconds to write": written,
            "seconds to draw": statistics.median(drawn),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--layers", type=int, action="append", help="may be repeated; default 12")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    found = [
        measure(arguments.rounds, arguments.clients, layers, arguments.repeat)
        for layers in arguments.layers or [12]
    ]
    for figures in found:
        print(" · ".join(f"{name} {value:,.3g}" for name, value in figures.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
