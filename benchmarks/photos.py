"""Photos of clothes for the races that have classes: what is trained on, 341 to choose by, 372 to measure by."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.common import ROOT
from benchmarks.measures import LITE2, Reference, features
from benchmarks.timed import our_command, wait_for
from src.data import ImageConfig, ImageSet, open_sources
from src.data.packing import pack
from src.data.scan import ScanConfig
from src.data.sources import FolderSource, PackedSource
from src.evaluation.results import labels_like
from src.evaluation.shapes import pixel_loader
from src.metrics import distances
from src.runs.classifier import levels_of, open_classifier

Result = dict[str, Any]

ARCHIVE = ROOT.parent / "shared" / "data" / "clothing.tar"
CLASSIFIER: dict[str, Any] = {  # that reads samples: of noised images, too, which keeps it from learning them by heart
    "name": "race_classifier",
    "noise": {"schedule": {"kind": "cosine", "steps": 1000}},
    "times": {"kind": "logit_normal", "mean": -2.0},
    "classifier": {"base_channels": 32, "channel_mult": [1, 2, 3, 4], "blocks": 1, "norm_groups": 8, "dropout": 0.1}
    | {"attention": ["none", "none", "none", "full"], "head_channels": 32},
    "optimizer": {"lr": 2e-3, "weight_decay": 0.05, "schedule": {"kind": "one_cycle"}},
    "steps": 2500,
    "batch_size": 32,
    "ema": {"half_life_images": 10_000, "ramp_up": 0.1},
    "log": {"trackers": []},
}
PARTS = ("train", "validation", "test")  # to train on, to choose by, to measure by


def open_folder(folder: Path) -> ImageSet:
    """All of a folder, however few bytes a file has."""
    return open_sources(FolderSource(source="folder", path=str(folder), scan=ScanConfig(min_file_bytes=0)))


def write_digits(folder: Path, size: int) -> None:
    """scikit-learn's digits, enlarged to `size`, in classes."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        resized = Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        resized.convert("RGB").save(folder / str(label) / f"{i:04d}.png")


