"""The scripts that prepare what a table of experiments needs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import typer

from scripts import reviews_data


def test_the_reviews_become_two_tables(tmp_path: Path) -> None:
    source, target = tmp_path / "fdu", tmp_path / "data"
    source.mkdir()
    (source / "books.task.train").write_text('1\tgood , "quite"\n\nno label\n0\tbad\n')
    (source / "books.task.test").write_text("".join(f"1\ttext {i}\n" for i in range(150)))
    reviews_data.main(source, target)
    tables = {}
    for split in ("train", "test"):
        with (target / f"{split}.csv").open(newline="", encoding="utf-8") as stream:
            tables[split] = list(csv.DictReader(stream))
    assert tables["train"] == [
        {"text": 'good , "quite"', "label": "1", "domain": "books"},
        {"text": "bad", "label": "0", "domain": "books"},
    ]
    assert [row["text"] for row in tables["test"]] == [f"text {i}" for i in range(100)]


def test_a_folder_without_reviews_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"has no DOMAIN\.task\.train"):
        reviews_data.main(tmp_path, tmp_path / "data")
