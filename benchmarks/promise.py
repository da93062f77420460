"""What a statistic of a layer promises, beside what training the layer gives.

    layerfed run conf/custom.toml strategy.name=head run.name=warm …
    python -m benchmarks.promise runs/warm --clients 4 --rates 0.003,0.01,0.03 --json promise.json \
        --figure promise.png

From a run's final model, some clients train one layer and the head for a round, each layer in turn and
at several learning rates. Measured is how far the mean loss falls, beyond what the head alone gives:
on the clients' own examples (each trains for itself), and on the server's test set after their updates
are averaged (all train the layer together). A statistic of the probe is useful if it orders the layers
as these two do: printed is Spearman's rank correlation over the layers. Printed too is what the clients
reach together if each trains the layer that a statistic gives it, averaged over those that trained a
layer or over all, beside what they reach if all train the layer with the largest mean, and the layer
that turns out best for all.

The steps are those of the run's optimiser. `loss_decrease` and `newton_decrease` measure one of SGD.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from scipy.stats import spearmanr

from layerfed.client.local_optimizers import LocalAdamW, LocalSGD
from layerfed.client.probe import probe_layers
from layerfed.client.training import train_update
from layerfed.client.workbench import Workbench
from layerfed.config import load_config
from layerfed.task import Examples
from layerfed.task.scoring import evaluate_task

STATISTICS = (
    "grad_norm_sq",
    "relative_grad_sq",
    "grad_mean_sq",
    "snr",
    "grad_signal_sq",
    "loss_decrease",
    "newton_decrease",
)

# Who chooses the layer, by which statistic, and the key of what all reach together.
MASKS = (
    ("the best layer for all, known afterwards", "", "best"),
    ("one layer for all by ‖g‖²", "grad_norm_sq", "shared"),
    ("each its own by ‖g‖²", "grad_norm_sq", "together"),
    ("the same, over the cohort", "grad_norm_sq", "damped"),
    ("each its own by signal, over the cohort", "grad_signal_sq", "damped"),
)


def some_of(examples: Examples, count: int, rng: np.random.Generator) -> Examples:
    """Return so many of the examples, drawn without replacement."""
    return examples.select(np.sort(rng.permutation(len(examples))[:count]))


@contextmanager
def moved(bench: Workbench, update: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Add an update to the model within the context."""
    before = {name: bench.resident.tensors[name].detach().clone() for name in update}
    with torch.no_grad():
        for name, change in update.items():
            bench.resident.tensors[name].add_(torch.from_numpy(change))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, old in before.items():
                bench.resident.tensors[name].copy_(old)


def loss_on(bench: Workbench, examples: Examples) -> float:
    """Return the model's mean loss."""
    found = evaluate_task(bench.task, bench.resident.model, examples, 64, bench.device)
    return found.tally.mean_loss


def averaged(
    updates: Mapping[int, Mapping[str, np.ndarray]],
    sizes: Mapping[int, int],
    *,
    all_of: bool = False,
) -> dict[str, np.ndarray]:
    """Return the mean of each tensor over the clients that trained it, by their examples.

    With `all_of` the clients that did not train it count as well, with no change.
    """
    found = {}
    for name in dict.fromkeys(name for update in updates.values() for name in update):
        own = [client for client in updates if name in updates[client]]
        total = sum(sizes[client] for client in (updates if all_of else own))
        parts = [sizes[client] / total * updates[client][name] for client in own]
        if np.issubdtype(parts[0].dtype, np.floating):
            found[name] = np.asarray(np.stack(parts).sum(axis=0, dtype=np.float32))
    return found


