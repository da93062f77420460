"""Images in the hub's layout and in folders: decoded once, shared, and refused if they are wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from datasets import ClassLabel, Image, Value
from PIL import Image as Pixels

from layerfed.config import ConfigError
from layerfed.task import Examples, Task, images
from layerfed.task.partition import MIN_EXAMPLES
from tests.task import hub
from tests.task.hub import refused, whole

CLIENTS = ["federation.clients=4", "federation.clients-per-round=2"]
DOMAINS = ("clipart", "real", "sketch")
# An image of a game whose compression nobody knows: its decoder has an exception of its own.
NO_BLP = struct.pack("<4sI4s2I", b"BLP2", 128, b"\1", 16, 16) + bytes(1400)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.cifar10(tmp_path_factory.mktemp("cifar10"))


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"{d}/{c}" for d in DOMAINS for c in ("bird", "zebra", "axe")]
    return hub.image_files(tmp_path_factory.mktemp("domainnet"), names, 12)


def cifar_task(data: Path, *more: str) -> Task:
    return hub.task("task.name=cifar10", f"task.data={data}", "task.alpha=5", *CLIENTS, *more)


def domain_task(data: Path, *more: str) -> Task:
    groups = f"task.groups={','.join(DOMAINS)}"
    kept = ["task.classes=bird,zebra", "task.partition=by-column", "task.image-size=8", groups]
    return hub.task("task.name=domainnet", f"task.data={data}", *kept, *more)


# ------------------------------------------------------------------------------------ CIFAR-10
def test_images_and_labels_are_those_of_the_files(cifar: Path) -> None:
    test = whole(cifar_task(cifar).test_examples())
    assert test["label"].tolist() == [i % 10 for i in range(20)]
    for i, image in enumerate(test["image"]):
        np.testing.assert_array_equal(
            image.permute(1, 2, 0).numpy(), np.asarray(hub.noise(10_000 + i))
        )


def test_clients_share_one_store_and_no_row(cifar: Path) -> None:
    """Defect 9 of the released code; and no client holds a copy of the data."""
    found = cifar_task(cifar)
    parts = [found.partition(i) for i in range(4)]
    assert sorted(np.concatenate([part.indices for part in parts])) == list(range(120))
    assert len({id(part.store) for part in parts}) == 1
    # Nor does splitting off local examples copy any.
    held = cifar_task(cifar, "task.local-test=0.2").client_examples(0)
    assert held[0].store is held[1].store


def test_a_second_process_decodes_nothing_and_finds_the_same(
    cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 10 of the released code: partitions and preprocessing were made again on every load."""
    first = whole(cifar_task(cifar).partition(2))

    def decoded(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(images, "open_image", decoded)
    again = whole(cifar_task(cifar).partition(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(AssertionError, match="decoded again"):
        cifar_task(cifar, "task.image-size=16").partition(2)


def test_files_that_change_are_read_anew(tmp_path: Path) -> None:
    names = ["a", "b"]
    data = hub.image_files(tmp_path, names, 12)
    overrides = [
        "task.name=custom",
        f"task.data={data}",
        "task.image-size=8",
        "task.alpha=5",
        *CLIENTS,
    ]

    def pixels() -> torch.Tensor:
        found = hub.task(*overrides, "federation.clients=2")
        return torch.cat([whole(found.partition(i))["image"] for i in range(2)])

    before = pixels()
    hub.noise(99).save(data / "a/000.png")
    hub.noise(99).save(data / "a/001.png")
    assert not torch.equal(before, pixels())


def test_a_shuffled_stream_of_a_share_shows_its_rows_only(cifar: Path) -> None:
    part = cifar_task(cifar).partition(1)
    stream = part.shuffled(7, torch.device("cpu"), np.random.default_rng(0))
    batches = [next(stream) for _ in range(-(-len(part) // 7))]
    labels = torch.cat([batch["label"] for batch in batches])
    assert sorted(labels.tolist()) == sorted(whole(part)["label"].tolist())


@pytest.mark.parametrize(
    ("columns", "kinds", "says"),
    [
        ({"label": [0] * 9}, {"label": ClassLabel(names=hub.CIFAR)}, ["img", "task.input-columns"]),
        ({"img": [hub.noise(0)] * 9}, {"img": Image()}, ["'train'", "label", "task.label-column"]),
        (
            {"img": [hub.noise(0)] * 9, "label": [0] * 8 + [-1]},
            {"img": Image(), "label": ClassLabel(names=hub.CIFAR)},
            ["split 'train'", "row 8", "label = -1", "airplane"],
        ),
        (
            {"img": [hub.noise(0)] * 9, "label": ["cat"] * 8 + ["unicorn"]},
            {"img": Image()},
            ["airplane", "is not in", "cat, unicorn"],
        ),
        (
            {"img": [hub.noise(0)] * 9, "label": ["cat"] * 7 + ["dog", None]},
            {"img": Image()},
            ["row 8", "label = None", "cat"],
        ),
        (
            {"img": [{"bytes": b"no image", "path": "x.png"}] * 9, "label": [1] * 9},
            {"img": Image(), "label": ClassLabel(names=hub.CIFAR)},
            ["row 0", "x.png", "cannot be decoded"],
        ),
        (
            {"img": [{"bytes": NO_BLP, "path": "x.blp"}] * 9, "label": [1] * 9},
            {"img": Image(), "label": ClassLabel(names=hub.CIFAR)},
            ["row 0", "x.blp", "cannot be decoded"],
        ),
        (
            {"img": [None] * 9, "label": [1] * 9},
            {"img": Image(), "label": ClassLabel(names=hub.CIFAR)},
            ["row 0", "the image is missing"],
        ),
        (
            {"img": [1] * 9, "label": [1] * 9},
            {"img": Value("int64"), "label": ClassLabel(names=hub.CIFAR)},
            ["column 'img'", "not images or paths", "task.input-columns"],
        ),
    ],
    ids=[
        "no image",
        "no label",
        "unlabelled",
        "strings",
        "null",
        "corrupt",
        "BLP",
        "missing",
        "numbers",
    ],
)
def test_wrong_rows_are_named_before_anyone_works(
    columns: dict[str, list[object]], kinds: dict[str, object], says: list[str], tmp_path: Path
) -> None:
    hub.parquet(tmp_path / "train-00000-of-00001.parquet", columns, **kinds)
    classes = ["task.classes=all"] if says[0] == "row 8" else []
    refused(lambda: cifar_task(tmp_path, *classes), *says)


def test_data_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    refused(lambda: cifar_task(tmp_path / "nowhere"), "task.data", "nowhere", "hub id")
    refused(
        lambda: hub.task("task.name=cifar10", "task.data=uoft-cs/none"),
        "uoft-cs/none",
        "hf download uoft-cs/none",
        "task.data=DIR",
    )
    refused(
        lambda: hub.task("task.name=cifar10", "task.data=uoft-cs/none:some"),
        "hf download uoft-cs/none --repo-type",
    )
    refused(lambda: cifar_task(tmp_path), "cannot read task.data", str(tmp_path))


def test_a_split_that_does_not_exist_is_refused(cifar: Path) -> None:
    refused(
        lambda: cifar_task(cifar, "task.train-split=dev"), "task.train-split = 'dev'", "train, test"
    )


# ----------------------------------------------------------------------------------- DomainNet
def test_a_client_holds_one_domain_and_all_clients_all_images(domains: Path) -> None:
    found = domain_task(domains, "federation.clients=5", "federation.clients-per-round=2")
    parts = [found.partition(i) for i in range(5)]
    groups = parts[0].store.column("group")  # type: ignore[attr-defined]
    held = [set(groups[part.indices]) for part in parts]
    assert [len(group) for group in held] == [1] * 5
    assert [min(group) for group in held] == [0, 0, 1, 1, 2]
    everything = np.concatenate([part.indices for part in parts])
    assert len(set(everything)) == len(everything)
    test = found.test_examples()
    assert not set(everything) & set(test.indices)
    # Two of three classes, a fifth held out.
    assert (len(everything), len(test)) == (58, 14)
    assert set(whole(test)["label"].tolist()) == {0, 1}


def test_the_held_out_share_is_the_same_for_every_seed(domains: Path) -> None:
    three = ["federation.clients=3", "federation.clients-per-round=3"]
    first, other = (domain_task(domains, *three, f"run.seed={s}") for s in (1, 2))
    assert np.array_equal(first.test_examples().indices, other.test_examples().indices)
    bigger = domain_task(domains, *three, "task.test-share=0.5").test_examples()
    assert len(bigger) == 36


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.groups=clipart,quickdraw", ["'quickdraw'", "clipart, real, sketch"]),
        ("task.classes=bird,unicorn", ["'unicorn'", "axe, bird, zebra", "task.classes"]),
        ("federation.clients=2", ["federation.clients = 2", "3 groups", "clipart"]),
        ("federation.clients=12", ["group 'clipart'", f"fewer than {MIN_EXAMPLES} each"]),
    ],
)
def test_wrong_choices_of_domains_and_classes_are_refused(
    domains: Path, override: str, says: list[str]
) -> None:
    few = ["federation.clients=3", "federation.clients-per-round=2"]
    refused(lambda: domain_task(domains, *few, override), *says)


def test_a_domain_without_the_chosen_classes_is_named(domains: Path, tmp_path: Path) -> None:
    data = hub.image_files(tmp_path, ["clipart/bird", "real/zebra", "sketch/axe"], 12)
    three = ["federation.clients=3", "federation.clients-per-round=3"]
    refused(lambda: domain_task(data, *three), "no examples of 'sketch'", "bird", "task.groups")


def test_the_hubs_copy_names_domains_by_number(tmp_path: Path) -> None:
    domain = ClassLabel(names=list(DOMAINS))
    for split, count in (("train", 60), ("test", 12)):
        columns: dict[str, list[object]] = {
            "image": [hub.noise(i) for i in range(count)],
            "label": [i % 2 for i in range(count)],
            "domain": [i % 3 for i in range(count)],
        }
        kinds = {"image": Image(), "label": ClassLabel(names=["bird", "zebra"]), "domain": domain}
        hub.parquet(tmp_path / f"data/{split}-00000-of-00001.parquet", columns, **kinds)
    found = domain_task(tmp_path, "federation.clients=3", "federation.clients-per-round=3")
    for client in range(3):
        part = found.partition(client)
        assert sorted(part.indices) == list(range(client, 60, 3))
    assert len(found.test_examples()) == 12


# -------------------------------------------------------------------------------------- custom
def custom(data: Path, *more: str) -> Task:
    return hub.task(
        "task.name=custom",
        f"task.data={data}",
        "task.image-size=8",
        "task.alpha=5",
        *CLIENTS,
        *more,
    )


def test_folders_for_splits_are_kept_apart(tmp_path: Path) -> None:
    hub.image_files(tmp_path / "train", ["cat", "dog"], 30)
    hub.image_files(tmp_path / "test", ["cat", "dog"], 5, "jpg")
    found = custom(tmp_path)
    assert sum(len(found.partition(i)) for i in range(4)) == 60
    assert whole(found.test_examples())["label"].tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("Training", "Testing"), ("train", "val")]
)
def test_folders_for_splits_go_by_many_names(train: str, test: str, tmp_path: Path) -> None:
    for split, count in ((train, 30), (test, 5)):
        hub.image_files(tmp_path / split, ["cat", "dog"], count)
    found = custom(tmp_path)
    assert sum(len(found.partition(i)) for i in range(4)) == 60
    assert len(found.test_examples()) == 10
    assert found.groups == ()  # type: ignore[attr-defined]
    where = [part.where for parts in found.parts for part in parts]  # type: ignore[attr-defined]
    assert where == [str(tmp_path / train), str(tmp_path / test)]
    named = custom(tmp_path, f"task.train-split={test}", f"task.test-split={train}")
    assert len(named.test_examples()) == 60


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    hub.image_files(tmp_path, ["bus", "train"], 30)
    assert custom(tmp_path).classes == ("bus", "train")  # type: ignore[attr-defined]
    hub.image_files(tmp_path / "train", ["express"], 1)
    refused(lambda: custom(tmp_path), "are for splits", "bus holds images too")


def test_a_table_of_paths_is_read_from_its_folder(tmp_path: Path) -> None:
    hub.image_files(tmp_path, ["pictures"], 80)
    lines = [f"pictures/{i:03}.png,{['no', 'yes'][i % 2]},{i % 4}" for i in range(80)]
    file = tmp_path / "table.csv"
    file.write_text("\n".join(["photo,ill,hospital", *lines]))
    columns = ["task.input-columns=photo", "task.label-column=ill"]
    found = custom(file, *columns, "task.group-column=hospital", "task.partition=by-column")
    assert [sorted({i % 4 for i in found.partition(c).indices}) for c in range(4)] == [
        [0],
        [1],
        [2],
        [3],
    ]
    (tmp_path / "pictures/017.png").unlink()
    file.write_text(file.read_text() + "\n")
    refused(lambda: custom(file, *columns), "row 17", "017.png", "cannot be decoded")
    refused(lambda: custom(file, "task.input-columns=photos"), "'photos'", "photo, ill, hospital")
    two = ["task.input-columns=photo,ill", "task.label-column=ill"]
    refused(lambda: custom(file, *two), "'photo,ill' names 2 columns", "from one")
    refused(lambda: custom(file, *columns, "task.group-column=ward"), "'ward'", "task.group-column")


@pytest.mark.parametrize("text", ["fine", "word " * 900], ids=["short", "long"])
def test_text_is_no_path_of_an_image(text: str, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i in range(9)))
    chosen = "task.input-columns=text"
    refused(lambda: custom(file, chosen), "column 'text' is text", "model.name", chosen[:18])


def test_images_without_a_class_and_layouts_too_deep_are_refused(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    hub.noise(0).save(tmp_path / "flat/a.png")
    refused(lambda: custom(tmp_path / "flat"), "have no class", "GROUP/CLASS/")
    deep = hub.image_files(tmp_path / "deep", ["a/b/c/d"], 1)
    refused(lambda: custom(deep), "have no class", "GROUP/CLASS/")


def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    mixed = hub.image_files(tmp_path / "mixed", ["cat", "ward/dog"], 1)
    refused(lambda: custom(mixed), "CLASS/ and others in GROUP/CLASS/")
    both = hub.image_files(tmp_path / "both", ["cat", "dog"], 1)
    (both / "table.csv").write_text("image,label\n")
    refused(lambda: custom(both), "holds images and tables", "table.csv")


@pytest.mark.parametrize("suffix", ["jfif", "JPG", "jp2", "ppm", "tga", "ico"])
def test_all_kinds_of_images_are_read(suffix: str, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(24):
            hub.noise(i).save(tmp_path / f"{name}/{i}.{suffix}")
    found = custom(tmp_path)
    assert found.classes == ("cat", "dog")  # type: ignore[attr-defined]
    assert sum(len(found.partition(i)) for i in range(4)) == 38


def test_what_systems_hide_is_no_class_and_no_image(tmp_path: Path) -> None:
    hub.image_files(tmp_path, ["cat", "dog", ".ipynb_checkpoints"], 24)
    for name in ("cat/._000.png", "cat/.DS_Store", "dog/Thumbs.db", "README.md"):
        (tmp_path / name).write_bytes(b"no image")
    found = custom(tmp_path)
    assert found.classes == ("cat", "dog")  # type: ignore[attr-defined]
    assert sum(len(found.partition(i)) for i in range(4)) == 38


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    hub.image_files(tmp_path / "elsewhere", ["cat", "dog"], 24)
    data = tmp_path / "data"
    data.mkdir()
    (data / "cat").symlink_to(tmp_path / "elsewhere/cat")
    (data / "dog").mkdir()
    for i in range(24):
        (data / f"dog/{i}.png").symlink_to(tmp_path / f"elsewhere/dog/{i:03}.png")
    assert sum(len(custom(data).partition(i)) for i in range(4)) == 38
    (tmp_path / "elsewhere/dog/007.png").unlink()
    refused(lambda: custom(data), "dog/7.png", "cannot be decoded")
    (data / "dog/in").symlink_to(data)
    refused(lambda: custom(data), str(data / "dog/in"), "links to a folder that it is in")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("fox/1.heic", ["fox/1.heic", "not an image", "convert it"]),
        ("cat/1.heic", ["cat/1.heic", "not an image", "convert it"]),
        ("fox/deep/1.svg", ["fox", "holds no images"]),
        ("fox/.keep", ["fox", "holds no images", "remove the folder"]),
    ],
)
def test_a_class_does_not_vanish(wrong: str, says: list[str], tmp_path: Path) -> None:
    hub.image_files(tmp_path, ["cat", "dog"], 24)
    (tmp_path / wrong).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / wrong).touch()
    refused(lambda: custom(tmp_path), *says)


