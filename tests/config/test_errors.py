"""A user's mistake and a failure each end in one line and a status; a bug of LayerFed does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerfed.config import ConfigError
from layerfed.config.errors import one_line_errors
from layerfed.deploy.federation import DeploymentFailed
from layerfed.runs import NotWritten
from layerfed.server.population import RoundFailed


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ConfigError("train.lr = [x]"), "error: train.lr = [x]", 2),
        (OSError("no such file"), "error: no such file", 2),
        (RoundFailed("1 reply " * 40), f"failed: {'1 reply ' * 40}", 1),
        (NotWritten(Path("a"), OSError(28, "full")), "failed: a cannot be written: full", 1),
        (DeploymentFailed("the port is taken"), "failed: the port is taken", 1),
    ],
)
def test_an_expected_error_is_one_line_and_a_status(
    error: Exception, line: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors(OSError):
        raise error
    assert ended.value.code == status
    out, said = capsys.readouterr()
    assert (out, said.count("\n")) == ("", 1)
    assert said.startswith(line.strip())


def test_an_error_that_nobody_expects_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), one_line_errors(OSError):
        raise KeyError("a")
