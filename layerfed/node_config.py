"""What a node says of itself: the settings of `flower-supernode --node-config`, checked.

They belong to whoever runs the node, and the server cannot change them. In simulation Flower fills in
the partition and its number; the rest have defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from layerfed.config import ConfigError, explain

__all__ = ["NodeConfig"]


class NodeConfig(BaseModel):
    """The settings of one node.

    Attributes
    ----------
    partition_id : int
        Which part of the data the node holds.
    num_partitions : int, optional
        Into how many parts the data is cut.
    budget : float, optional
        What the node can afford to train, in the run's `budget.unit`; for `budget.kind = "per-node"`.
    store : str
        Folder where the node keeps layers between messages, or `memory` (this process, as long as it
        lasts); empty takes the run's `exchange.store`.
    store_size : float
        Its limit in GB; 0 takes the run's `exchange.store-size`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    partition_id: Annotated[int, Field(ge=0)]
    num_partitions: Annotated[int, Field(ge=1)] | None = None
    budget: Annotated[float, Field(ge=0)] | None = None
    store: str = ""
    store_size: Annotated[float, Field(ge=0)] = 0.0

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> NodeConfig:
        """Check a node's settings.

        Raises
        ------
        ConfigError
            Naming the setting, its value, and what is allowed.
        """
        if "partition-id" not in settings:
            raise ConfigError(
                "this node has no partition; start it with --node-config "
                '"partition-id=0 num-partitions=1"'
            )
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            known = ", ".join(name.replace("_", "-") for name in cls.model_fields)
            raise ConfigError(f"node-config: {explain(error, known)}") from None