def test_a_class_of_the_test_folder_alone_is_named(tmp_path: Path) -> None:
    hub.image_files(tmp_path / "train", ["cat", "dog"], 30)
    hub.image_files(tmp_path / "test", ["cat", "fox"], 5)
    refused(lambda: custom(tmp_path), str(tmp_path / "test"), "label = 'fox'", "cat, dog")


def test_a_path_of_images_is_no_pattern(tmp_path: Path) -> None:
    hub.image_files(tmp_path / "x1", ["cat", "dog"], 5)
    hub.image_files(tmp_path / "x[12]", ["cat", "dog"], 24)
    assert sum(len(custom(tmp_path / "x[12]").partition(i)) for i in range(4)) == 38
    lines = [f"{'cd'[i % 2]}/{i}.png,{'cd'[i % 2]}\n" for i in range(80)]
    table = tmp_path / "x[12]/a*b"
    table.mkdir()
    for line in lines:
        file = table / line.partition(",")[0]
        file.parent.mkdir(exist_ok=True)
        hub.noise(1).save(file)
    (table / "train.csv").write_text("image,label\n" + "".join(lines))
    assert sum(len(custom(table / "train.csv").partition(i)) for i in range(4)) == 64


def test_without_data_custom_says_what_it_needs() -> None:
    refused(lambda: hub.task("task.name=custom"), "task.data", "folder")