def measured(
    bench: Workbench, clients: list[int], rates: list[float], tested: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row for each learning rate and layer, and one for each rate and statistic."""
    layers, train = bench.resident.layers, bench.config.train
    optimizer = LocalAdamW if train.optimizer == "adamw" else LocalSGD
    rng = np.random.default_rng(bench.config.run.seed)
    test = some_of(bench.task.test_examples(), tested, rng)
    own = {c: some_of(bench.examples(c)[0], tested // len(clients), rng) for c in clients}
    sizes = {c: len(bench.examples(c)[0]) for c in clients}

    def batches(client: int, draw: int) -> Iterator[Any]:
        drawn = np.random.default_rng((bench.config.run.seed, draw, client))
        return bench.examples(client)[0].shuffled(train.batch_size, bench.device, drawn)

    rows, choices = [], []
    for rate in rates:
        probes = {
            client: probe_layers(
                bench.resident.model,
                layers,
                islice(batches(client, 0), 2),
                bench.loss(client),
                STATISTICS,
                lr=rate,
            )[0]
            for client in clients
        }
        found: dict[int | None, tuple[float, float]] = {}
        updates: dict[int | None, dict[int, dict[str, np.ndarray]]] = {}
        for layer in (None, *range(layers.num_blocks)):
            mask = [index == layer for index in range(layers.num_blocks)]
            local, own_updates = [], {}
            for client in clients:
                update, _ = train_update(
                    bench.resident,
                    mask,
                    islice(batches(client, 1), train.local_steps or 5),
                    bench.loss(client),
                    partial(optimizer, lr=rate),
                )
                own_updates[client] = update
                with moved(bench, update):
                    local.append(loss_on(bench, own[client]))
            updates[layer] = own_updates
            with moved(bench, averaged(own_updates, sizes)):
                found[layer] = float(np.mean(local)), loss_on(bench, test)
        for index, block in enumerate(layers.blocks):
            row: dict[str, Any] = {"rate": rate, "layer": block.name}
            row["local"] = found[None][0] - found[index][0]
            row["together"] = found[None][1] - found[index][1]
            row |= {
                name: float(np.mean([p[name][index] for p in probes.values()]))
                for name in STATISTICS
            }
            rows.append(row)
        for name in STATISTICS:
            chosen = {client: int(np.argmax(probes[client][name])) for client in clients}
            row = {"rate": rate, "statistic": name, "chosen": chosen}
            mean = np.mean([p[name] for p in probes.values()], axis=0)
            row["shared"] = found[None][1] - found[int(np.argmax(mean))][1]
            for key, all_of in (("together", False), ("damped", True)):
                trained = {c: updates[chosen[c]][c] for c in clients}
                with moved(bench, averaged(trained, sizes, all_of=all_of)):
                    row[key] = found[None][1] - loss_on(bench, test)
            choices.append(row)
    return rows, choices


def draw(rows: list[dict[str, Any]], choices: list[dict[str, Any]], file: Path) -> None:
    """Draw what each layer gave, what its gradient's norm promised, and what masks of one's own gain."""
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.2), layout="constrained")
    for rate in rates:
        own = [row for row in rows if row["rate"] == rate]
        for axis, key in zip(axes[:2], ("local", "together"), strict=True):
            axis.plot(range(len(own)), [row[key] for row in own], marker=".", label=f"η = {rate:g}")
    own = [row for row in rows if row["rate"] == rates[0]]
    norms = np.array([row["grad_norm_sq"] for row in own])
    axes[2].bar(range(len(own)), norms / norms.sum(), color="0.6")
    axes[0].set_title("each for itself: fall of the own loss")
    axes[1].set_title("together: fall of the test loss")
    axes[2].set_title("share of ‖g‖²")
    axes[3].set_title("together, by who chooses")
    for place, (label, name, key) in enumerate(MASKS):
        heights = [c[key] for c in choices if c["statistic"] == name]
        if key == "best":
            heights = [
                max(row["together"] for row in rows if row["rate"] == rate) for rate in rates
            ]
        axes[3].bar(np.arange(len(rates)) + place / 6, heights, width=1 / 6, label=label)
    axes[3].set_xticks(np.arange(len(rates)) + 1 / 3, [f"η = {rate:g}" for rate in rates])
    for axis in axes:
        axis.axhline(0, color="0.3", lw=0.8)
    for axis in axes[:3]:
        axis.set_xlabel("layer trained beside the head")
    axes[0].legend()
    figure.legend(
        *axes[3].get_legend_handles_labels(), loc="outside right center", fontsize="small"
    )
    figure.savefig(file, dpi=110)


def main(
    run: Annotated[Path, typer.Argument(help="a finished run's folder")],
    clients: Annotated[int, typer.Option(min=1, help="clients, evenly from the population")] = 4,
    rates: Annotated[str, typer.Option(help="learning rates; empty: the run's")] = "",
    tested: Annotated[int, typer.Option(min=1, help="test examples; and own ones, in all")] = 512,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
    figure: Annotated[Path | None, typer.Option("--figure")] = None,
) -> None:
    """Measure, print the correlations, and write the rows."""
    bench = Workbench(load_config(run / "config.json"))
    torch.set_num_threads(bench.config.run.threads or torch.get_num_threads())
    with torch.no_grad():
        for name, tensor in load_file(run / "final.safetensors").items():
            bench.resident.tensors[name].copy_(tensor)
    population = bench.config.federation.population
    chosen = [population * i // clients for i in range(clients)]
    train = bench.config.train
    if train.momentum:
        raise SystemExit("the run has momentum, and steps without it are measured here")
    values = [float(rate) for rate in rates.split(",") if rate] or [train.lr]
    rows, choices = measured(bench, chosen, values, tested)
    table = Table("η", "statistic", "each for itself", "together")
    for rate in values:
        own = [row for row in rows if row["rate"] == rate]
        for name in (*STATISTICS, "local"):
            ranks = [
                float(spearmanr([r[name] for r in own], [r[key] for r in own]).statistic)
                for key in ("local", "together")
            ]
            table.add_row(f"{rate:g}", name, *(f"{rank:+.2f}" for rank in ranks))
    Console().print(table)
    masks = Table("η", "each trains its largest", "layers", "together", "over all")
    masks.add_column("its largest mean for all")
    masks.add_column("best for all")
    for choice in choices:
        own = [row for row in rows if row["rate"] == choice["rate"]]
        best = max(own, key=lambda row: float(row["together"]))
        layers = ", ".join(str(layer) for layer in choice["chosen"].values())
        shared = f"{best['layer']}: {best['together']:+.4f}"
        masks.add_row(
            f"{choice['rate']:g}",
            choice["statistic"],
            layers,
            f"{choice['together']:+.4f}",
            f"{choice['damped']:+.4f}",
            f"{choice['shared']:+.4f}",
            shared,
        )
    Console().print(masks)
    if json_file:
        found = {"layers": rows, "choices": choices}
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if figure:
        draw(rows, choices, figure)


if __name__ == "__main__":
    typer.run(main)
