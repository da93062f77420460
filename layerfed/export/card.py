"""The model card of an exported model: what it was trained on and how, its scores, and its licence."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from layerfed.config.errors import naming_extras
from layerfed.export.saved import SavedRun
from layerfed.models.source import HUB_ID

__all__ = ["model_card"]

# Packages with the models that `model.name` names for tasks that read neither images nor texts of files.
OURS = ("layerfed", "layerfed_assets")
PIPELINES = {
    "image": "image-classification",
    "text": "text-classification",
    "prompt": "text-generation",
}


def model_card(saved: SavedRun, library: str, code: str) -> str:
    """Return the card, in the hub's form: metadata in YAML, then Markdown.

    Parameters
    ----------
    saved : SavedRun
    library : str
        The name of the library that loads the model.
    code : str
        Lines of Python that load it.
    """
    with naming_extras("the model card"):
        from huggingface_hub import ModelCardData
    base = _hub_id(saved)
    licence = _licence(saved, base)
    data = ModelCardData(
        license=licence,
        library_name=library,
        base_model=base,
        pipeline_tag=PIPELINES.get(str(saved.task.preprocessing().get("input"))),
        tags=["federated-learning", "layerfed"],
    )
    config = saved.config
    model = _model_name(saved)
    title = f"{model}, fine-tuned on {config.task.name}"
    parts = {
        "Use": f"```python\n{code}\n```\n\n{_inputs(saved)}",
        "Data": "\n".join(f"- {line}" for line in _data(saved)),
        "Training": "\n".join(f"- {line}" for line in _training(saved)),
        "Scores": _scores(saved),
        "Privacy": _privacy(saved),
        "Licence of the base": (
            f"{licence}, of {base or model}"
            if licence
            else "Not known here"
            + (f"; see https://huggingface.co/{base}" if base else "; ask who made the weights")
        )
        + ".",
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in parts.items())
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{body}\n"


def _inputs(saved: SavedRun) -> str:
    made = saved.task.preprocessing()
    said = f"`classes.json` has the order of the classes and the preprocessing. {_sentence(saved)}"
    if made.get("input") == "image" and made["crop"] != made["size"]:
        side = f"{made['crop']}×{made['crop']}"
        said += f" The run first reduced images to {side}; do so too, or scores differ."
    return said.strip()


def _sentence(saved: SavedRun) -> str:
    summary = saved.task.summary()
    return f"{summary[:1].upper()}{summary[1:]}." if summary else ""


def _data(saved: SavedRun) -> Iterator[str]:
    section, held = saved.config.task, saved.read("data.json")
    # A path would tell about the machine, and nothing about the data.
    name = os.path.basename(section.data) if os.path.isabs(section.data) else section.data
    yield f"Task `{section.name}`" + (f", data `{name}`" if name else "")
    yield f"Classes: {', '.join(saved.task.classes) or 'none'}"
    yield f"Spread over {saved.config.federation.population} clients by `{section.partition}`" + (
        f" (α = {section.alpha:g})" if section.partition == "dirichlet" else ""
    )
    if groups := held.get("groups"):
        yield f"Groups: {', '.join(groups)}"
    if clients := held.get("clients"):
        counts = [client["examples"] for client in clients]
        yield (
            f"{sum(counts):,} training examples, {min(counts):,} to {max(counts):,} a client; "
            f"{held['test']['examples']:,} test examples"
        )
    if fingerprint := saved.read("summary.json").get("data"):
        yield f"Fingerprint of the data: `{fingerprint}`"


def _training(saved: SavedRun) -> Iterator[str]:
    config, summary = saved.config, saved.read("summary.json")
    federation, train, budget = config.federation, config.train, config.budget
    yield (
        f"Round {saved.round} of {summary.get('rounds', federation.rounds)}, with "
        f"{federation.cohort} clients a round"
    )
    yield f"Strategy `{config.strategy.name}`, of {saved.layers.num_blocks} selectable layers"
    size = (
        f"{budget.layers:g}"
        if budget.kind == "identical"
        else f"{budget.min:g} to {budget.max:g}"
        if budget.kind == "half-normal"
        else "each node's own"
    )
    yield f"Budgets ({budget.kind}): {size} {budget.unit}"
    steps = f"{train.local_steps} steps" if train.local_steps else f"{train.local_epochs} epochs"
    head = f" ({train.head_lr:g} for the head)" if train.head_lr else ""
    yield (
        f"{train.optimizer}, learning rate {train.lr:g}{head}, {steps} a round in batches of "
        f"{train.batch_size}"
    )
    base = saved.read("layers.json").get("base", {})
    yield f"Base: `{_model_name(saved)}`, fingerprint `{base.get('fingerprint', 'not recorded')}`"


def _scores(saved: SavedRun) -> str:
    """Return the scores on the server's test set, and their spread over groups and clients."""
    summary, found = saved.read("summary.json"), saved.read("evaluation.json")
    if found.get("round") != saved.round:
        lines = saved.rounds()
        row = next((row for row in lines if row["round"] == saved.round), {})
        found = {"scores": row.get("scores") or {"accuracy": row.get("accuracy")}, **found}
        if row:
            found = {"scores": found["scores"], "groups": row.get("groups", {})}
    name = summary.get("metric", {}).get("name", "accuracy")
    rows = [f"| {key} | {_number(value)} |" for key, value in found["scores"].items()]
    table = "\n".join(["| test set | score |", "|---|---|", *rows])
    spread = []
    for what, by in (
        ("groups", {g: row.get(name) for g, row in found.get("groups", {}).items()}),
        (
            "clients' held-out examples",
            {str(row["partition"]): row.get(name) for row in found.get("clients", [])},
        ),
    ):
        values = [value for value in by.values() if value is not None]
        if len(values) > 1:
            spread.append(
                f"{name} over {len(values)} {what}: {_number(mean(values))} ± "
                f"{_number(stdev(values))}, from {_number(min(values))} to {_number(max(values))}."
            )
    return "\n\n".join([table, *spread])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _privacy(saved: SavedRun) -> str:
    mode, summary = saved.config.privacy.mode, saved.read("summary.json")
    secure = (
        "Secure aggregation: the server saw sums of updates only. " * saved.config.secagg.enabled
    )
    if mode == "none":
        return f"{secure}No differential privacy."
    return (
        f"{secure}Differential privacy, {mode}: ε = {summary.get('epsilon')} at δ = "
        f"{summary.get('delta')}, which covers {summary.get('epsilon_covers')}."
    )


