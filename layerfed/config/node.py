"""`NodeConfig`: the checked settings of a node, from `flower-supernode --node-config`.

The node's owner sets them, and the server cannot change them. In a simulation Flower sets the partition
and the number of partitions; all others have defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from layerfed.config.privacy import refuse_half
from layerfed.config.run import BudgetUnit, RunConfig, Storage
from layerfed.config.section import ConfigError, DeviceName, Section, explain, section_keys

__all__ = ["NodeConfig"]


class NodeConfig(Section):
    """The settings of one node.

    Attributes
    ----------
    partition_id : int
        The part of the data that the node holds.
    num_partitions : int, optional
        The number of parts of the data.
    data : str, optional
        Path of the run's data on this node, in place of `task.data`. The node takes its partition of
        them.
    own_data : str, optional
        Path of the node's own examples, in place of the run's data. The node trains on all of them, and
        `partition_id` is only its name in the run.
    budget : float or "auto", optional
        The most that the node trains in a round, in `budget_unit`. The server can ask for less, but not
        for more. "auto" measures the free memory.
    budget_unit : str, optional
        Unit of `budget`, one of those of the run's `budget.unit`. Without it the unit is layers, and
        the run's unit must be layers too. A unit other than the run's is translated with measured costs.
    device : str, optional
        Replaces the run's `run.device`.
    threads : int, optional
        Replaces the run's `run.threads`.
    storage : str, optional
        Replaces the run's `model.storage`: the type in which this node holds its frozen layers. The
        layers that it trains, and its updates, are in float32 whatever it says.
    max_step_seconds : float, optional
        The slowest step. If a step takes longer, the node stops training in this round with an error.
    privacy_clip, privacy_noise : float
        C and z of the node's owner, for every run: updates have at most an L2 norm of C, and N(0,
        (z·C)²) is added to each coordinate. Of the run's and the node's values the stricter hold, each
        by itself.
    privacy_statistics_clip, privacy_statistics_noise : float
        The same for each statistic of a probe.
    store : str
        Folder in which the node keeps layers between messages, or `memory` for this process's memory.
        Empty takes the run's `exchange.store`.
    store_size : float
        Largest size of the store in GB; 0 takes the run's `exchange.store-size`.
    """

    partition_id: Annotated[int, Field(ge=0)]
    num_partitions: Annotated[int, Field(ge=1)] | None = None
    data: Annotated[str, Field(min_length=1)] | None = None
    own_data: Annotated[str, Field(min_length=1)] | None = None
    budget: float | Literal["auto"] | None = None
    budget_unit: BudgetUnit | None = None
    device: DeviceName | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    storage: Storage | None = None
    max_step_seconds: Annotated[float, Field(gt=0)] | None = None
    privacy_clip: Annotated[float, Field(ge=0)] = 0.0
    privacy_noise: Annotated[float, Field(ge=0)] = 0.0
    privacy_statistics_clip: Annotated[float, Field(ge=0)] = 0.0
    privacy_statistics_noise: Annotated[float, Field(ge=0)] = 0.0
    store: str = ""
    store_size: Annotated[float, Field(ge=0)] = 0.0

    @field_validator("budget", mode="plain")
    @classmethod
    def _a_number_or_auto(cls, value: Any) -> Any:
        # Pydantic's own message for a union names each of its members, which does not help a user.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value != "auto" and not (number and 0 <= value < math.inf):
            raise ConfigError(
                f"budget = {value!r} is not allowed: it should be 0 or more, or 'auto'"
            )
        return value

    @model_validator(mode="after")
    def _unit_of_a_number(self) -> NodeConfig:
        if self.budget_unit is not None and not isinstance(self.budget, int | float):
            raise ConfigError(
                f"budget-unit = '{self.budget_unit}' goes with a number as budget; "
                f"budget = {self.budget!r} has none"
            )
        return self

    @model_validator(mode="after")
    def _a_partition_there_is(self) -> NodeConfig:
        # With data of its own, the number is a name only.
        count = self.num_partitions
        if count is not None and self.own_data is None and self.partition_id >= count:
            raise ConfigError(
                f"partition-id = {self.partition_id} is not allowed with num-partitions = {count}: it "
                f"should be from 0 to {count - 1}"
            )
        return self

    @model_validator(mode="after")
    def _bounded_noise(self) -> NodeConfig:
        # The owner's guarantee must not depend on the run's bound, which the server chooses.
        if self.privacy_noise > 0 and self.privacy_clip == 0:
            raise ConfigError(
                f"privacy-noise = {self.privacy_noise:g} is a multiple of privacy-clip, which is not "
                "set; give the node a bound of its own"
            )
        refuse_half(
            "privacy-statistics-", self.privacy_statistics_clip, self.privacy_statistics_noise
        )
        return self

    @model_validator(mode="after")
    def _one_place_of_data(self) -> NodeConfig:
        if self.data is not None and self.own_data is not None:
            raise ConfigError(
                f"data = '{self.data}' and own-data = '{self.own_data}': set data if the node takes its "
                "partition of the run's data, or own-data if it trains on all data there"
            )
        return self

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> NodeConfig:
        """Check a node's settings.

        Raises
        ------
        ConfigError
            If a setting is not allowed; the message names it, its value, and what is allowed.
        """
        if "partition-id" not in settings:
            raise ConfigError(
                "this node has no partition; start it with --node-config "
                '"partition-id=0 num-partitions=1"'
            )
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise ConfigError(f"node-config: {explain(error, section_keys(cls))}") from None

    def applied_to(self, config: RunConfig) -> RunConfig:
        """Return the run's configuration, with this node's own settings in place of the run's.

        Raises
        ------
        ConfigError
            If neither the run nor the node states the number of partitions.
        """
        own = {"device": self.device, "threads": self.threads}
        section = config.run.model_copy(update={k: v for k, v in own.items() if v is not None})
        data = self.own_data or self.data
        task = config.task if data is None else config.task.model_copy(update={"data": data})
        federation = config.federation
        if not federation.clients and self.own_data is None:
            if self.num_partitions is None:
                raise ConfigError(
                    "federation.clients = 0, and this node has no num-partitions: it cannot tell its "
                    "part of the data; start it with --node-config "
                    f'"partition-id={self.partition_id} num-partitions=N", or set federation.clients'
                )
            federation = federation.model_copy(update={"clients": self.num_partitions})
        model = config.model
        if self.storage is not None:
            model = model.model_copy(update={"storage": self.storage})
        return config.model_copy(
            update={"run": section, "task": task, "federation": federation, "model": model}
        )
