"""The `[privacy]` section, and the settings that differential privacy cannot work with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from layerfed.config.section import ConfigError, Section

if TYPE_CHECKING:
    from layerfed.config.run import RunConfig

__all__ = ["PrivacyConfig", "check_private", "refuse_half"]


class PrivacyConfig(Section):
    """Differential privacy: the clipping and noise of a run; `docs/privacy.md` explains each setting.

    Attributes
    ----------
    mode : {"none", "central", "local"}
        No privacy; noise on the server's sums; or noise on each client's update.
    clip : float
        C, the largest L2 norm of a client's whole update, the head included.
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
        refuse_half("privacy.statistics-", self.statistics_clip, self.statistics_noise)
        return self


def refuse_half(keys: str, clip: float, noise: float) -> None:
    """Refuse a bound on statistics without noise, or noise without a bound.

    Raises
    ------
    ConfigError
        If one of the two is 0 and the other is not; `keys` is how the names of both begin.
    """
    if (clip > 0) != (noise > 0):
        raise ConfigError(
            f"{keys}clip = {clip:g} with {keys}noise = {noise:g} protects nothing: noise needs a bound "
            "and a bound needs noise; set both above 0, or both to 0"
        )


def check_private(config: RunConfig) -> None:
    """Refuse settings that would reveal more of a client's data than ε accounts for.

    Raises
    ------
    ConfigError
        If there is such a setting; the message names it and the reason.
    """
    section, mode = config.privacy, f"privacy.mode = '{config.privacy.mode}'"
    if section.mode == "none":
        return
    clients = config.federation.clients
    # If the federation states its size later, this is checked then.
    if clients and section.delta >= 1 / clients:
        raise ConfigError(
            f"privacy.delta = {section.delta:g} is not below 1 / federation.clients = {1 / clients:g}: "
            "such a δ would allow revealing one client's data in full; lower it"
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
            "already, and the number of clipped updates would be recorded without noise; set it to 0"
        )
    if config.task.local_test > 0:
        raise ConfigError(
            f"task.local-test = {config.task.local_test:g} does not go with {mode}: the accuracy on a "
            "client's own examples is sent without noise; set it to 0"
        )
