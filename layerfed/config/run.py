"""`RunConfig`: the typed and checked settings of a run.

Keys are the same everywhere: `[federation] clients-per-round = 5` in a file under `conf/`, and
`federation.clients-per-round=5` on `layerfed`'s command line and in `flwr run --run-config`. This module
checks everything that can be checked without the model. The ServerApp checks the rest, for example a
budget above the number of layers, before any client works.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import ConfigDict, Field, ValidationError, model_validator

from layerfed.config.paths import absolute
from layerfed.config.privacy import PrivacyConfig, check_private
from layerfed.config.secagg import SecAggConfig, refuse_with_secagg
from layerfed.config.section import (
    ConfigError,
    DeviceName,
    PlugIn,
    RunName,
    Section,
    Switch,
    explain,
    is_text,
    nearest,
    nearest_key,
    parse_override,
    section_keys,
)

__all__ = [
    "BudgetUnit",
    "Flat",
    "RunConfig",
    "Scalar",
    "Storage",
    "run_keys",
]

Scalar = str | int | float | bool
Flat = dict[str, Scalar]

BudgetUnit = Literal["layers", "parameters", "bytes", "flops", "seconds", "memory"]
Storage = Literal["checkpoint", "float32", "bfloat16", "float16", "int8", "4bit"]
# Libraries of models, which `model.name` begins with, and what their models read.
FAMILIES = {"layerfed": "image", "open_clip": "image", "timm": "image", "transformers": "text"}
Positive = Annotated[int, Field(ge=1)]
_LORA = ("lora-rank", "lora-alpha", "lora-targets", "lora-dropout", "personal-rank")
_PRIVACY = ("clip", "noise", "delta", "statistics-clip", "statistics-noise")
# A setting, values of it, and the other ones of its section that are read with these values only.
READ_WITH = {
    ("model.tuning", ("lora",)): _LORA,
    ("train.lr-schedule", ("step",)): ("lr-decay", "lr-step"),
    ("train.optimizer", ("sgd",)): ("momentum",),
    ("train.skip", ("random", "substack")): ("skip-rate",),
    ("server.lr-schedule", ("step",)): ("lr-decay", "lr-step"),
    ("server.aggregation", ("trimmed-mean",)): ("trim",),
    ("server.optimizer", ("momentum", "adam", "yogi")): ("momentum",),
    ("server.optimizer", ("adam", "yogi")): ("beta2", "tau"),
    ("privacy.mode", ("central", "local")): _PRIVACY,
    ("secagg.enabled", (True,)): ("threshold", "range"),
}
# Clients of a federation that LayerFed makes itself, if the configuration states no number.
SIMULATED_CLIENTS = 10


class OpenSection(Section):
    """A section that also takes the settings of a user's own class, which declares and checks them."""

    key: ClassVar[str]
    """The section's name in keys."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    @property
    def keys(self) -> dict[str, Scalar]:
        """Settings of such a class that were given as keys of this section."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def own(self) -> dict[str, Scalar]:
        """Settings of such a class that were given in `options`."""
        text = getattr(self, "options", "")
        try:
            return dict(parse_override(word) for word in shlex.split(text))
        except ValueError as error:
            raise ConfigError(f"{self.key}.options = {text!r} cannot be read: {error}") from None


class TaskConfig(OpenSection):
    """The task: its data, its main score, and how examples are split over the clients."""

    key: ClassVar[str] = "task"

    name: PlugIn = "digits"
    metric: str = ""
    options: str = ""
    data: str = ""
    partition: Literal["dirichlet", "by-column", "iid"] = "dirichlet"
    alpha: Annotated[float, Field(gt=0)] = 0.5
    input_columns: str = ""
    label_column: str = ""
    group_column: str = ""
    classes: str = ""
    groups: str = ""
    holdout_group: str = ""
    train_split: str = ""
    test_split: str = ""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    image_size: Annotated[int, Field(ge=0)] = 0
    max_tokens: Annotated[int, Field(ge=8)] = 128
    packing: Switch = True
    decode_examples: Annotated[int, Field(ge=0)] = 64
    new_tokens: Positive = 64
    local_test: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _known(self) -> Self:
        # A task of a user's own checks its settings itself, once it is imported.
        if ":" not in self.name and self.keys:
            key, known = f"task.{next(iter(self.keys))}", section_keys(TaskConfig, "task.")
            raise ConfigError(
                f"unknown key '{key}'; known keys: {', '.join(known)}{nearest_key(key, known)}"
            )
        return self