# ------------------------------------------------------------------------------------ settings
def test_settings_that_a_task_does_not_read_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.classes = 'a' has no use .*'digits'"):
        hub.task("task.classes=a")
    with pytest.raises(ConfigError, match=r"does not fit task\.name = 'cifar10'.*open_clip"):
        hub.task("task.name=cifar10", "model.name=transformers/x", "model.weights=random")
    with pytest.raises(ConfigError, match=r"by-column.*have no groups"):
        hub.task("task.partition=by-column").partition(0)


# ------------------------------------------------------------------------- a group held out
def rows_of(examples: Examples) -> list[int]:
    return sorted(np.unique(examples.column("group")).tolist())


@pytest.mark.parametrize("partition", ["by-column", "iid"])
@pytest.mark.parametrize("held_out", DOMAINS)
def test_no_client_trains_on_a_group_that_is_held_out_and_the_server_tests_on_it(
    held_out: str, partition: str, domains: Path
) -> None:
    more = (f"task.holdout-group={held_out}", f"task.partition={partition}", *CLIENTS)
    task = domain_task(domains, *more)
    parts = [task.partition(i) for i in range(4)]
    gone = DOMAINS.index(held_out)
    others = [i for i in range(3) if i != gone]
    assert sorted({g for part in parts for g in rows_of(part)}) == others
    if partition == "by-column":
        assert [rows_of(part) for part in parts] == [[others[0]]] * 2 + [[others[1]]] * 2
    test = task.test_examples()
    assert rows_of(test) == [gone]
    # Without a split for tests it is all of the group: two classes of twelve images; and clients train
    # on all of the others.
    assert (len(test), sum(map(len, parts))) == (24, 48)


