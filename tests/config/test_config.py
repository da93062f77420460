"""Every wrong setting is refused in one line that names key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from layerfed.config import ConfigError, RunConfig, Scalar, load_config, parse_override
from layerfed.config.run import READ_WITH
from layerfed.strategies import STRATEGIES, checked
from scripts.generate import defaults, generated, shipped, words

ROOT = Path(__file__).parents[2]


def test_defaults_stand_the_same_everywhere() -> None:
    """In the types, in conf/default.toml, and in what `make generate` writes."""
    assert shipped() == defaults()
    assert words().keys() == defaults().keys()
    for file, text in generated().items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name} is stale: make generate"


def test_no_two_strategies_share_an_option() -> None:
    """A key has the same default for every reader."""
    fields = [f for strategy in STRATEGIES.values() for f in strategy.Options.model_fields]
    assert len(fields) == len(set(fields))


@pytest.mark.parametrize("file", sorted((ROOT / "conf").glob("*.toml")), ids=lambda f: f.name)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    assert checked(load_config(file)).federation.rounds >= 1


def test_flat_and_back_is_the_same_configuration() -> None:
    config = load_config(None, ["strategy.name=top", "train.lr=0.5", "run.seed=7"])
    assert RunConfig.from_flat(config.to_flat()) == config


def test_paths_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("data.csv", "bert", "pretrained", "spoken"):
        (tmp_path / name).touch()
    given = {
        "task.name": "custom",
        "task.data": "data.csv",
        "model.name": "transformers/bert",
        "model.weights": "~/bert",
        "model.tokenizer": "spoken",
        "exchange.store": "store",
        "run.dir": "",
    }
    found = RunConfig.from_flat(given).absolute()
    at = {key: str(value).replace(str(tmp_path), "HERE") for key, value in found.to_flat().items()}
    assert {key: at[key] for key in given} == {
        "task.name": "custom",
        "task.data": "HERE/data.csv",
        "model.name": "transformers/HERE/bert",
        "model.weights": "HERE/bert",
        "model.tokenizer": "HERE/spoken",
        "exchange.store": "HERE/store",
        "run.dir": "HERE/runs",
    }
    assert found.absolute() == found
    assert found.model.architecture == str(tmp_path / "bert")
    names = {
        "task.data": "owner/reviews",
        "model.name": "transformers/FacebookAI/xlm-roberta-base",
        "model.weights": "pretrained",
        "exchange.store": "memory",
    }
    flat = RunConfig.from_flat(given | names).absolute().to_flat()
    assert {key: flat[key] for key in names} == names
    assert RunConfig().absolute().task.data == ""


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[strategy]\nname = "top"\n[train]\nlr = 0.5\n')
    config = load_config(file, ["train.lr=0.25"])
    assert (config.strategy.name, config.train.lr) == ("top", 0.25)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("strategy.name=ilpp", ["strategy.name", "'ilpp'", "bottom", "did you mean ilp?"]),
        ("strategy.nam=ilp", ["strategy.nam", "strategy.name"]),
        ("stratgy.name=ilp", ["stratgy.name", "did you mean strategy.name?"]),
        ("trian.lr=1", ["trian.lr", "did you mean train.lr?"]),
        ("train.momentun=1", ["train.momentun", "did you mean train.momentum?"]),
        ("rounds=3", ["rounds", "did you mean federation.rounds?"]),
        ("federation.rounds=many", ["federation.rounds", "'many'", "integer"]),
        ("federation.rounds=0", ["federation.rounds", "0", "greater than or equal to 1"]),
        ("federation.rounds=2.5", ["federation.rounds", "2.5", "integer"]),
        ("federation.clients=-1", ["federation.clients", "-1", "greater than or equal to 0"]),
        ("task.name=a/b", ["task.name", "'a/b'", "module:Class"]),
        ("model.name=tim/resnet50", ["model.name", "'tim/resnet50'", "did you mean timm?"]),
        ("model.image-size=-1", ["model.image-size", "-1", "greater than or equal to 0"]),
        ("model.image-size=64", ["model.image-size = 64", "layerfed/vit", "32 pixels"]),
        ("strategy.period=0", ["strategy.period", "0", "greater than or equal to 1"]),
        ("strategy.fraction=0", ["strategy.fraction", "0", "greater than 0"]),
        ("strategy.fraction=1.5", ["strategy.fraction", "1.5", "less than or equal to 1"]),
        ("strategy.norm=l3", ["strategy.norm", "'l3'", "'l1'", "'l2'"]),
        ("strategy.side=both", ["strategy.side", "'both'", "'server'", "'client'"]),
        ("strategy.resample-steps=-1", ["strategy.resample-steps", "-1"]),
        ("strategy.theory=2", ["strategy.theory", "2", "boolean"]),
        ("train.lr=-1", ["train.lr", "-1", "greater than 0"]),
        ("train.lr=nan", ["train.lr", "finite"]),
        ("federation.patience=-1", ["federation.patience", "greater than or equal to 0"]),
        ("train.clip-gradient=-1", ["train.clip-gradient", "-1", "greater than or equal to 0"]),
        ("train.label-smoothing=1", ["train.label-smoothing", "less than 1"]),
        ("train.class-weights=1,0", ["train.class-weights = '1,0'", "balanced", "each class"]),
        ("train.class-weights=equal", ["train.class-weights = 'equal'", "balanced"]),
        ("train.augment=heavy", ["train.augment", "'heavy'", "'light'", "'randaugment'"]),
        ("train.lr-schedule=linear", ["train.lr-schedule", "'linear'", "'cosine'"]),
        ("server.lr-step=0", ["server.lr-step", "greater than or equal to 1"]),
        ("train.lr-warmup=30", ["train.lr-warmup = 30", "federation.rounds = 30"]),
        ("train.local-epochs=1", ["train.local-steps = 5", "train.local-epochs = 1"]),
        ("task.alpha=0", ["task.alpha", "greater than 0"]),
        ("budget.min=5", ["budget.min = 5", "budget.max = 4"]),
        ("budget.kind=half", ["budget.kind", "'half'", "'half-normal'"]),
        ("privacy.mode=global", ["privacy.mode", "'global'", "'central'", "'local'"]),
        ("privacy.clip=0", ["privacy.clip", "0", "greater than 0"]),
        ("privacy.noise=1", ["privacy.noise = 1", "privacy.mode = 'none'", "central or local"]),
        ("privacy.delta=1", ["privacy.delta", "less than 1"]),
        ("server.aggregation=mode", ["server.aggregation", "'mode'", "'median'", "'trimmed-mean'"]),
        ("server.trim=0.5", ["server.trim", "0.5", "less than 0.5"]),
        ("server.trim=-0.1", ["server.trim", "-0.1", "greater than or equal to 0"]),
        ("server.clip=-1", ["server.clip", "-1", "greater than or equal to 0"]),
        ("server.clip=inf", ["server.clip", "finite"]),
        ("federation.max-examples=-1", ["federation.max-examples", "-1", "greater than or equal"]),
        ("federation.max-examples=0.5", ["federation.max-examples", "0.5", "integer"]),
        ("run.name=../x", ["run.name", "'../x'", "letters, digits"]),
        ("run.device=tpu", ["run.device", "'tpu'", "auto, cpu, mps, cuda"]),
        ("noequals", ["noequals", "key=value"]),
        ("strategy.options=note='x", ["strategy.options", "note='x", "No closing quotation"]),
    ],
)
def test_wrong_settings_give_one_clear_line(override: str, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(load_config(None, [override]))
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in says if text not in message] == []


# For each setting that is not always read a value other than its default.
GIVEN = {
    **{"model.lora-rank": 4, "model.lora-alpha": 8, "model.lora-targets": "qkv"},
    **{"model.lora-dropout": 0.1, "model.personal-rank": 2, "train.skip-rate": 0.25},
    **{"train.lr-decay": 0.5, "train.lr-step": 2, "train.momentum": 0.9, "server.trim": 0.2},
    **{"server.lr-decay": 0.5, "server.lr-step": 2, "server.momentum": 0.5, "server.beta2": 0.9},
    **{"server.tau": 0.1, "privacy.clip": 0.5, "privacy.noise": 1, "privacy.delta": 1e-6},
    **{"privacy.statistics-clip": 1, "privacy.statistics-noise": 1, "secagg.threshold": 0.8},
    "secagg.range": 4,
}
WITHOUT = {"train.lr-schedule": "cosine", "server.lr-schedule": "constant"}
WITHOUT |= {"train.optimizer": "adamw"}
ALSO = {
    "model.personal-rank": ["task.local-test=0.2"],
    "privacy.statistics-clip": ["privacy.statistics-noise=1"],
    "privacy.statistics-noise": ["privacy.statistics-clip=1"],
}


@pytest.mark.parametrize(
    ("key", "other", "values"),
    [
        (f"{other.partition('.')[0]}.{name}", other, values)
        for (other, values), names in READ_WITH.items()
        for name in names
    ],
)
def test_what_nothing_reads_is_refused(key: str, other: str, values: Sequence[Scalar]) -> None:
    given = [f"{key}={GIVEN[key]}", *ALSO.get(key, [])]
    without = WITHOUT.get(other, RunConfig().to_flat()[other])
    begins = key.partition("-")[0]  # both halves of a bound on statistics are there
    with pytest.raises(ConfigError, match=rf"^{begins}.* has no use for {other} = .*{without}"):
        load_config(None, [*given, f"{other}={without}"])
    for value in values:
        config = load_config(None, [*given, f"{other}={value}"])
        assert config.to_flat()[key] == GIVEN[key]


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ([], [1, 1, 1, 1]),
        (["lr-schedule=constant", "lr-warmup=1"], [0.5, 1, 1, 1]),
        (["lr-decay=0.5"], [1, 0.5, 0.25, 0.125]),
        (["lr-decay=0.5", "lr-step=2"], [1, 1, 0.5, 0.5]),
        (["lr-decay=0.5", "lr-warmup=2"], [1 / 3, 2 / 3, 1, 0.5]),
        (["lr-schedule=cosine"], [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
        (["lr-schedule=cosine", "lr-warmup=2"], [1 / 3, 2 / 3, 1, 0.5]),
    ],
)
def test_rates_over_the_rounds(settings: list[str], factors: list[float]) -> None:
    for section in ("train", "server"):
        config = load_config(None, [f"{section}.{s}" for s in settings])
        found = [getattr(config, section).factor(number, 4) for number in range(1, 5)]
        assert found == pytest.approx(factors)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["federation.clients-per-round=11"], ["clients-per-round = 11", "the 10 clients"]),
        (["federation.min-replies=11"], ["min-replies = 11", "clients-per-round = 10"]),
        (["federation.clients=4", "federation.clients-per-round=5"], ["clients = 4"]),
        (["federation.clients=4", "federation.min-replies=5"], ["min-replies = 5", "clients = 4"]),
        (["privacy.mode=central", "privacy.delta=0.1"], ["1 / federation.clients = 0.1"]),
        (["secagg.enabled=yes", "strategy.name=top", "federation.clients=2"], ["at least 3"]),
    ],
)
def test_what_does_not_fit_a_simulated_federation_is_refused(
    settings: list[str], says: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings).simulated()
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in says if text not in message] == []


def test_a_federation_takes_the_size_it_is_given() -> None:
    config = load_config(None, [])
    assert (config.federation.clients, config.federation.clients_per_round) == (0, 0)
    for size, sized in ((2, config.of_size(2)), (10, config.simulated())):
        assert (sized.federation.clients, sized.federation.clients_per_round) == (size, size)
    assert load_config(None, ["federation.clients=4"]).simulated().federation.cohort == 4
    assert load_config(None, ["federation.clients-per-round=3"]).of_size(5).federation.cohort == 3


@pytest.mark.parametrize(
    ("word", "means"), [("yes", True), ("1", True), ("on", True), ("no", False), ("0", False)]
)
def test_a_boolean_may_be_said_in_other_words(word: str, means: bool) -> None:
    assert load_config(None, [f"strategy.theory={word}"]).strategy.theory is means


def test_a_gpu_is_a_cuda_device() -> None:
    found = [load_config(None, [f"run.device={name}"]).run.device for name in ("gpu", "gpu:1")]
    assert found == ["cuda", "cuda:1"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["privacy.statistics-clip=1.0"], ["statistics-noise = 0", "set both"]),
        (["privacy.statistics-noise=1.0"], ["statistics-clip = 0", "set both"]),
        (
            ["privacy.delta=0.1", "federation.clients=10"],
            ["privacy.delta = 0.1", "1 / federation.clients = 0.1"],
        ),
        (
            ["strategy.name=fedtlu", "strategy.side=client"],
            ["strategy.side = 'client'", "side=server"],
        ),
        (["task.local-test=0.2"], ["task.local-test = 0.2", "set it to 0"]),
        (
            [
                *("strategy.name=random", "strategy.resample-steps=1"),
                *("train.local-steps=0", "train.local-epochs=1"),
            ],
            ["strategy.resample-steps = 1", "train.local-steps"],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["central", "local"])
def test_what_noise_would_not_cover_is_refused(
    mode: str, settings: list[str], says: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(load_config(None, [f"privacy.mode={mode}", *settings]))
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in says if text not in message] == []


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("server.aggregation=median", ["server.aggregation = 'median'", "privacy.mode=local"]),
        ("server.clip=1.0", ["server.clip = 1", "privacy.clip"]),
    ],
)
def test_central_noise_goes_with_the_mean_only(setting: str, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["privacy.mode=central", setting])
    assert [text for text in says if text not in str(caught.value)] == []
    load_config(None, ["privacy.mode=local", setting])


def test_keys_may_have_underscores(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[train]\nlocal_steps = 2\n[task]\nlabel-column = 'a'\n")
    found = load_config(file, ["train.batch_size=4", "task.label_column=1.10"])
    assert (found.train.local_steps, found.train.batch_size) == (2, 4)
    assert found.task.label_column == "1.10"


def test_what_privacy_rules_out_is_allowed_without_it() -> None:
    load_config(None, ["strategy.name=fedtlu", "strategy.side=client", "task.local-test=0.2"])


def test_an_unreadable_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read configuration .*missing\.toml"):
        load_config(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[task\n")
    with pytest.raises(ConfigError, match=r"broken.toml is not valid TOML"):
        load_config(broken)
    deep, digits = tmp_path / "deep.json", tmp_path / "digits.toml"
    deep.write_text("[" * 100_000)
    digits.write_text(f"run.seed = {'9' * 5000}")
    for file, kind in ((deep, "JSON"), (digits, "TOML")):
        with pytest.raises(ConfigError, match=f"{file.name} is not valid {kind}"):
            load_config(file)
    with pytest.raises(ConfigError, match="File name too long"):
        load_config(Path("x" * 300))
    with pytest.raises(ConfigError, match=r"run\.seed"):
        load_config(None, [f"run.seed={'9' * 5000}"])
    for coding in ("latin-1", "utf-16"):
        broken.write_text("# Käse\n[train]\nlr = 0.5\n", encoding=coding)
        with pytest.raises(ConfigError, match=r"broken\.toml is not UTF-8.*; convert it$"):
            load_config(broken)


@pytest.mark.parametrize("text", ["[train]\nlr = 0.5\n", '{"train.lr": 0.5}'])
def test_the_mark_that_windows_begins_files_with_is_left_out(text: str, tmp_path: Path) -> None:
    file = tmp_path / f"x.{'json' if text[0] == '{' else 'toml'}"
    file.write_text(text, encoding="utf-8-sig")
    assert load_config(file).train.lr == 0.5


def test_override_values_are_read_as_toml_and_else_as_text() -> None:
    assert parse_override("a.b=3") == ("a.b", 3)
    assert parse_override("a.b=0.5") == ("a.b", 0.5)
    assert parse_override("a.b=true") == ("a.b", True)
    assert parse_override("a.b=top") == ("a.b", "top")
    assert parse_override('a.b="3"') == ("a.b", "3")
    assert parse_override("a.b=") == ("a.b", "")
    assert parse_override("a.b=.5") == ("a.b", 0.5)
    assert parse_override("a.b=-.5") == ("a.b", -0.5)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("run.name", "42"),
        ("run.name", "2024-05-01"),
        ("task.label-column", "2019"),
        ("task.classes", "1"),
        ("federation.speeds", "4.5"),
    ],
)
def test_a_name_may_look_like_a_number_or_a_date(key: str, name: str, tmp_path: Path) -> None:
    assert load_config(None, [f"{key}={name}"]).to_flat()[key] == name
    if "-" not in name:
        file = tmp_path / "x.toml"
        file.write_text(f"{key} = {name}\n")
        assert load_config(file).to_flat()[key] == name


@pytest.mark.parametrize("name", ["2024_05", "1e5", "0x10", "1.10", ".1"])
def test_a_name_stays_as_it_is_written(name: str) -> None:
    assert load_config(None, [f"run.name={name}", "train.lr=1."]).run.name == name


def test_the_files_that_the_documents_name_are_found_without_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_config(Path("conf/custom.toml"), ["task.data=x"])
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("conf/custom.toml"), ["task.data=x"]) == here
    assert load_config(Path("custom"), ["task.data=x"]) == here
    with pytest.raises(ConfigError, match=r"cannot read configuration conf/custum\.toml"):
        load_config(Path("conf/custum.toml"))
    (tmp_path / "custom").mkdir()
    assert load_config(Path("custom"), ["task.data=x"]) == here, "a folder is no configuration"
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/custom.toml").write_text("train.lr = 0.5\n")
    assert load_config(Path("conf/custom.toml")).train.lr == 0.5, "a file of one's own comes first"
