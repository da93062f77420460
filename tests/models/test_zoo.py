"""Many architectures: how each is split, and that backward ends where it should.

python -m tests.models.test_zoo      # renews docs/models.md
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerfed.client.training import selected_layers, train_layers
from layerfed.digests import digest, fingerprint
from layerfed.models.layers import LayerMap, LayerMapError
from tests.models.zoo import ZOO, Entry

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"

RULES = """# Models

How LayerFed splits models, and which models it splits. `layerfed layers CONF` prints the split of a
configuration's model.

## The rules

One forward pass of an example shows how a model uses its tensors.

- **Blocks** are the model's stack of layers, in order of use. In a model with stages they are the
  residual blocks of all stages. The blocks of an encoder come before those of its decoder. In VGG and
  AlexNet the blocks are the convolutions.
- **Embeddings** are the tensors that several blocks or the first block use, wherever they are
  registered, and tensors that the example does not use. So is a table in the first block that it hands
  on to the others, such as the relative positions of T5 and WavLM.
- **The head** is what only the result uses: the final norm, pooling and classifier.
- A tensor **between two blocks** belongs to the block after it, so a downsampler trains with the block
  that reads it. The norm of a single convolution belongs to that convolution. Tables of embeddings stay
  frozen.

`model.blocks`, `model.head` and `model.embeddings` override these rules by names or patterns. LayerFed
refuses a split in which a step on the head would reach a block, or a step on a block would reach
something below it.

**Halves of blocks.** `model.units = "attention-mlp"` selects the attention and the MLP of a block apart: a ViT of 12 blocks
has 24 layers `blocks.0` … `blocks.23`, and a budget in parameters or bytes decides between them. A norm before the attention
goes with the attention; what lies between the two, and what follows the MLP in the block, goes with the MLP. An attention
is recognised by its name or class, and must come before the MLP. Patterns of modules inside the blocks name other parts:
`model.units = "blocks.*.attn, blocks.*.mlp.fc1, blocks.*.mlp.fc2"`. What no pattern names goes with the next part of its
block, or with the last.

A task of your own returns its example from `Task.example`. Without an example the split follows the
order in which modules are registered: what comes before the blocks is an embedding, what comes after
them is the head, and models with stages need `model.blocks`.

## Adapters in place of layers

