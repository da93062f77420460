"""The settings of differential privacy, and what they do not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from layerfed.config.section import ConfigError, Section

if TYPE_CHECKING:
    from layerfed.config.run import RunConfig

__all__ = ["PrivacyConfig", "check_private"]


class PrivacyConfig(Section):
    """What a client's replies may say of its data; `docs/privacy.md` explains each setting.

    Attributes
    ----------
    mode : {"none", "central", "local"}
        Nothing; noise on the server's sums; noise on each client's update.
    clip : float
        C, the largest L2 norm of all that a client sends in a training reply, the head included.
    noise : float
        z: the standard deviation of the noise is z·C in each coordinate. 0 clips only.
    delta : float
        δ at which ε is reported.
    statistics_clip, statistics_noise : float
        The same for each statistic of a probe, a vector of L numbers; 0 leaves statistics as they are.
    """

    mode: Literal["none", "central", "local"] = "none"
    clip: Annotated[float, Field(gt=0)] = 1.0
    noise: Annotated[float, Field(ge=0)] = 0.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    statistics_clip: Annotated[float, Field(ge=0)] = 0.0
    statistics_noise: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for key, value in (
            ("noise", self.noise),
            ("statistics-clip", self.statistics_clip),
            ("statistics-noise", self.statistics_noise),
        ):
            if self.mode == "none" and value > 0:
                raise ConfigError(
                    f"privacy.{key} = {value:g} does nothing under privacy.mode = 'none'; choose the "
                    "mode central or local, or leave it at 0"
                )
        if (self.statistics_clip > 0) != (self.statistics_noise > 0):
            raise ConfigError(
                f"privacy.statistics-clip = {self.statistics_clip:g} with privacy.statistics-noise = "
                f"{self.statistics_noise:g} protects nothing: noise needs a bound and a bound needs "
                "noise; set both above 0, or both to 0"
            )
        return self


def check_private(config: RunConfig) -> None:
    """Refuse what would say more of a client's data than ε accounts for.

    Raises
    ------
    ConfigError
        Naming the two settings and why they do not go together.
    """
    section, mode = config.privacy, f"privacy.mode = '{config.privacy.mode}'"
    if section.mode == "none":
        return
    clients = config.federation.clients
    # Where the federation states its size, this is checked once it is known.
    if clients and section.delta >= 1 / clients:
        raise ConfigError(
            f"privacy.delta = {section.delta:g} is not below 1 / federation.clients = {1 / clients:g}: "
            "so large a δ allows giving one client's data away in full; lower it"
        )
    if config.strategy.name == "fedtlu" and config.strategy.side == "client":
        raise ConfigError(
            f"strategy.side = 'client' does not go with {mode}: which layers a client sends "
            "would follow from its own update, and no noise covers that; use strategy.side=server"
        )
    server = config.server
    if section.mode == "central" and server.aggregation != "mean":
        raise ConfigError(
            f"server.aggregation = '{server.aggregation}' does not go with {mode}: noise of z·C covers "
            "what one client adds to a sum, and a median may move by more; use "
            "server.aggregation=mean, or privacy.mode=local"
        )
    if section.mode == "central" and server.clip > 0:
        raise ConfigError(
            f"server.clip = {server.clip:g} does not go with {mode}: privacy.clip bounds updates "
            "already, and how many were scaled down would be recorded without noise; set it to 0"
        )
    resampled = config.strategy.name == "random" and config.strategy.resample_steps > 0
    if resampled and config.train.local_epochs > 0:
        raise ConfigError(
            f"strategy.resample-steps = {config.strategy.resample_steps} with train.local-epochs does "
            f"not go with {mode}: how often to draw would follow from a client's number of examples, "
            "which it does not say then; use train.local-steps"
        )
    if config.task.local_test > 0:
        raise ConfigError(
            f"task.local-test = {config.task.local_test:g} does not go with {mode}: the accuracy on a "
            "client's own examples is sent without noise; set it to 0"
        )
