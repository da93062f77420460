"""What a task's data are: examples of each class and group, of the test set and of each client."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from layerfed.task.base import Examples, Store, Task

__all__ = ["describe_data"]


def describe_data(task: Task, clients: int = 0) -> dict[str, Any]:
    """Return the content of a run's `data.json`: who holds how many examples of what.

    Parameters
    ----------
    task : Task
    clients : int (default: 0)
        The number of clients to describe, by the examples that they train on.

    Returns
    -------
    dict[str, Any]
        The names of `classes` and `groups`, which are empty if the task has none; and `test` and
        `clients`, with `examples`, the count of each class in the order of the names, and `groups`.
        Labels count for a task with several an example, and tokens for one that tags tokens.
    """
    columns: dict[int, tuple[Store, np.ndarray | None]] = {}

    def labels(examples: Examples) -> np.ndarray | None:
        # A store with all clients' examples is read once. It is held, or its id could be another's.
        store = examples.store
        if id(store) not in columns:
            found = None
            if hasattr(store, "column"):  # a store of one's own may have none
                with suppress(KeyError):  # without labels
                    found = store.column("label")
            columns[id(store)] = store, found
        found = columns[id(store)][1]
        return None if found is None else task.kind.count(found[examples.indices])

    parts = [task.test_examples(), *(task.client_examples(i)[0] for i in range(clients))]
    counts = [labels(part) for part in parts]
    known = [len(count) for count in counts if count is not None]
    classes = list(task.classes) if known else []
    classes += [str(number) for number in range(len(classes), max(known, default=0))]

    def row(examples: Examples, count: np.ndarray | None) -> dict[str, Any]:
        padded = np.zeros(len(classes), dtype=int)
        if count is not None:
            padded[: len(count)] = count
        groups = {name: len(rows) for name, rows in task.groups_of(examples).items()}
        return {"examples": len(examples), "classes": padded.tolist(), "groups": groups}

    test, *held = (row(part, count) for part, count in zip(parts, counts, strict=True))
    numbered = [{"partition": i, **content} for i, content in enumerate(held)]
    return {"classes": classes, "groups": list(task.groups), "test": test, "clients": numbered}