With `model.tuning = "lora"`, each block gets LoRA adapters by the [PEFT](https://huggingface.co/docs/peft) library
(`pip install ".[lora]"`), and a block *is* its adapters: they are what is probed, selected, trained, sent, averaged,
budgeted and counted. All weights of the blocks stay frozen, like the embeddings, and are never sent (but see `stack`). The head is
trained in full. Strategies, engines, codecs, privacy, stores and `model.storage` work as for layers.

| key | meaning |
|---|---|
| `model.lora-rank` | r: an adapter adds (α/r)·B·A to a frozen weight |
| `model.lora-alpha` | α |
| `model.lora-targets` | ends of the names of modules that get an adapter, as in `query, value`. Empty: every linear layer and every convolution without groups, in blocks |
| `model.lora-dropout` | share of an adapter's inputs that is dropped in training |

- `strategy.name = "full"` with `lora` is FedIT: every client trains all adapters, and the server averages A and B. The
  mean of B times the mean of A is not the mean of the products B·A, which are what the clients' models add to a weight.
  `server.aggregation = "svd"` computes the latter and cuts it to the rank r by its singular values, as FlexLoRA does; no
  adapters of rank r are closer to it. It keeps the cohort's adapters in memory, and E2 is null. With it,
  `strategy.name = "ranks"` gives [each client the ranks that its budget affords](strategies.md#ranks-in-place-of-layers).
- `server.aggregation = "stack"` is exact, as FLoRA: the server adds the mean of the products to the weight beside the
  adapter, and adapters begin again, with B = 0 and A drawn anew. Clients send factors as before and get the weights that
  have changed, in float32: the ledger counts them, and downlink is that of `model.tuning = "layers"`. Where all factors
  of a cohort side by side are smaller (Σ r_i below half of a weight's side), FLoRA sends those; here a node that missed
  rounds, or has no store, needs the weight in any case. It goes with the plain mean of the server (`server.optimizer`,
  `lr` at their defaults), with weights as the checkpoint has them, and with all strategies but `fedluar`.
- The matrices A are drawn from `run.seed`, and the fingerprint of the base covers them. B begins at 0, so the model
  before training is the pretrained one.
- The statistics of BatchNorm in blocks are frozen too.
- A module that the model's forward pass does not call gets no adapter, since it would have no effect: torch's own
  `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` read weights without calling the modules that hold them. A
  block without any module to adapt is refused, with the names of the modules that there are.
"""  # noqa: E501  (a table of Markdown has long lines)

# Branches side by side; a model whose output layer is tied to the embeddings and that has no final norm.
REFUSED = {"timm/hrnet", "transformers/led"}

# It computes its sizes from values of tensors.
NO_SKELETON = {"torchvision/regnet_y"}

# In the fast tests: one of each kind.
FEW = (
    "timm/vit",
    "timm/tnt",
    "timm/convnext",
    "timm/mobilenetv3",
    "timm/swin",
    "torchvision/alexnet",
    "transformers/mpnet",
    "transformers/opt",
    "transformers/gemma3n",
    "transformers/t5",
    "transformers/mixtral",
    "transformers/wavlm",
    "transformers/resnet",
    "transformers/led",
    "transformers/wav2vec2, stable",
    "open_clip/vit",
)


ROWS: dict[str, dict[str, Any]] = {}
"""The rows of the table that this process's tests have met."""


def built(entry: Entry) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return entry.build().eval()


def digest_of(model: nn.Module, layers: LayerMap) -> str:
    """Return a digest of the layers' content, names and order."""
    state = model.state_dict()
    contents = {x.name: digest({n: state[n] for n in x.tensors}) for x in layers.layers}
    return fingerprint(contents)


def row(name: str) -> dict[str, Any]:
    """Return what the table says of an architecture, and its digest."""
    entry = ZOO[name]
    model = built(entry)
    try:
        return row_of(name, model, LayerMap.from_model(model, forward=entry.scores, **entry.split))
    except LayerMapError as error:
        return {"name": name, "given": given(entry), "refused": str(error)}


def given(entry: Entry) -> str:
    return ", ".join(f"`model.{key}={value}`" for key, value in entry.split.items())


def row_of(name: str, model: nn.Module, layers: LayerMap) -> dict[str, Any]:
    total = sum(layer.elements for layer in layers.layers)
    share = [f"{100 * layer.elements / total:.0f}" for layer in (layers.embeddings, layers.head)]
    first, last = (_main(layers.blocks[index].modules) for index in (0, -1))
    return {
        "name": name,
        "given": given(ZOO[name]),
        "blocks": layers.num_blocks,
        "first": first,
        "last": last,
        "shares": share,
        "digest": digest_of(model, layers),
    }


def _main(modules: Sequence[str]) -> str:
    """Return the module of a block that stands for it: the last one, after a downsampler."""
    return modules[-1]


# ------------------------------------------------------------------- backward ends where it should
def backward(entry: Entry, model: nn.Module, layers: LayerMap, trained: Sequence[str]) -> set[str]:
    """Train some layers, and return the blocks that backward reaches and the layers with gradients."""
    reached: set[str] = set()

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: object, output: Any) -> None:
            found = output if isinstance(output, Tensor) else next(iter(_tensors(output)), None)
            if found is not None and found.requires_grad:
                reached.add(name)

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as hooks, selected_layers(model, layers, trained):
        for block in layers.blocks:
            last = _main(block.modules)
            hooks.callback(modules[last].register_forward_hook(watch(block.name)).remove)
        scores = entry.scores(model)
        scores.float().square().mean().backward()
        graded = {
            layers.layer_of(n).name for n, p in model.named_parameters() if p.grad is not None
        }
    assert graded <= set(trained)
    return reached | graded


def _tensors(value: Any) -> Any:
    parts = value.values() if isinstance(value, dict) else value
    return (part for part in parts or () if isinstance(part, Tensor))


def check(name: str) -> None:
    entry = ZOO[name]
    model = built(entry)
    if name in REFUSED:
        with pytest.raises(LayerMapError, match=r"^.*as in model\.blocks = .*$"):
            LayerMap.from_model(model, forward=entry.scores)
        return
    layers = LayerMap.from_model(model, forward=entry.scores, **entry.split)
    ROWS[name] = row_of(name, model, layers)

    # `layerfed layers` splits a model without weights alike.
    if name not in NO_SKELETON:
        with torch.device("meta"):
            skeleton = entry.build().eval()
        assert LayerMap.from_model(skeleton, forward=entry.scores, **entry.split) == layers

    # Every tensor is somewhere once.
    held = [n for layer in layers.layers for n in (*layer.parameters, *layer.buffers)]
    assert sorted(held) == sorted(n for n, _ in (*model.named_parameters(), *model.named_buffers()))
    # A step on the head alone reaches no block, and one on a block nothing below it.
    assert backward(entry, model, layers, ["head"]) <= {"head"}
    names, middle = [block.name for block in layers.blocks], layers.num_blocks // 2
    for index in {0, middle, layers.num_blocks - 1}:
        reached = backward(entry, model, layers, [names[index], "head"])
        assert names[index] in reached
        assert reached <= {*names[index:], "head"}

    # A training step changes the middle block and the head only, also where a new head is 0.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = [index == middle for index in range(layers.num_blocks)]

    def loss(model: nn.Module, _: object) -> Tensor:
        return (entry.scores(model).float() - 1).square().mean()

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=1e4)  # signals of random deep nets are tiny

    train_layers(model, layers, mask, [{"x": torch.zeros(1)}], loss, sgd)
    changed = {
        layers.layer_of(n).name
        for n, p in model.named_parameters()
        if not torch.equal(p.detach(), before[n])
    }
    assert names[middle] in changed
    assert changed <= {names[middle], "head"}


@pytest.mark.parametrize("name", FEW)
def test_backward_ends_at_the_trained_block(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in FEW])
def test_backward_ends_at_the_trained_block_of_every_architecture(name: str) -> None:
    check(name)


