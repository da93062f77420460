"""Each model family has the paper's layers, loads the named weights, and reports missing ones."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerfed.config import ConfigError, ModelConfig
from layerfed.models.image import build_image_classifier
from layerfed.models.layers import LayerMap
from layerfed.models.source import require
from layerfed.models.text import build_choice_model, build_text_classifier, load_tokenizer
from layerfed.models.weights import in_float32, refuse_not_finite
from tests.small_models import Net, blocks, linear
from tests.task import hub

IMAGES = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weights")
    return {
        "open_clip": hub.clip(root / "clip"),
        "timm": hub.timm_vit(root / "timm"),
        "transformers": hub.xlm_roberta(root / "xlm-r"),
        "llama": hub.llama(root / "llama"),
    }


def image(name: str, weights: object, classes: int = 5, seed: int = 0, **more: bool) -> nn.Module:
    section = hub.config(f"model.name={name}", f"model.weights={weights}").model
    return build_image_classifier(section, classes, seed, **more)


def text(weights: object, classes: int = 5, seed: int = 0, **more: bool) -> nn.Module:
    section = hub.config("model.name=transformers/some/model", f"model.weights={weights}").model
    return build_text_classifier(section, classes, seed, **more)


def same(one: nn.Module, other: nn.Module) -> set[str]:
    theirs = other.state_dict()
    return {name for name, value in one.state_dict().items() if torch.equal(value, theirs[name])}


Builder = Callable[[dict[str, Path], int], nn.Module]
BUILDERS: dict[str, tuple[Builder, set[str]]] = {
    "layerfed": (
        lambda saved, seed: image("layerfed/vit", "embedded", seed=seed),
        {"net.norm.weight", "net.norm.bias", "net.head.weight", "net.head.bias"},
    ),
    "open_clip": (
        lambda saved, seed: image("open_clip/ViT-B-32", saved["open_clip"], seed=seed),
        {
            "net.tower.proj",
            "net.tower.ln_post.weight",
            "net.tower.ln_post.bias",
            "net.head.weight",
            "net.head.bias",
        },
    ),
    "timm": (
        lambda saved, seed: image("timm/vit_tiny_patch16_224", saved["timm"], seed=seed),
        {"net.norm.weight", "net.norm.bias", "net.head.weight", "net.head.bias"},
    ),
    "transformers": (
        lambda saved, seed: text(saved["transformers"], seed=seed),
        {f"classifier.{n}.{t}" for n in ("dense", "out_proj") for t in ("weight", "bias")},
    ),
}


@pytest.mark.parametrize("family", BUILDERS)
def test_the_head_is_the_papers_and_everything_else_frozen_or_selectable(
    family: str, saved: dict[str, Path]
) -> None:
    build, head = BUILDERS[family]
    model = build(saved, 0)
    layers = LayerMap.from_model(model)
    assert set(layers.head.parameters) == head
    assert layers.num_blocks == (12 if family == "layerfed" else 3)
    embeddings = " ".join(layers.embeddings.parameters)
    for name in {"transformers": ["word_embeddings"]}.get(
        family, ["class_embedding" if family == "open_clip" else "cls_token"]
    ):
        assert name in embeddings
    assert {b.kind for b in layers.blocks} == {"block"}


@pytest.mark.parametrize("family", BUILDERS)
def test_two_processes_build_the_same_and_the_seed_draws_the_head_only(
    family: str, saved: dict[str, Path]
) -> None:
    """Defect 11 of the released code; and a client whose base differs would be refused."""
    build, head = BUILDERS[family]
    torch.manual_seed(1)
    first = build(saved, 0)
    after = torch.rand(1)
    torch.manual_seed(2)
    again, other = build(saved, 0), build(saved, 1)
    assert same(first, again) == set(first.state_dict())
    new = set(first.state_dict()) - same(first, other)
    assert new <= head
    assert any(name.endswith("weight") for name in new)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after), "building drew from the global generator"


def test_loaded_weights_are_those_of_the_files(saved: dict[str, Path]) -> None:
    files = {
        "net.tower.": (
            BUILDERS["open_clip"][0](saved, 0),
            "open_clip/open_clip_model.safetensors",
            "visual.",
        ),
        "net.": (BUILDERS["timm"][0](saved, 0), "timm/model.safetensors", ""),
        "roberta.": (BUILDERS["transformers"][0](saved, 0), "transformers/model.safetensors", ""),
    }
    for prefix, (model, file, theirs) in files.items():
        family, name = file.split("/")
        stored = load_file(saved[family] / name)
        found = 0
        for key, value in model.state_dict().items():
            there = theirs + key.removeprefix(prefix)
            if key.startswith(prefix) and there in stored and "head" not in key:
                assert torch.equal(value, stored[there]), key
                found += 1
        assert found > 30


def test_a_folder_in_the_users_home_will_do_for_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    trained = timm.create_model("vit_tiny_patch16_224")
    timm.models.save_for_hf(trained, tmp_path / "mine")
    skeleton = image("timm/vit_tiny_patch16_224", "~/mine", skeleton=True)
    assert len(skeleton.net.blocks) == 12


def test_a_safetensors_file_will_do_for_timm(tmp_path: Path) -> None:
    trained = timm.create_model("vit_tiny_patch16_224")
    file = tmp_path / "timm.safetensors"
    save_file(trained.state_dict(), file)
    model = image("timm/vit_tiny_patch16_224", file)
    assert torch.equal(model.net.blocks[0].mlp.fc1.weight, trained.blocks[0].mlp.fc1.weight)
    skeleton = image("timm/vit_tiny_patch16_224", file, skeleton=True)
    assert LayerMap.from_model(model).shapes == LayerMap.from_model(skeleton).shapes
    with pytest.raises(ConfigError, match="which does not exist; give a folder, a file"):
        image("timm/vit_tiny_patch16_224", "gone.safetensors", skeleton=True)
    with pytest.raises(ConfigError, match=r"should be a \.safetensors file"):
        image("timm/vit_tiny_patch16_224", Path(__file__))


def mixed_up(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"layer{i}": tensor for i, tensor in enumerate(tensors.values())}


FILE_CONTENTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str | None]] = {
    "as is": (lambda tensors: tensors, None),
    "with a prefix": (
        lambda tensors: {f"module.{k}": v for k, v in tensors.items()},
        "prefix 'module.'",
    ),
    "in a checkpoint": (lambda tensors: {"state_dict": tensors, "epoch": 3}, None),
    "in order": (mixed_up, "in the file's order, 'cls_token' first"),
}


# safetensors holds tensors only, and sorts them by name.
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        *itertools.product([".pth", ".bin", ".ckpt"], FILE_CONTENTS),
        (".safetensors", "as is"),
        (".safetensors", "with a prefix"),
    ],
)
def test_weights_of_every_kind_of_file_are_taken(
    kind: str, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, said = FILE_CONTENTS[content]
    trained, file = timm.create_model("vit_tiny_patch16_224"), tmp_path / f"own{kind}"
    save: Callable[..., object] = save_file if kind == ".safetensors" else torch.save
    save(change(trained.state_dict()), file)
    with caplog.at_level("WARNING", "flwr"):
        model = image("timm/vit_tiny_patch16_224", file)
    for name, tensor in trained.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(model.net.state_dict()[name], tensor), name
    assert model.net.head.out_features != trained.head.out_features
    assert (said or "") in caplog.text
    assert bool(caplog.records) == (said is not None)


def test_a_new_head_is_drawn_by_its_inputs(tmp_path: Path) -> None:
    # timm draws this one by its outputs, which are few: scores would start far from 0.
    file = tmp_path / "net.safetensors"
    kept = timm.create_model("test_efficientnet")
    save_file(kept.state_dict(), file)
    head = image("timm/test_efficientnet", file, classes=4).net.classifier
    bound = head.in_features**-0.5
    assert 0.9 * bound < head.weight.abs().max() <= bound
    same_classes = image("timm/test_efficientnet", file, classes=1000).net.classifier
    assert torch.equal(same_classes.weight, kept.classifier.weight)


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """They used to stay random without a word."""
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    del state["blocks.3.mlp.fc1.weight"]
    for file, save in ((tmp_path / "a.safetensors", save_file), (tmp_path / "a.pth", torch.save)):
        save(state, file)
        with pytest.raises(ConfigError, match=r"no weights of the right size for blocks\.3\.mlp"):
            image("timm/vit_tiny_patch16_224", file)


def test_a_folder_that_lacks_weights_is_refused_too(saved: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(saved["timm"] / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved["timm"] / "config.json").read_bytes())
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = image("timm/vit_tiny_patch16_224", tmp_path)
    assert torch.equal(model.net.cls_token, state["cls_token"])
    del state["blocks.1.mlp.fc1.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no weights of the right size for blocks\.1\.mlp"):
        image("timm/vit_tiny_patch16_224", tmp_path)


def test_a_repository_that_lacks_weights_is_refused_too(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm leaves what is missing at random, if the classes are others."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    shutil.copytree(saved["timm"], repository / "snapshots/abc")
    state = load_file(saved["timm"] / "model.safetensors")
    model = image("timm/vit_tiny_patch16_224", "me/vit")
    assert torch.equal(model.net.cls_token, state["cls_token"])
    del state["blocks.1.mlp.fc1.weight"]
    save_file(state, repository / "snapshots/abc/model.safetensors")
    with pytest.raises(ConfigError, match=r"'me/vit' has no weights for blocks\.1\.mlp\.fc1"):
        image("timm/vit_tiny_patch16_224", "me/vit")


def test_a_file_with_code_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "own.pth"
    torch.save(timm.create_model("resnet10t"), file)
    with pytest.raises(ConfigError, match="UnpicklingError"):
        image("timm/resnet10t", file)


def test_a_model_in_half_precision_is_held_in_float32() -> None:
    text = transformers.AutoConfig.for_model("bert", dtype=torch.bfloat16)
    assert text.dtype == torch.bfloat16
    for half in (torch.bfloat16, torch.float16):
        tied = Net(a=linear(), blocks=blocks(2), head=linear()).to(half)
        tied.register_buffer("count", torch.zeros((), dtype=torch.long))
        tied.blocks[1].mix.weight = tied.blocks[0].mix.weight
        found = in_float32(tied)
        assert {p.dtype for p in found.parameters()} == {torch.float32}
        assert found.count.dtype == torch.long
        assert found.blocks[1].mix.weight is found.blocks[0].mix.weight
    odd = linear()
    odd.weight = nn.Parameter(odd.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match=r"weight of the model are in torch\.float8_e4m3fn"):
        in_float32(odd)


def test_weights_that_are_not_finite_are_named() -> None:
    model = Net(a=linear(), blocks=blocks(2), head=linear())
    refuse_not_finite(dict(model.named_parameters()))
    with torch.no_grad():
        model.blocks[1].mix.weight[0, 0] = float("nan")
        model.head.bias[0] = float("-inf")
    with pytest.raises(ConfigError, match=r"NaN or Inf in blocks\.1\.mix\.weight, head\.bias$"):
        refuse_not_finite(dict(model.named_parameters()))


@pytest.mark.parametrize("family", ["layerfed", "open_clip", "timm"])
def test_images_of_any_size_are_scored(family: str, saved: dict[str, Path]) -> None:
    model = BUILDERS[family][0](saved, 0).eval()
    with torch.no_grad():
        assert model(IMAGES).shape == (4, 5)
        assert model(IMAGES[..., :32, :32]).shape == (4, 5)


def test_bytes_are_normalised_as_the_weights_want_it(saved: dict[str, Path]) -> None:
    model = BUILDERS["open_clip"][0](saved, 0)
    seen: list[torch.Tensor] = []
    model.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor([0.5, 0.4, 0.3])) / 0.2
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), expected)
    # Enlarging keeps a flat image flat, and never leaves the range of a picture.
    model(IMAGES)
    assert seen[1].shape == (4, 3, 32, 32)
    low, high = -torch.tensor([0.5, 0.4, 0.3]) / 0.2, expected
    assert (seen[1].amax((0, 2, 3)) <= high + 1e-5).all()
    assert (seen[1].amin((0, 2, 3)) >= low - 1e-5).all()


@pytest.mark.parametrize(("name", "last"), [("test_efficientnet", True), ("test_vit", False)])
def test_channels_lie_side_by_side_where_that_is_faster(name: str, last: bool) -> None:
    """And the scores are those of the plain network."""
    config = ModelConfig(name=f"timm/{name}", weights="random")
    model = build_image_classifier(config, 4, 0, kept=64).eval()
    seen: list[torch.Tensor] = []
    model.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = model(IMAGES[..., :64, :64])
    assert seen[0].is_contiguous(memory_format=torch.channels_last) is last
    assert seen[0].is_contiguous() is not last
    plain = model.net(seen[0].contiguous())
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_random_weights_come_by_choice_only(saved: dict[str, Path]) -> None:
    random, loaded = image("layerfed/vit", "random"), image("layerfed/vit", "embedded")
    assert not {n for n in same(random, loaded) if n.endswith("qkv.weight")}
    section = hub.config(
        f"model.name=transformers/{saved['transformers']}", "model.weights=random"
    ).model
    drawn = build_text_classifier(section, 5, 0)
    assert not any("query.weight" in n for n in same(drawn, text(saved["transformers"])))
    assert same(drawn, build_text_classifier(section, 5, 0)) == set(drawn.state_dict())


def test_weights_that_lack_some_of_the_base_are_refused(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    stored = load_file(saved["transformers"] / "model.safetensors")
    lost = [name for name in stored if "encoder.layer.1.output.dense" in name]
    assert lost
    kept = {name: tensor for name, tensor in stored.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((saved["transformers"] / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"no weights of the right size for .*layer\.1\.output"):
        text(tmp_path)


def test_a_language_model_without_its_output_layer_is_refused(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    stored = load_file(saved["llama"] / "model.safetensors")
    stored.pop("lm_head.weight")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((saved["llama"] / "config.json").read_text())
    section = hub.config("model.name=transformers/x/y", f"model.weights={tmp_path}").model
    with pytest.raises(ConfigError, match=r"no weights of the right size for lm_head\.weight"):
        build_choice_model(section, [0, 1], 0)


def test_a_pickle_that_holds_more_than_weights_is_not_run(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (ran,)

    for family in ("open_clip", "transformers"):
        folder = tmp_path / family
        folder.mkdir()
        names = {"open_clip": "open_clip_config.json", "transformers": "config.json"}
        (folder / names[family]).write_text((saved[family] / names[family]).read_text())
        file = {"open_clip": "open_clip_pytorch_model.bin", "transformers": "pytorch_model.bin"}[
            family
        ]
        torch.save({"weight": Evil()}, folder / file)
        build = text if family == "transformers" else lambda path: image("open_clip/ViT-B-32", path)
        with pytest.raises(ConfigError, match="cannot load"):
            build(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("open_clip/ViT-B-33", "openai", ["ViT-B-33", "ViT-B-32"]),
        ("open_clip/ViT-B-32", "nonsense", ["'nonsense'", "datacomp_xl_s13b_b90k", "random"]),
        ("open_clip/ViT-B-32", "laion/none", ["hf download laion/none ", "model.weights=DIR"]),
        (
            "open_clip/ViT-B-32",
            "datacomp_xl_s13b_b90k",
            ["hf download laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K ", "model.weights=random"],
        ),
        (
            "open_clip/ViT-B-32",
            "/nowhere/clip",
            ["model.weights names '/nowhere/clip'", "not exist"],
        ),
        ("timm/vit_tiny_patch16_224", "~/nowhere", ["model.weights names '~/nowhere'"]),
        ("timm/vit_tinny", "pretrained", ["timm has no 'vit_tinny'; did you mean"]),
        ("timm/vit_tiny_patch16_224", "timm/none", ["hf download timm/none "]),
        (
            "timm/vit_tiny_patch16_224",
            "pretrained",
            ["hf download timm/vit_tiny_patch16_224 ", "model.weights=random"],
        ),
    ],
)
def test_image_models_that_are_not_there_are_named(
    name: str, weights: str, says: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        image(name, weights)
    assert "\n" not in str(caught.value)
    assert [part for part in says if part not in str(caught.value)] == []


@pytest.mark.parametrize("build", [lambda s: build_choice_model(s, [0, 1], 0), load_tokenizer])
@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (
            "pretrained",
            "`hf download meta-llama/Llama-2-7b-hf --local-dir DIR` on a machine with one, "
            "and set model.weights=DIR",
        ),
        ("some/other", "`hf download some/other --local-dir DIR`"),
        # The architecture's sizes are not known without its configuration.
        (
            "random",
            "`hf download meta-llama/Llama-2-7b-hf --include '*.json' --local-dir DIR` on a "
            "machine with one, and set model.name=transformers/DIR",
        ),
        ("./nowhere", "model.weights names './nowhere', which does not exist"),
    ],
)
def test_text_models_that_are_not_there_are_named(
    build: Callable[[ModelConfig], object], weights: str, says: str
) -> None:
    name = "model.name=transformers/meta-llama/Llama-2-7b-hf"
    with pytest.raises(ConfigError) as caught:
        build(hub.config(name, f"model.weights={weights}").model)
    assert says in str(caught.value)
    assert "model.weights=random" not in str(caught.value)


def test_a_tokenizer_of_its_own_is_named_by_its_own_setting(tmp_path: Path) -> None:
    given = ["model.name=transformers/x", f"model.weights={tmp_path}"]
    with pytest.raises(ConfigError, match=r"Give a folder as .* \(model\.tokenizer\)"):
        load_tokenizer(hub.config(*given).model)
    with pytest.raises(ConfigError, match=r"hf download some/words .* model\.tokenizer=DIR"):
        load_tokenizer(hub.config(*given, "model.tokenizer=some/words").model)


def test_a_tower_that_gives_more_than_its_output_is_cut_to_it() -> None:
    """CoCa's also gives the tokens that its text decoder reads."""
    layers = LayerMap.from_model(image("open_clip/coca_ViT-B-32", "random", skeleton=True))
    assert layers.num_blocks == 12


