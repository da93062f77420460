"""Make the tables of `conf/tables/reviews.toml` from the files of FDU-MTL [Liu et al., 2017].

    python -m scripts.reviews_data FDU_MTL DATA

FDU_MTL has `DOMAIN.task.train` and `DOMAIN.task.test` with lines LABEL <tab> TEXT, as in the folder
`data/fdu-mtl` of https://github.com/ccsasuke/man. DATA gets `train.csv` with all reviews of the first,
and `test.csv` with the first hundred of each of the second.
"""

from __future__ import annotations

import csv
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

TESTED = 100


def main(
    source: Annotated[Path, typer.Argument(exists=True, file_okay=False)], target: Path
) -> None:
    """Write the two tables, with columns text, label and domain."""
    target.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", None), ("test", TESTED)):
        files = sorted(source.glob(f"*.task.{split}"))
        if not files:
            raise typer.BadParameter(f"{source} has no DOMAIN.task.{split}")
        with (target / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["text", "label", "domain"])
            for file in files:
                lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
                pairs = (line.strip().partition("\t") for line in lines)
                rows = ([text, label] for label, tab, text in pairs if tab and label in ("0", "1"))
                domain = file.name.partition(".")[0]
                table.writerows([*row, domain] for row in islice(rows, most))


if __name__ == "__main__":
    typer.run(main)