def prepare_photos(datasets: Path, size: int, archive: Path = ARCHIVE) -> Path:
    """A folder with train, validation and test packed with their shorter side at `size`; made once. Where the archive is
    missing, these are scikit-learn's digits, of each class 30 to choose by and 30 to measure by."""
    name = f"{'clothing' if archive.exists() else 'digits'}_race_{size}"
    folder, staged = datasets / name, datasets / f"{name}.partial"
    if folder.exists():
        return folder
    shutil.rmtree(staged, ignore_errors=True)
    files = staged / "files"
    if archive.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(files, filter="data")
        files = min(files.rglob("train")).parent
    else:
        write_digits(staged / "all", size)
        for one in sorted((staged / "all").iterdir()):
            for i, file in enumerate(sorted(one.iterdir())):
                place = files / PARTS[max(0, 2 - i // 30)] / one.name / file.name
                place.parent.mkdir(parents=True, exist_ok=True)
                file.rename(place)
    for part in PARTS:
        pack(open_folder(files / part), staged / part, size=size, channels=3)
    shutil.rmtree(staged / "files")
    shutil.rmtree(staged / "all", ignore_errors=True)
    staged.rename(folder)
    return folder


def open_photos(folder: Path, part: str, count: int | None = None) -> ImageSet:
    """The images of a part, or the `count` of them whose names hash lowest, as the key `subset` of a config has them."""
    return open_sources(PackedSource(source="packed", path=str(folder / part), subset=count))


def pixels_of(images: ImageSet, size: int, chosen: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """(N, size, size, 3) of these images, or of all, cut from the middle."""
    load = pixel_loader(images, ImageConfig(size=size))
    return load(range(len(images)) if chosen is None else chosen)


def write_memory_file(file: Path, images: ImageSet, size: int) -> None:
    """An .npz with x (N, size, size, 3) uint8 and labels (N,), whole or absent."""
    staged = file.with_name(f"{file.stem}.part.npz")
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(staged, x=pixels_of(images, size), labels=images.labels)
    staged.rename(file)


def write_json(file: Path, value: Any) -> None:
    """A file that is whole or absent."""
    staged = file.with_suffix(".part")
    staged.write_text(json.dumps(value, indent=1) + "\n")
    staged.rename(file)


class Photos:
    """What is trained on (`count` of the images, or all), chosen by and measured by; and the classifier that reads samples,
    which is trained once on all training photos and kept in the folder."""

    def __init__(self, folder: Path, size: int, count: int | None = None) -> None:
        self.folder, self.size, self.count = folder, size, count
        known = {"train": open_photos(folder, "train", count)}
        known |= {part: open_photos(folder, part) for part in ("validation", "test")}
        self.sets = {part: Reference(images, self.size) for part, images in known.items()}
        self.class_names = known["train"].class_names

    @property
    def overrides(self) -> list[str]:
        """Of our configs."""
        subset = {"subset": self.count} if self.count is not None else {}
        data = {"source": "packed", "path": os.path.relpath(self.folder / "train", ROOT), **subset}
        held_out = {"source": "packed", "path": os.path.relpath(self.folder / "validation", ROOT)}
        return [f"data={json.dumps(data)}", f"held_out={json.dumps(held_out)}", "workers=0", "log.trackers=[]"]

    def labels(self, part: str, count: int) -> list[int]:
        """A class for each of `count` samples, in the shares of the photos of a part."""
        labels = labels_like(self.sets[part].images, count, len(self.class_names))
        assert labels is not None
        return labels

    def memory_file(self) -> Path:
        """The training photos as one array; made once."""
        file = self.folder / f"train_{self.count or 'all'}.npz"
        if not file.exists():
            write_memory_file(file, self.sets["train"].images, self.size)
        return file

    def classifier(self) -> Any:
        """Trained once, off the clock: some minutes."""
        run = self.folder / "classifier"
        if not (run / "final").exists():
            print("training the classifier that reads samples", flush=True)
            whole = Photos(self.folder, self.size).overrides
            image = {"size": self.size, "flip": True, "crop": "random"}
            data = {"source": "packed", "path": ""}
            write_json(self.folder / "classifier.json", CLASSIFIER | {"image": image, "data": data})
            command = our_command("train_classifier.py", self.folder / "classifier.json", run, whole)
            wait_for(command, self.folder / "classifier.txt", "train_classifier.py")
        return open_classifier(run, torch.device("cpu"))

    @cached_property
    def read(self) -> Callable[[Tensor], NDArray[np.int64]]:
        """Pixels (N, 3, H, W) uint8 -> the classes that the classifier reads."""
        opened = self.classifier()
        t = levels_of(opened.process, 2)[0]

        @torch.inference_mode()
        def read(pixels: Tensor) -> NDArray[np.int64]:
            return torch.cat([opened.logits(part / 127.5 - 1, t).argmax(1) for part in pixels.split(64)]).numpy()

        return read

    @cached_property
    def read_features(self) -> Callable[[NDArray[Any]], NDArray[np.int64]]:
        """Features (N, 1280) of Lite2 -> classes."""
        images = open_photos(self.folder, "train")
        return distances.fit_reader(Reference(images, self.size).features(LITE2), images.labels)

    def measure(self, pixels: Tensor, labels: Sequence[int], *, reading: bool = True) -> Result:
        """All that is said of samples (N, 3, H, W) uint8 of these classes, against the test photos; without `reading` not
        whether they are read as their class."""
        measured: Result = {"samples": len(pixels), **self.sets["test"].measure(pixels)}
        of_samples, wanted = features(LITE2, pixels), np.asarray(labels)
        if reading:
            measured["read"] = float((self.read(pixels) == wanted).mean())
            measured["read_lite2"] = float((self.read_features(of_samples) == wanted).mean())
        real, train = self.sets["test"].features(LITE2), self.sets["train"].features(LITE2)
        shape = distances.manifold(of_samples, real)
        away = [distances.nearest(one, train)[0][:, 0] for one in (of_samples, real)]
        copying = distances.copying(*away)
        return measured | {
            "precision": shape.precision,
            "recall": shape.recall,
            "nearer": copying.nearer,
            "copied": copying.copied,
            "copied_if_new": copying.copied_if_new,
        }

    def measure_part(self, part: str, count: int, *, reading: bool = True) -> Result:
        """The same of real photos: of `count` of a part, evenly spread, or of all of them."""
        images = open_photos(self.folder, part)  # the floor does not depend on how many are trained on
        chosen = (np.arange(min(count, len(images))) * len(images) // min(count, len(images))).tolist()
        pixels = torch.from_numpy(pixels_of(images, self.size, chosen)).permute(0, 3, 1, 2).contiguous()
        return self.measure(pixels, images.labels[chosen].tolist(), reading=reading)
