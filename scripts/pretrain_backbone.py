"""Pretrain the small ViT that ships with LayerFed, on CIFAR-100 images.

    python scripts/pretrain_backbone.py PARQUET_FOLDER --epochs 48 --threads 2

PARQUET_FOLDER holds CIFAR-100 in the hub's layout (`uoft-cs/cifar100`: columns `img`, `fine_label`;
files named `train-*.parquet`). The script writes `layerfed_assets/vit_cifar100.safetensors` (the
backbone without its classifier) and prints the figures of the model card beside it. A second call
continues after the last epoch.

The last 5,000 training images are held out, so the printed accuracy is on images never trained on.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from layerfed_assets import BACKBONE, backbone

HELD_OUT = 5_000


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Return every training image: uint8 pixels (N, 3, 32, 32) and int64 fine labels (N,)."""
    pixels, labels = [], []
    for file in sorted(folder.rglob("train-*.parquet")):
        table = pq.read_table(file, columns=["img", "fine_label"])
        pixels += [_decode(cell["bytes"].as_py()) for cell in table.column("img")]
        labels.append(table.column("fine_label").to_numpy())
    if not pixels:
        raise SystemExit(f"no train-*.parquet under {folder}")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(
        np.concatenate(labels)
    ).long()


def _decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def normalise(pixels: Tensor) -> Tensor:
    """Map uint8 [0, 255] to float [-1, 1], the input range of the shipped backbone."""
    return pixels.float().div_(127.5).sub_(1.0)


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Crop (4 pixels of padding), flip, change contrast, and turn one image in five grey.

    Grey images and changes of contrast prepare the backbone for grey digits, its first use.
    """
    n = len(pixels)
    x = nn.functional.pad(normalise(pixels), (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (n, 1, 1), generator=rng) for _ in range(2))
    rows = top + torch.arange(32).view(1, 32, 1)
    cols = left + torch.arange(32).view(1, 1, 32)
    x = x.permute(0, 2, 3, 1)[torch.arange(n).view(n, 1, 1), rows, cols].permute(0, 3, 1, 2)
    flip = torch.rand(n, generator=rng) < 0.5
    x = torch.where(flip.view(n, 1, 1, 1), x.flip(3), x)
    grey = torch.rand(n, generator=rng) < 0.2
    x = torch.where(grey.view(n, 1, 1, 1), x.mean(1, keepdim=True).expand_as(x), x)
    gain = torch.empty(n, 1, 1, 1).uniform_(0.7, 1.3, generator=rng)
    shift = torch.empty(n, 1, 1, 1).uniform_(-0.2, 0.2, generator=rng)
    return x * gain + shift


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in [0, 1]."""
    model.eval()
    hits = sum(
        int((model(normalise(x)).argmax(1) == y).sum())
        for x, y in zip(pixels.split(500), labels.split(500), strict=True)
    )
    model.train()
    return hits / len(labels)


def main(
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    epochs: int = 48,
    batch_size: int = 256,
    lr: float = 2e-3,
    threads: int = 1,
    seed: int = 0,
    work: Path = Path("runs/pretrain"),
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    pixels, labels = load_images(data)
    train_x, train_y = pixels[:-HELD_OUT], labels[:-HELD_OUT]
    test_x, test_y = pixels[-HELD_OUT:], labels[-HELD_OUT:]

    model = backbone(num_classes=100)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=lr
    )
    steps = len(train_x) // batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * steps, pct_start=0.1
    )
    start, seconds = 0, 0.0
    state_file = work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        rng.set_state(state["rng"])
        start, seconds = state["epoch"], state["seconds"]

    for epoch in range(start, epochs):
        began, losses = time.monotonic(), []
        for index in torch.randperm(len(train_x), generator=rng)[: steps * batch_size].split(
            batch_size
        ):
            x, y = augment(train_x[index], rng), train_y[index]
            # Mixup with a weak Beta(0.2, 0.2); without it a model of this size overfits CIFAR-100.
            share = float(np.random.default_rng((seed, epoch, int(index[0]))).beta(0.2, 0.2))
            other = torch.randperm(len(x), generator=rng)
            scores = model(share * x + (1 - share) * x[other])
            loss = share * nn.functional.cross_entropy(scores, y, label_smoothing=0.1)
            loss = loss + (1 - share) * nn.functional.cross_entropy(
                scores, y[other], label_smoothing=0.1
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        seconds += time.monotonic() - began
        figures = {
            "epoch": epoch + 1,
            "train_loss": round(float(np.mean(losses)), 4),
            "held_out_accuracy": round(accuracy(model, test_x, test_y), 4),
            "seconds": round(seconds),
        }
        print(json.dumps(figures), flush=True)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": rng.get_state(),
            "epoch": epoch + 1,
            "seconds": seconds,
        }
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").rename(state_file)

    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("head.")
    }
    save_file(weights, BACKBONE, metadata={key: str(value) for key, value in figures.items()})
    print(f"wrote {BACKBONE} ({BACKBONE.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    typer.run(main)