# --------------------------------------------------------------------------------------- the table
def rows_of_another_process() -> list[dict[str, Any]]:
    script = "import json; from tests.models.test_zoo import *; print(json.dumps([*map(row, ZOO)]))"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    found: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_every_process_splits_a_model_alike_and_the_table_is_up_to_date() -> None:
    rows = [ROWS[name] if name in ROWS else row(name) for name in ZOO]
    assert rows == rows_of_another_process()
    assert PAGE.read_text(encoding="utf-8") == page(rows), "python -m tests.models.test_zoo"


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return docs/models.md."""
    accepted = [row for row in rows if "blocks" in row]
    refused = [row for row in rows if "refused" in row]
    lines = [
        RULES,
        "## The table",
        "",
        f"{len(rows)} splits: {len(accepted)} accepted and {len(refused)} refused. Sizes are tiny and",
        "weights random, so the shares in % are not those of the published models.",
        "`python -m tests.models.test_zoo` renews the table. `make test-slow` checks it, and makes a",
        "training step on the middle block of each model.",
        "",
        "| model | blocks | first | last | embeddings % | head % |",
        "|---|---|---|---|---|---|",
    ]
    for row in accepted:
        name = row["name"] + (f" with {row['given']}" if row["given"] else "")
        cells = [name, row["blocks"], f"`{row['first']}`", f"`{row['last']}`", *row["shares"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Refused, with the message:", ""]
    lines += [f"- {row['name']}: {row['refused']}" for row in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page([row(name) for name in ZOO]), encoding="utf-8")