def test_of_a_split_for_tests_the_server_takes_the_held_out_group(tmp_path: Path) -> None:
    names = [f"{s}/{d}/{c}" for s in ("train", "test") for d in DOMAINS for c in ("bird", "zebra")]
    data = hub.image_files(tmp_path / "data", names, 10)
    settings = ("task.name=custom", f"task.data={data}", "task.image-size=8", *CLIENTS)
    task = hub.task(*settings, "task.holdout-group=real", "task.partition=iid")
    test = task.test_examples()
    assert (len(test), rows_of(test)) == (20, [1])
    assert sum(len(task.partition(i)) for i in range(4)) == 40
    # A node's own rows of the group are left out too.
    task.own_data = True
    assert rows_of(task.own_examples()) == [0, 2]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["task.holdout-group=skech"], "did you mean sketch?"),
        (["task.holdout-group=real", "task.groups=real"], "two or more groups; there are real"),
    ],
)
def test_a_group_that_cannot_be_held_out_is_refused(
    settings: list[str], says: str, domains: Path
) -> None:
    refused(lambda: domain_task(domains, *CLIENTS, *settings), settings[0].split("=")[0], says)


def test_a_task_without_groups_cannot_hold_one_out(cifar: Path) -> None:
    refused(lambda: cifar_task(cifar, "task.holdout-group=real"), "there are none")
    refused(lambda: hub.task("task.holdout-group=real"), "has no use for task.name = 'digits'")


