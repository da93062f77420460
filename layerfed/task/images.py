"""Tasks on images, which are decoded once to squares of bytes and normalised on the device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Image, List, Value
from PIL import Image as Pixels
from torch import Tensor, nn

from layerfed.config import ConfigError
from layerfed.config.errors import naming_extras
from layerfed.models.image import ImageClassifier, Preprocessing, build_image_classifier
from layerfed.task.base import Batch, Inputs
from layerfed.task.dataset_task import Columns, DatasetTask, Encoder
from layerfed.task.loading import (
    CHANGED,
    READERS,
    TEST_SPLITS,
    TRAIN_SPLITS,
    Part,
    changed,
    data_files,
    image_folders,
    image_rows,
    is_text,
    load_file_list,
    local_path,
    pick_columns,
    pick_splits,
    require_type,
    walk,
)
from layerfed.task.pixels import open_image

__all__ = ["ImageTask"]

SPLITS = (*TRAIN_SPLITS, *TEST_SPLITS)


class ImageTask(DatasetTask):
    """Image classification."""

    settings: ClassVar[frozenset[str]] = DatasetTask.settings | {"image_size"}
    reads: ClassVar[str] = "image"
    inputs: ClassVar[tuple[tuple[str, ...], ...]] = (("image",), ("img",))
    image_size: ClassVar[int] = 0
    """Side in pixels at which images are kept, without `task.image-size`; 0: the model's."""

    @cached_property
    def model_reads(self) -> Preprocessing:
        """The preprocessing with which the model's weights were trained."""
        return self._build(2, skeleton=True).reads

    @property
    def kept(self) -> int:
        """Side in pixels of the images that the model gets."""
        return self.config.task.image_size or self.image_size or self.model_reads.size

    @property
    def crop_share(self) -> float:
        """The share of a resized image's shorter side that is cut out."""
        # A size that was chosen is about the whole shorter side.
        chosen = self.config.task.image_size or self.image_size
        return 1.0 if chosen else self.model_reads.crop

    @property
    def resized(self) -> int:
        """Length of an image's shorter side, of which the middle `kept` pixels are cut out."""
        return math.floor(self.kept / self.crop_share)

    @cached_property
    def encoder(self) -> Encoder:
        """Decode an image, cut it to a square, and keep it as bytes with the colour channel first."""
        size, resized = self.kept, self.resized
        kind, squash = self.model_reads.interpolation, self.model_reads.squash
        resampling = getattr(Pixels.Resampling, kind.upper(), Pixels.Resampling.BICUBIC)

        def encode(columns: Columns, rows: Sequence[int], where: str) -> Columns:
            [cells] = columns.values()
            return {
                "pixels": [
                    _square(
                        open_image(cell, f"{where}, row {row}"), resized, size, resampling, squash
                    ).reshape(-1)
                    for cell, row in zip(cells, rows, strict=True)
                ]
            }

        def collate(table: pa.Table) -> dict[str, Tensor]:
            # One copy, out of the memory-mapped file.
            flat = table.column("pixels").combine_chunks().flatten().to_numpy()
            return {"image": torch.from_numpy(flat.reshape(-1, 3, size, size).copy())}

        features = {"pixels": List(Value("uint8"), length=3 * size * size)}
        key = "image", size, resized, resampling.name, squash
        return Encoder(key, features, encode, collate)

    @cached_property
    def parts(self) -> tuple[list[Part], list[Part]]:
        """The parts of a folder of images, with labels from folder names, or of tables of images."""
        root = local_path(self.data)
        if root is None or not root.is_dir() or _described(root):
            return super().parts
        folders, tables = image_folders(root), data_files(root)
        if folders and tables:
            raise ConfigError(
                f"task.data = '{self.data}' holds images and tables; to label images by their folders, "
                f"move {tables[0].name} elsewhere; to use the table, set task.data={tables[0]}"
            )
        return self._folders(root, folders) if folders else super().parts

    def _folders(
        self, root: Path, folders: Mapping[tuple[str, ...], Sequence[Path]]
    ) -> tuple[list[Part], list[Part]]:
        """Read `CLASS/`, `GROUP/CLASS/`, and each below a folder for each split."""
        found: dict[str, dict[str, dict[str, Sequence[Path]]]] = {}
        split_up = any(len(path) > 1 and path[0].lower() in SPLITS for path in folders)
        for path, images in folders.items():
            if split_up and not (path and path[0].lower() in SPLITS):
                raise ConfigError(
                    f"task.data = '{self.data}': some folders are for splits, such as train/ and test/, "
                    f"but {root.joinpath(*path)} holds images too; move it into one of them"
                )
            split = path[0] if split_up else "train"
            *group, label = path[split_up:] or ("",)
            if len(group) > 1 or not label:
                raise ConfigError(
                    f"task.data = '{self.data}': images in {root.joinpath(*path)} have no class; "
                    "the folders should be CLASS/, GROUP/CLASS/, or one of these below train/ and test/"
                )
            found.setdefault(split, {}).setdefault("".join(group), {})[label] = images
        for split, by_group in found.items():
            if len(by_group) > 1 and "" in by_group:
                raise ConfigError(
                    f"task.data = '{self.data}': some images of '{split}' lie in CLASS/ and others in "
                    "GROUP/CLASS/; move them to folders of one kind"
                )
        section = self.config.task
        train, test = pick_splits(found, section.train_split, section.test_split, self.data)

        def parts(split: str) -> list[Part]:
            base = root / split if split_up else root
            return [
                self.with_images(Part(image_rows(files), str(base / group), group))
                for group, files in found[split].items()
            ]

        return parts(train), parts(test) if test else []

    def part(self, splits: dict[str, Dataset], name: str) -> Part:
        """Return a split with its images still encoded."""
        return self.with_images(super().part(splits, name))

    def with_images(self, found: Part, folder: Path | None = None) -> Part:
        """Return a part with its images still encoded.

        Parameters
        ----------
        found : Part
        folder : Path, optional
            The folder that paths in a table are relative to; by default that of the table.

        Raises
        ------
        ConfigError
            If its input column holds neither images nor paths of images.
        """
        given = self.config.task.input_columns
        column, *more = pick_columns(given, self.inputs, found, "task.input-columns")
        if more:
            raise ConfigError(
                f"task.input-columns = '{given}' names {len(more) + 1} columns, but images come from one"
            )
        rows, paths = found.rows, is_text(found, column)
        fits = paths or isinstance(rows.features[column], Image)
        require_type(found, column, fits, "images or paths of images", "task.input-columns")
        if paths and CHANGED not in rows.column_names:
            # A table's paths are relative to the table.
            if folder is None:
                base = local_path(self.data)
                folder = base.parent if base and base.is_file() else base or Path()
            rows = _with_paths(rows, column, folder, found.where)
        return Part(rows.cast_column(column, Image(decode=False)), found.where, found.group)

    def augment(self, batch: Batch) -> Batch:
        """Shift and mirror each image, and with `randaugment` distort it, by torchvision."""
        change = _augmentation(self.config.train.augment, batch["image"].shape[-1])
        return {**batch, "image": torch.stack([change(image) for image in batch["image"]])}

    def _build(self, classes: int, *, skeleton: bool = False) -> ImageClassifier:
        return build_image_classifier(
            self.config.model,
            classes,
            self.config.run.seed,
            kept=self.config.task.image_size,
            skeleton=skeleton,
        )

    def build_model(self) -> nn.Module:
        """Return the pretrained image tower with a new linear head."""
        model = self._build(len(self.classes))
        self.model_reads = model.reads  # so that no skeleton is built to know it
        return model

    def skeleton(self) -> nn.Module:
        """Return the layers without their weights."""
        return self._build(len(self.classes), skeleton=True)

    def example(self) -> Batch:
        """Return a blank image."""
        return {"image": torch.zeros(1, 3, self.kept, self.kept, dtype=torch.uint8)}

    def preprocessing(self) -> dict[str, Any]:
        """Return how an image becomes the model's input."""
        reads = self.model_reads
        return {
            "input": "image",
            "colours": "RGB",
            "squash": reads.squash,
            "resize": self.resized,
            "interpolation": reads.interpolation,
            "crop_share": self.crop_share,
            "crop": self.kept,
            "size": reads.size,
            "mean": list(reads.mean),
            "std": list(reads.std),
        }

    def summary(self) -> str:
        """Return the sizes and colours that were chosen."""
        reads = self.model_reads
        side = "both sides" if reads.squash else "the shorter side"
        kept, size = f"{self.kept}×{self.kept}", f"{reads.size}×{reads.size}"
        scaled = "" if self.kept == reads.size else f", scaled to {size} in every step"
        mean, std = (" ".join(f"{x:.3g}" for x in values) for values in (reads.mean, reads.std))
        return (
            f"images: {side} to {self.resized} ({reads.interpolation}), the middle {kept}{scaled}; "
            f"{self.config.model.name} computes at {size}, mean {mean}, deviation {std}"
        )

    def read(self, file: Path) -> Inputs:
        """Return an image, or the images of a table."""
        if file.suffix.lower() in READERS:
            part = Part(load_file_list([file]), str(file))
            return self.inputs_of(self.with_images(part, file.parent), str(file))
        rows = Dataset.from_dict({"image": [{"path": str(file), "bytes": None}]})
        return self.inputs_of(Part(rows, str(file)), str(file), ("image",))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Score the classes."""
        scores: Tensor = model(batch["image"])
        return scores


@cache
def _augmentation(kind: str, side: int) -> Callable[[Tensor], Tensor]:
    """Return a random change of an image, uint8 of shape (3, side, side)."""
    # Imported late: it takes a second, and most runs do not need it.
    with naming_extras(f"train.augment = '{kind}'"):
        from torchvision.transforms import v2
    # As on CIFAR: an eighth of the side at most, filled with the image's own reflection.
    light = [v2.RandomCrop(side, side // 8, padding_mode="reflect"), v2.RandomHorizontalFlip()]
    # Two operations an image, of torchvision's default strength (9 of 31).
    change: Callable[[Tensor], Tensor] = v2.Compose(
        [*light, v2.RandAugment()] if kind == "randaugment" else light
    )
    return change


def _described(root: Path) -> bool:
    """Return whether a table describes the images, as the hub's `imagefolder` has it."""
    names = {f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet")}
    return any(file.name in names for _, files in walk(root) for file in files)


def _with_paths(rows: Dataset, column: str, folder: Path, where: str) -> Dataset:
    """Make paths absolute, and add the files' times so that a changed file makes another table."""
    paths = [os.path.join(folder, path or "") for path in rows[column]]
    times = [changed(path) for path in paths]
    if paths and not any(times):
        raise ConfigError(
            f"{where}: column '{column}' is text, and no value is the path of an image in {folder}; "
            "choose another by task.input-columns=NAME, or for text a model of transformers (model.name)"
        )
    rows = rows.add_column(CHANGED, times)
    return rows.remove_columns(column).add_column(column, paths)


def _square(
    image: Pixels.Image, resized: int, size: int, resampling: Pixels.Resampling, squash: bool
) -> np.ndarray:
    """Resize an image and cut out the middle, as torchvision's `Resize` and `CenterCrop` do.

    Parameters
    ----------
    image : PIL.Image.Image
    resized : int
        The length of the shorter side; of both, if `squash`.
    size : int
        The side of the square that is cut out.
    resampling : PIL.Image.Resampling
    squash : bool

    Returns
    -------
    numpy.ndarray
        uint8 of shape (3, size, size).
    """
    shorter = min(image.size)
    width, height = (resized if squash else int(resized * side / shorter) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), resampling)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
