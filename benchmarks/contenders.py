"""Ways to run the same rounds: LayerFed, the bare loop, and peers written as in their documentation.

Each function runs a workload and returns the seconds of each round. It is called in a process of its
own, so that it does not affect the others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from workloads import WORKLOADS, Workload, local_sgd

from layerfed.engine import Engine, run_on
from layerfed.runs import read_lines
from layerfed.task import Examples, Task

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------- ours
def _ours(engine: Engine, workload: Workload, rounds: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        config = workload.config(
            f"federation.rounds={rounds}", f"run.dir={folder}", "run.threads=1"
        )
        path = run_on(engine, config)
        lines = read_lines(path / "metrics.jsonl")
    # The bare loop and the peers do not evaluate.
    return [line["seconds"] - line["seconds_by_phase"]["evaluate"] for line in lines]


def in_process(workload: Workload, rounds: int) -> list[float]:
    """LayerFed's in-process engine."""
    return _ours("inprocess", workload, rounds)


def ray_engine(workload: Workload, rounds: int) -> list[float]:
    """LayerFed on Flower's Ray simulation."""
    return _ours("ray", workload, rounds)


# -------------------------------------------------------------------------------------- the floor
def bare(workload: Workload, rounds: int) -> list[float]:
    """No framework: one model, local SGD for each user, a weighted mean of the trained parameters."""
    task = workload.load()
    model = task.build_model()
    trained = workload.trained(model)
    parameters = dict(model.named_parameters())
    world = {name: parameters[name].detach().clone() for name in trained}
    users: dict[int, Examples] = {}
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        total = {name: torch.zeros_like(value) for name, value in world.items()}
        weight = 0
        for user in rng.choice(workload.clients, workload.per_round, replace=False):
            if user not in users:
                users[user] = task.partition(int(user))
            with torch.no_grad():
                for name in trained:
                    parameters[name].copy_(world[name])
            batches = users[user].shuffled(workload.batch, CPU, rng)
            local_sgd(model, trained, batches, task.loss, workload.lr, workload.steps)
            count = len(users[user])
            weight += count
            with torch.no_grad():
                for name in trained:
                    total[name].add_(parameters[name] - world[name], alpha=count)
        for name in trained:
            world[name] += total[name] / weight
        seconds.append(time.perf_counter() - began)
    return seconds


def bare_all_cores(workload: Workload, rounds: int) -> list[float]:
    """The bare loop with one torch thread for each core."""
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    return bare(workload, rounds)


# ------------------------------------------------------------------------------------ stock Flower
@lru_cache(maxsize=1)
def _task(name: str) -> Task:
    return WORKLOADS[name].load()


@lru_cache(maxsize=64)
def _examples(name: str, partition: int) -> Examples:
    return _task(name).partition(partition)


def _stock(
    workload: Workload, rounds: int, build: Callable[[Task], torch.nn.Module]
) -> list[float]:
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()
    name = workload.name

    @client.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        task, work = _task(name), WORKLOADS[name]
        model = build(task)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        examples = _examples(name, int(context.node_config["partition-id"]))
        batches = examples.shuffled(work.batch, CPU, np.random.default_rng())
        loss = local_sgd(model, work.trained(model), batches, task.loss, work.lr, work.steps)
        metrics = MetricRecord({"train_loss": loss, "num-examples": len(examples)})
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(content=RecordDict(content), reply_to=message)

    ends: list[float] = []

    def note(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        ends.append(time.perf_counter())
        return MetricRecord({"round": server_round})

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=workload.per_round / workload.clients,
            fraction_evaluate=0.0,
            min_train_nodes=workload.per_round,
            min_available_nodes=workload.clients,
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(_task(name).build_model().state_dict()),
            train_config=ConfigRecord({"lr": workload.lr}),
            num_rounds=rounds,
            evaluate_fn=note,
        )

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=workload.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"logging_level": "error", "log_to_driver": False},
        },
    )
    return [end - start for start, end in pairwise(ends)]


def stock_flower(workload: Workload, rounds: int) -> list[float]:
    """Flower's FedAvg as in its tutorial: each message builds a model and loads its weights."""
    return _stock(workload, rounds, lambda task: task.build_model())


_BUILT: dict[int, torch.nn.Module] = {}


def _built_once(task: Task) -> torch.nn.Module:
    if not _BUILT:
        _BUILT[0] = task.build_model()
    return _BUILT[0]


def stock_flower_cached(workload: Workload, rounds: int) -> list[float]:
    """The same in a faster form: each process builds its model once."""
    return _stock(workload, rounds, _built_once)


# -------------------------------------------------------------------------------------------- pfl
def pfl_research(workload: Workload, rounds: int) -> list[float]:
    """Federated averaging on pfl-research's simulated backend."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel

    task = workload.load()
    model = task.build_model()
    chosen = set(workload.trained(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    keys = list(next(task.partition(0).in_order(1, CPU)))

    def loss(*tensors: torch.Tensor, **_: bool) -> torch.Tensor:
        return task.loss(model, dict(zip(keys, tensors, strict=True)))

    def metrics(*tensors: torch.Tensor, **_: bool) -> dict[str, Weighted]:
        return {"loss": Weighted(0.0, len(tensors[0]))}

    model.loss, model.metrics = loss, metrics
    users: dict[int, Dataset] = {}

    def dataset(user: int) -> Dataset:
        if user not in users:
            examples = task.partition(int(user))
            everything = next(examples.in_order(len(examples), CPU))
            users[user] = Dataset([everything[key] for key in keys])
        return users[user]

    ends: list[float] = []

    class Clock(TrainingProcessCallback):
        def on_train_begin(self, *, model):
            ends.append(time.perf_counter())
            return super().on_train_begin(model=model)

        def after_central_iteration(self, *args, **kwargs):
            ends.append(time.perf_counter())
            return super().after_central_iteration(*args, **kwargs)

    torch.manual_seed(0)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**6,
            train_cohort_size=workload.per_round,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=FederatedDataset(
                dataset, get_user_sampler("random", list(range(workload.clients)))
            ),
            val_data=None,
        ),
        model=PyTorchModel(
            model,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad], 1.0
            ),
        ),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=workload.lr,
            local_num_epochs=None,
            local_num_steps=workload.steps,
            local_batch_size=workload.batch,
        ),
        callbacks=[Clock()],
    )
    return [end - start for start, end in pairwise(ends)]


CONTENDERS: dict[str, Callable[[Workload, int], list[float]]] = {
    "bare": bare,
    "bare-all-cores": bare_all_cores,
    "in-process": in_process,
    "ray": ray_engine,
    "stock-flower": stock_flower,
    "stock-flower-cached": stock_flower_cached,
    "pfl": pfl_research,
}
