"""The server: a LayerFed strategy, started like any Flower strategy."""

from __future__ import annotations

from logging import INFO

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from layerfed.client.training import evaluate
from layerfed.exchange import open_store
from layerfed.models.layers import LayerMap
from layerfed.strategies import ILP, RoundSettings
from own_app.task import build_model, loader, logits, server_items

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Fine-tune the model, and save it if `save-to` is set."""
    run = context.run_config
    model = build_model()

    def evaluate_globally(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        accuracy, loss = evaluate(model, loader(server_items(), 256), logits)
        log(INFO, "round %d: test accuracy %.3f", server_round, accuracy)
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    strategy = ILP(
        LayerMap.from_model(model),
        budget=float(run["budget"]),
        # In a simulation the clients read it too, so no layer is sent.
        store=open_store(),
        settings=RoundSettings(client_evaluation=True, seed=int(run["seed"])),
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=int(run["num-server-rounds"]),
        train_config=ConfigRecord({"lr": float(run["lr"])}),
        evaluate_fn=evaluate_globally,
    )
    if run["save-to"]:
        torch.save(result.arrays.to_torch_state_dict(), str(run["save-to"]))