class ModelConfig(Section):
    """The model that is fine-tuned, and its split into layers."""

    name: str = "layerfed/vit"
    weights: Annotated[str, Field(min_length=1)] = "embedded"
    tokenizer: str = ""
    image_size: Annotated[int, Field(ge=0)] = 0
    blocks: str = ""
    head: str = ""
    embeddings: str = ""
    personal: str = ""
    storage: Storage = "checkpoint"
    tuning: Literal["layers", "lora"] = "layers"
    lora_rank: Positive = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    lora_targets: str = ""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    personal_rank: Annotated[int, Field(ge=0)] = 0
    units: Annotated[str, Field(min_length=1)] = "blocks"
    batch_norm: Literal["auto", "frozen", "trained"] = "auto"

    @property
    def family(self) -> str:
        """The model's library, which is the part of its name before the first slash."""
        return self.name.partition("/")[0]

    @property
    def architecture(self) -> str:
        """The name of the model in its library."""
        return self.name.partition("/")[2]

    @property
    def frozen_statistics(self) -> bool:
        """Whether BatchNorm's statistics stay as they are."""
        untrained = self.weights == "random" and self.tuning == "layers"
        return self.batch_norm == "frozen" or (self.batch_norm == "auto" and not untrained)

    @model_validator(mode="after")
    def _adapters(self) -> Self:
        if self.tuning == "lora" and self.batch_norm == "trained":
            raise ConfigError(
                "model.batch-norm = 'trained' goes with model.tuning = 'layers' only: adapters leave "
                "everything else as it is; set it to auto"
            )
        return self

    @model_validator(mode="after")
    def _loadable(self) -> Self:
        if self.family not in FAMILIES or not self.architecture:
            raise ConfigError(
                f"model.name = '{self.name}' is not allowed: it should be layerfed/vit, open_clip/NAME, "
                "timm/NAME or transformers/HUB-ID-OR-FOLDER, as in open_clip/ViT-B-32"
                f"{nearest(self.family, FAMILIES)}"
            )
        if self.family == "layerfed":
            if self.architecture != "vit" or self.weights not in ("embedded", "random"):
                raise ConfigError(
                    f"model.name = '{self.name}' with model.weights = '{self.weights}' does not exist: "
                    "layerfed/vit comes with weights embedded (the shipped ones) or random; for weights "
                    "of your own name their family too, as in model.name=timm/vit_small_patch16_224"
                )
        elif self.weights == "embedded":
            raise ConfigError(
                f"model.weights = 'embedded' goes with model.name = 'layerfed/vit' only; for "
                f"'{self.name}' give a hub id, a folder, "
                + ("a tag of open_clip" if self.family == "open_clip" else "'pretrained'")
                + " or 'random'"
            )
        if self.tokenizer and FAMILIES[self.family] != "text":
            raise ConfigError(
                f"model.tokenizer = '{self.tokenizer}' has no use for model.name = '{self.name}'; leave "
                "it empty, or name a model that reads texts"
            )
        if self.image_size and self.family in ("layerfed", "transformers"):
            raise ConfigError(
                f"model.image-size = {self.image_size} has no use for model.name = '{self.name}', "
                + (
                    "which computes at 32 pixels"
                    if self.family == "layerfed"
                    else "which reads text"
                )
                + "; leave it at 0, or name a model of timm or open_clip"
            )
        return self