# ----------------------------------------------------------------- as the model's weights saw them
@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tall and wide photos, whose longer sides do not scale to whole pixels."""
    root = tmp_path_factory.mktemp("photos")
    for name, size in (("a", (53, 40)), ("b", (40, 71))):
        (root / name).mkdir()
        for i in range(10):
            hub.noise(i, size).save(root / name / f"{i}.png")
    return root


def timm_transform(folder: Path) -> Callable[[Pixels.Image], torch.Tensor]:
    net = timm.create_model(f"local-dir:{hub.timm_vit(folder)}")
    return timm.data.create_transform(**timm.data.resolve_model_data_config(net))


def clip_transform(folder: Path) -> Callable[[Pixels.Image], torch.Tensor]:
    return open_clip.create_model_and_transforms(f"local-dir:{hub.clip(folder)}")[2]


@pytest.mark.parametrize(
    ("name", "plain"), [("timm/x", timm_transform), ("open_clip/x", clip_transform)]
)
def test_the_model_sees_an_image_as_its_own_library_shows_it(
    name: str,
    plain: Callable[[Path], Callable[[Pixels.Image], torch.Tensor]],
    photos: Path,
    tmp_path: Path,
) -> None:
    transform = plain(tmp_path / "model")
    more = [f"model.name={name}", f"model.weights={tmp_path / 'model'}", "federation.clients=2"]
    found = hub.task("task.name=custom", f"task.data={photos}", "task.alpha=5", *more)
    batch, classifier = whole(Examples.of(found._tables[0])), found.build_model()
    seen = []
    classifier.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found.logits(classifier, batch)
    files = [photos / label / f"{i}.png" for label in "ab" for i in range(10)]
    expected = torch.stack([transform(Pixels.open(file)) for file in files])
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "kept", "computes"),
    [
        (["model.name=layerfed/vit"], 32, 32),
        (["task.image-size=48"], 48, 32),
        (["model.name=timm/resnet18", "model.weights=random"], 224, 224),
        (["model.name=timm/resnet18", "model.weights=random", "task.image-size=48"], 48, 48),
        (["model.name=timm/resnet18", "model.weights=random", "model.image-size=64"], 64, 64),
        (
            [
                *("model.name=timm/vit_tiny_patch16_224", "model.weights=random"),
                *("task.image-size=48", "model.image-size=64"),
            ],
            48,
            64,
        ),
    ],
)
def test_the_size_follows_the_model_unless_it_is_chosen(
    settings: list[str], kept: int, computes: int, photos: Path
) -> None:
    found = hub.task("task.name=custom", f"task.data={photos}", *settings)
    assert found.example()["image"].shape[-1] == kept
    net, seen = found.build_model(), []
    net.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    assert found.logits(net, found.example()).shape == (1, 2)
    assert seen == [computes]
    assert f"computes at {computes}×{computes}" in found.summary()
    described = found.preprocessing()
    assert (described["crop"], described["size"]) == (kept, computes)


def test_cifar10_is_kept_as_it_is_and_enlarged(cifar: Path) -> None:
    found = cifar_task(cifar, "model.name=timm/resnet18", "model.weights=random")
    assert (found.kept, found.resized, found.model_reads.size) == (32, 32, 224)