def _hub_id(saved: SavedRun) -> str | None:
    """Return the hub's repository of the base, if the configuration names one."""
    section = saved.config.model
    net: Any = getattr(saved.model, "net", None)
    if section.weights == "pretrained":
        known = (getattr(net, "pretrained_cfg", None) or {}).get("hf_hub_id")
        return section.architecture if section.family == "transformers" else known
    if section.weights in ("random", "embedded") or os.path.exists(section.weights):
        return None
    return section.weights if "/" in section.weights and HUB_ID.fullmatch(section.weights) else None


def _model_name(saved: SavedRun) -> str:
    """Return `model.name`, unless the task builds a model of its own and does not read it."""
    named = saved.config.model.name
    own = not saved.task.reads and type(saved.model).__module__.partition(".")[0] not in OURS
    return f"the model of {saved.config.task.name}" if own else named


def _licence(saved: SavedRun, base: str | None) -> str | None:
    """Return the licence of the base, as its library or its own card states it."""
    section, net = saved.config.model, getattr(saved.model, "net", None)
    if section.family == "layerfed":
        return "apache-2.0" if _model_name(saved) == section.name else None
    if section.weights == "random":
        return None
    stated: Mapping[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    if stated.get("license") and section.weights == "pretrained":
        return str(stated["license"])
    from huggingface_hub import ModelCard, try_to_load_from_cache

    card = Path(section.weights) / "README.md"
    if base is not None:
        cached = try_to_load_from_cache(base, "README.md")
        card = Path(cached) if isinstance(cached, str) else card
    if not card.is_file():
        return None
    read = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    found = getattr(read.data, "license", None)
    return str(found) if found else None