class FederationConfig(Section):
    """The population of clients, and the cohort and replies of a round."""

    clients: Annotated[int, Field(ge=0)] = 0
    clients_per_round: Annotated[int, Field(ge=0)] = 0
    rounds: Positive = 30
    patience: Annotated[int, Field(ge=0)] = 0
    min_replies: Annotated[int, Field(ge=0)] = 0
    over_provision: Annotated[float, Field(ge=0, le=1)] = 0.0
    timeout: Annotated[float, Field(gt=0)] = 3600.0
    max_examples: Annotated[int, Field(ge=0)] = 0
    deadline: Annotated[float, Field(ge=0)] = 0.0
    late: Literal["send", "drop"] = "send"
    speeds: str = ""

    def speed(self, client: int) -> float:
        """Return a simulated client's FLOPs a second; 0 if clients are not simulated."""
        speeds = [float(number) for number in self.speeds.split(",") if self.speeds]
        return speeds[client % len(speeds)] if speeds else 0.0

    @model_validator(mode="after")
    def _clocks(self) -> Self:
        try:
            usable = all(0 < float(n) < math.inf for n in self.speeds.split(",") if self.speeds)
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(
                f"federation.speeds = '{self.speeds}' is not allowed: it should be empty, or numbers "
                "above 0, in FLOPs a second, as in '4e9, 1e9'"
            )
        if self.late == "drop" and not self.deadline:
            raise ConfigError(
                "federation.late = 'drop' has no use without a deadline; set federation.deadline, or "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.clients and self.clients_per_round > self.clients:
            raise ConfigError(
                f"federation.clients-per-round = {self.clients_per_round} is above "
                f"federation.clients = {self.clients}; lower it or raise the number of clients"
            )
        asked = self.clients_per_round or self.clients
        if asked and self.min_replies > asked:
            key = "clients-per-round" if self.clients_per_round else "clients"
            raise ConfigError(
                f"federation.min-replies = {self.min_replies} is above "
                f"federation.{key} = {asked}; no round could succeed"
            )
        return self

    @property
    def population(self) -> int:
        """Number of clients: `clients`, or ten if it is 0 and LayerFed makes the federation."""
        return self.clients or SIMULATED_CLIENTS

    @property
    def cohort(self) -> int:
        """Number of clients in a round; `clients-per-round` = 0 means all."""
        return self.clients_per_round or self.population

    @property
    def needed_replies(self) -> int:
        """Number of usable updates that a round needs: `min-replies`, or half of the cohort."""
        return self.min_replies or -(-self.cohort // 2)


class StrategyConfig(OpenSection):
    """The strategy that selects layers, and its settings.

    Other keys are options of single strategies. Each strategy declares and checks its own
    (`strategies.checked`), so one file may hold the options of several strategies.
    """

    key: ClassVar[str] = "strategy"

    name: PlugIn = "ilp"
    period: Positive = 1
    theory: Switch = False
    probe_batches: Annotated[int, Field(ge=0)] = 1
    probe_examples: Annotated[int, Field(ge=0)] = 0
    probe: Literal["before", "after"] = "before"
    probe_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    options: str = ""

    @property
    def carried(self) -> str:
        """The setting by which statistics of earlier rounds enter a selection; empty if none does."""
        if self.probe == "after":
            return "strategy.probe = 'after'"
        return f"strategy.probe-share = {self.probe_share:g}" if self.probe_share < 1 else ""

    @model_validator(mode="after")
    def _of_now(self) -> Self:
        if self.theory and self.carried:
            raise ConfigError(
                f"{self.carried} does not go with strategy.theory = true: E1 needs the gradients of all "
                "layers at the round's own model; set strategy.theory=false"
            )
        return self


class BudgetConfig(Section):
    """The budget of each client: how much it can train in a round."""

    kind: Literal["identical", "half-normal", "per-node"] = "identical"
    unit: BudgetUnit = "layers"
    layers: Annotated[float, Field(ge=0)] = 1.0
    min: Annotated[float, Field(ge=0)] = 1.0
    max: Annotated[float, Field(ge=0)] = 4.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ConfigError(f"budget.min = {self.min:g} is above budget.max = {self.max:g}")
        return self


class Scheduled(Section):
    """A learning rate, and how it changes over the rounds of a run."""

    key: ClassVar[str]
    """The section's name in keys."""

    lr: Annotated[float, Field(gt=0)] = 1.0
    lr_schedule: Literal["constant", "step", "cosine"] = "step"
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    lr_step: Positive = 1
    lr_warmup: Annotated[int, Field(ge=0)] = 0

    def factor(self, number: int, rounds: int) -> float:
        """Return what `lr` is multiplied by in a round.

        Parameters
        ----------
        number : int
            t, from 1. In the first `lr_warmup` rounds the rate rises linearly to its value.
        rounds : int
            T, the rounds of the run. A cosine would be 0 in round T + 1 [Loshchilov & Hutter, SGDR,
            2017, eq. 5].
        """
        if number <= self.lr_warmup:
            return number / (self.lr_warmup + 1)
        done = number - self.lr_warmup - 1
        if self.lr_schedule == "cosine":
            return (1 + math.cos(math.pi * done / (rounds - self.lr_warmup))) / 2
        return self.lr_decay ** (done // self.lr_step)


class TrainConfig(Scheduled):
    """A client's local work in one round."""

    key: ClassVar[str] = "train"

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.05
    head_lr: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive = 32
    local_steps: Annotated[int, Field(ge=0)] = 5
    local_epochs: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    micro_batch: Annotated[int, Field(ge=0)] = 0
    checkpointing: Switch = False
    prefix_cache: Annotated[float, Field(ge=0)] = 0.0
    skip: Literal["none", "random", "substack"] = "none"
    skip_rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    clip_gradient: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: str = ""
    augment: Literal["none", "light", "randaugment"] = "none"

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each class; empty if there are none, or if each client balances its own."""
        if self.class_weights in ("", "balanced"):
            return ()
        return tuple(float(number) for number in self.class_weights.split(","))

    @model_validator(mode="after")
    def _weights(self) -> Self:
        try:
            usable = all(0 < weight < math.inf for weight in self.weights)
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(
                f"train.class-weights = '{self.class_weights}' is not allowed: it should be empty, "
                "balanced, or a number above 0 for each class, as in '1, 2.5, 1'"
            )
        return self

    @model_validator(mode="after")
    def _skipping(self) -> Self:
        if self.skip != "none" and self.prefix_cache:
            raise ConfigError(
                f"train.prefix-cache = {self.prefix_cache:g} has no use for train.skip = '{self.skip}': "
                "each draw of blocks gives other outputs; set train.prefix-cache=0"
            )
        if self.skip == "random" and self.skip_rate > 0.5:
            raise ConfigError(
                f"train.skip-rate = {self.skip_rate:g} is above 0.5, at which train.skip = 'random' "
                "leaves the uppermost block out nearly always; lower it, or choose train.skip=substack"
            )
        return self

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.local_steps > 0) == (self.local_epochs > 0):
            raise ConfigError(
                f"train.local-steps = {self.local_steps} and train.local-epochs = "
                f"{self.local_epochs}: set exactly one of them above 0, the other to 0"
            )
        return self

    def steps(self, examples: int) -> int:
        """Return τ_i, the optimiser steps in one round of a client with `examples` examples."""
        return self.local_steps or self.local_epochs * -(-examples // self.batch_size)


class ServerConfig(Scheduled):
    """The server's aggregation and its optimiser, which turn updates into new layers."""

    key: ClassVar[str] = "server"

    aggregation: Literal["mean", "median", "trimmed-mean", "svd", "stack"] = "mean"
    average_over: Literal["trained", "cohort"] = "trained"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    clip: Annotated[float, Field(ge=0)] = 0.0
    optimizer: Literal["sgd", "momentum", "adam", "yogi"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class ExchangeConfig(Section):
    """The codecs of updates and of layers, and the store for layers between messages."""

    codec: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    downlink_codec: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    store: str = ""
    store_size: Annotated[float, Field(gt=0)] = 10.0


class RunSection(Section):
    """The run's folder, seed, checkpoints and device."""

    name: RunName = ""
    dir: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    resume: str = ""
    checkpoint_every: Annotated[int, Field(ge=0)] = 1
    checkpoints: Positive = 2
    evaluate_every: Positive = 1
    evaluate_batch: Annotated[int, Field(ge=0)] = 0
    trackers: str = ""
    project: Annotated[str, Field(min_length=1)] = "layerfed"
    device: DeviceName = "auto"
    threads: Annotated[int, Field(ge=0)] = 1
    client_cpus: Annotated[float, Field(gt=0)] = 1.0
    client_gpus: Annotated[float, Field(ge=0)] = 0.0
    ray_address: str = ""


class RunConfig(Section):
    """All settings of a run.

    Raises
    ------
    ConfigError
        From `from_flat` and `load_config`; one line with the key, its value and what is allowed.
    """

    task: TaskConfig = TaskConfig()  # type: ignore[call-arg]
    model: ModelConfig = ModelConfig()
    federation: FederationConfig = FederationConfig()
    strategy: StrategyConfig = StrategyConfig()  # type: ignore[call-arg]
    budget: BudgetConfig = BudgetConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    secagg: SecAggConfig = SecAggConfig()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _read(self) -> Self:
        for (other, values), names in READ_WITH.items():
            section, _, switch = other.partition(".")
            own: Section = getattr(self, section)
            chosen = getattr(own, switch.replace("-", "_"))
            given = own.model_dump(by_alias=True, exclude_defaults=True)
            if chosen not in values and (unread := [name for name in names if name in given]):
                right = " or ".join(str(value).lower() for value in values)
                raise ConfigError(
                    f"{section}.{unread[0]} = {given[unread[0]]!r} has no use for {other} = {chosen!r}; "
                    f"leave it out, or choose {other}={right}"
                )
        return self

    @model_validator(mode="after")
    def _private(self) -> Self:
        check_private(self)
        return self

    @model_validator(mode="after")
    def _sums_can_be_secure(self) -> Self:
        if self.secagg.enabled:
            refuse_with_secagg(self.to_flat())
        return self

    @model_validator(mode="after")
    def _factors(self) -> Self:
        rule = f"server.aggregation = '{self.server.aggregation}'"
        if self.server.aggregation in ("svd", "stack") and self.model.tuning != "lora":
            raise ConfigError(
                f"{rule} is for adapters, and model.tuning = '{self.model.tuning}' has none; choose "
                "server.aggregation=mean, or model.tuning=lora"
            )
        if self.server.aggregation not in ("svd", "stack"):
            return self
        again = "each round gives adapters other factors, and a part of that change is no step"
        stepping = ServerConfig.model_fields.keys() - {"aggregation", "trim", "clip"}
        reasons = {f"server.{name.replace('_', '-')}": again for name in stepping}
        reasons["exchange.downlink-codec"] = "new factors would be those of the coded weights"
        if self.server.aggregation == "stack":
            reasons["model.storage"] = "it changes the weights, which are in float32 then"
        flat, usual = self.to_flat(), RunConfig().to_flat()
        for key, why in sorted(reasons.items()):
            if flat[key] != usual[key]:
                raise ConfigError(
                    f"{key} = {flat[key]!r} does not go with {rule}: {why}; leave it at "
                    f"{usual[key]!r}, or choose server.aggregation=mean"
                )
        return self

    @model_validator(mode="after")
    def _personal(self) -> Self:
        scored = self.task.local_test > 0 or self.privacy.mode != "none"
        own = f"model.personal = '{self.model.personal}'" if self.model.personal else ""
        if not own and self.model.personal_rank:
            own = f"model.personal-rank = {self.model.personal_rank}"
        if own and not scored:
            raise ConfigError(
                f"{own} needs task.local-test above 0: only clients have what stays on them, so only "
                "they can score the model; try task.local-test=0.2"
            )
        if own and self.run.ray_address:
            raise ConfigError(
                f"{own} does not go with run.ray-address = '{self.run.ray_address}': what stays on a "
                "client is in a file of the machine that worked for it, and on a cluster another one "
                "may be next; leave run.ray-address empty"
            )
        return self

    @model_validator(mode="after")
    def _carried(self) -> Self:
        setting = self.strategy.carried
        if setting and self.train.skip != "none":
            raise ConfigError(
                f"{setting} does not go with train.skip = '{self.train.skip}': each draw of blocks is "
                "another network, of which earlier statistics say nothing; set train.skip=none"
            )
        if setting and self.privacy.statistics_noise > 0:
            raise ConfigError(
                f"{setting} does not go with privacy.statistics-noise = "
                f"{self.privacy.statistics_noise:g}: ε counts one release of all layers a round; "
                "set strategy.probe=before and strategy.probe-share=1"
            )
        return self

    @model_validator(mode="after")
    def _theory(self) -> Self:
        if self.strategy.theory and self.train.skip != "none":
            raise ConfigError(
                f"train.skip = '{self.train.skip}' does not go with strategy.theory = true: E1 needs "
                "the gradients of all layers, and a client has none of the blocks that it skips; set "
                "strategy.theory=false"
            )
        return self

    @model_validator(mode="after")
    def _warm(self) -> Self:
        for section in (self.train, self.server):
            if section.lr_warmup >= self.federation.rounds:
                raise ConfigError(
                    f"{section.key}.lr-warmup = {section.lr_warmup} leaves none of federation.rounds = "
                    f"{self.federation.rounds} for the full {section.key}.lr; lower it"
                )
        return self

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> RunConfig:
        """Build and check a configuration from dotted keys, the form in which Flower passes them."""
        nested: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            section, dot, name = key.partition(".")
            if not dot or section not in cls.model_fields:
                raise ConfigError(
                    f"unknown key '{key}'; keys are section.name with a section of "
                    f"{', '.join(cls.model_fields)}{nearest_key(key, run_keys())}"
                )
            nested.setdefault(section, {})[name] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError(explain(error, run_keys())) from None

    def of_size(self, clients: int) -> RunConfig:
        """Return this configuration with the population and the cohort set, where they were 0.

        Parameters
        ----------
        clients : int
            Size of the federation.

        Raises
        ------
        ConfigError
            If a setting does not fit a federation of this size.
        """
        asked = self.federation.clients_per_round
        if asked > clients:
            raise ConfigError(
                f"federation.clients-per-round = {asked} is above the {clients} clients of the "
                "federation; lower it, set it to 0 (all clients), or raise the number of clients "
                "(federation.clients; with flwr run, num-supernodes)"
            )
        sizes = {"federation.clients": clients, "federation.clients-per-round": asked or clients}
        return RunConfig.from_flat(self.to_flat() | sizes)

    def simulated(self) -> RunConfig:
        """Return this configuration for a federation that LayerFed makes itself."""
        return self.of_size(self.federation.population)

    def absolute(self) -> RunConfig:
        """Return this configuration with absolute paths, so that it means the same in any folder."""
        flat = self.to_flat()
        sections: dict[str, dict[str, str]] = {}
        for key, path in absolute(flat).items():
            section, _, name = key.partition(".")
            if path != flat[key]:
                sections.setdefault(section, {})[name.replace("-", "_")] = path
        copies = {s: getattr(self, s).model_copy(update=changed) for s, changed in sections.items()}
        return self.model_copy(update=copies)

    def to_flat(self) -> Flat:
        """Return every key with its value, in the order of the sections."""
        nested = self.model_dump(by_alias=True)
        return {f"{s}.{k}": v for s, keys in nested.items() for k, v in keys.items()}


@cache
def text_keys() -> frozenset[str]:
    """Return the keys whose values are text."""
    return frozenset(
        f"{section}.{name.replace('_', '-')}"
        for section, own in RunConfig.model_fields.items()
        for name, field in cast(type[Section], own.annotation).model_fields.items()
        if is_text(field.annotation)
    )


def run_keys() -> list[str]:
    """Return every key of a run's configuration."""
    return list(RunConfig().to_flat())