def test_a_gated_model_says_where_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    with pytest.raises(
        ConfigError, match=r"ask for access at https://huggingface\.co/some/model.*hf auth"
    ):
        text("pretrained")


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r'pip install "\.\[clip\]" in the clone'):
        require("open_clip", "open_clip/ViT-B-32")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.name=vit"], "model.name = 'vit'"),
        (["model.name=torchhub/x"], "model.name = 'torchhub/x'"),
        (["model.weights=imagenet"], "layerfed/vit"),
        (["model.name=timm/resnet18"], "model.weights = 'embedded' goes with"),
        (["model.tokenizer=x"], "model.tokenizer = 'x' has no use"),
    ],
)
def test_models_that_cannot_be_are_refused_with_the_configuration(
    overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        hub.config(*overrides)
    assert says in str(caught.value)


# ----------------------------------------------------------------------------------- skeletons
@pytest.mark.parametrize("family", BUILDERS)
def test_a_skeleton_has_the_layers_of_the_model(family: str, saved: dict[str, Path]) -> None:
    names = {"open_clip": "ViT-B-32", "timm": "vit_tiny_patch16_224", "layerfed": "vit"}
    weights = saved.get(family, "embedded")
    skeleton = (
        text(weights, skeleton=True)
        if family == "transformers"
        else image(f"{family}/{names[family]}", weights, skeleton=True)
    )
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    ours = LayerMap.from_model(BUILDERS[family][0](saved, 0))
    assert ours.shapes == LayerMap.from_model(skeleton).shapes


def test_the_layers_of_llama_2_7b_without_its_weights(tmp_path: Path) -> None:
    """The published sizes: 32 blocks of 202 M parameters, width 4096, vocabulary 32,000."""
    shape = transformers.LlamaConfig()
    (tmp_path / "config.json").write_text(json.dumps(shape.to_dict()))
    section = hub.config(
        "model.name=transformers/meta-llama/Llama-2-7b-hf", f"model.weights={tmp_path}"
    ).model
    layers = LayerMap.from_model(build_choice_model(section, range(5), 0, skeleton=True))
    assert layers.num_blocks == 32
    assert {block.elements for block in layers.blocks} == {202_383_360}
    assert layers.embeddings.elements == 32_000 * 4096
    assert layers.head.elements == 4096 + 5 * 4096


def test_the_layers_of_clip_vit_b_32_and_xlm_r_base_without_their_weights(tmp_path: Path) -> None:
    layers = LayerMap.from_model(
        image("open_clip/ViT-B-32", "datacomp_xl_s13b_b90k", 10, skeleton=True)
    )
    assert layers.num_blocks == 12
    assert {block.elements for block in layers.blocks} == {7_087_872}
    assert layers.head.elements == 768 * 512 + 2 * 768 + 512 * 10 + 10
    shape = transformers.XLMRobertaConfig(
        vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1
    )
    (tmp_path / "config.json").write_text(json.dumps(shape.to_dict()))
    layers = LayerMap.from_model(text(tmp_path, 10, skeleton=True))
    assert layers.num_blocks == 12
    assert {block.elements for block in layers.blocks} == {7_087_872}
    assert layers.head.elements == 768 * 768 + 768 + 768 * 10 + 10


@pytest.mark.parametrize(("name", "kind"), [("timm/x", "timm"), ("open_clip/x", "open_clip")])
def test_a_vit_reads_another_size_by_interpolated_positions(
    name: str, kind: str, saved: dict[str, Path]
) -> None:
    section = hub.config(f"model.name={name}", f"model.weights={saved[kind]}").model
    larger = section.model_copy(update={"image_size": 64})
    before, after = (build_image_classifier(s, 5, 0).state_dict() for s in (section, larger))
    other = [n for n in before if before[n].shape != after[n].shape]
    [positions] = other
    drawn = {n for n in before if n.startswith("net.head.")}
    assert all(torch.equal(before[n], after[n]) for n in before.keys() - {positions} - drawn)
    # Four patches became sixteen; each keeps the mean of its four, up to the bicubic filter.
    small, large = (x[positions].reshape(-1, x[positions].shape[-1])[1:] for x in (before, after))
    assert (len(small), len(large)) == (4, 16)
    torch.testing.assert_close(large.mean(0), small.mean(0), rtol=0, atol=1e-4)
