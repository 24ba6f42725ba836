"""Open what was trained: a run directory, a checkpoint, a final folder, or an export."""

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import UserError, read_json, validate
from ..data import ImageConfig
from ..diffusion import Process, ProcessConfig, build_process
from ..models import UNet, UNetConfig
from ..training.checkpoint import damage, load_weights, newest, read_tensors
from .sampler import Sampler, SamplerConfig


@dataclass(frozen=True)
class Opened:
    """EMA weights with all that belongs to them. `digest` is the hash of the weights."""

    path: Path
    network: nn.Module
    process: Process
    image: ImageConfig
    class_names: tuple[str, ...]
    config: dict[str, Any]
    step: int
    digest: str

    @property
    def num_classes(self) -> int | None:
        return count_classes(self.config["class_conditional"], self.class_names)

    @property
    def name(self) -> str:
        return self.config["name"]

    def sampler(self, spec: SamplerConfig) -> Sampler:
        return Sampler(
            self.network,
            self.process,
            spec,
            shape=(self.image.channels, self.image.size, self.image.size),
            num_classes=self.num_classes,
            clip_x0=self.config["process"]["clip"],
            guidable=self.config["label_dropout"] > 0,
        )

    def labels(self, text: str, count: int) -> list[int]:
        """`A/B/C`, names or numbers, dealt to `count` pictures in equal blocks."""
        if self.num_classes is None:
            raise UserError(f"{self.path} was trained without classes; leave --classes out")
        known = {name: i for i, name in enumerate(self.class_names)}
        chosen = []
        for word in text.split("/"):
            if word in known:
                chosen.append(known[word])
            elif word.isdigit() and int(word) < len(known):
                chosen.append(int(word))
            else:
                raise UserError(f"class {word!r} is not known; the classes are: {', '.join(self.class_names)}")
        return [chosen[i * len(chosen) // count] for i in range(count)]


def count_classes(class_conditional: bool | None, class_names: Sequence[str]) -> int | None:
    """How many classes a network has: None where it learns none. True asks for classes, None takes what the data has."""
    if class_conditional and not class_names:
        raise UserError(
            "class_conditional is true and the data has no classes: use class subfolders or a label_column, or "
            "--set class_conditional=null"
        )
    return len(class_names) if class_names and class_conditional is not False else None


def build_unet(config: UNetConfig, image: ImageConfig, num_classes: int | None) -> UNet:
    """The U-Net of a pixel run, in channels_last, which is faster; the picture must be divisible by its down-sampling."""
    if image.size % config.factor:
        near = sorted({image.size // config.factor * config.factor, -(-image.size // config.factor) * config.factor} - {0})
        raise UserError(
            f"image.size {image.size} is not divisible by {config.factor}, what {len(config.channel_mult)} entries of "
            f"model.channel_mult ask for; use {' or '.join(map(str, near))}"
        )
    network = UNet(config, in_channels=image.channels, num_classes=num_classes)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _find(path: Path) -> Path:
    """The folder with the weights: `path` itself, its final, or its newest whole checkpoint."""
    if (path / "ema.safetensors").exists() or (path / "MANIFEST.json").exists():
        reason = damage(path)
        if reason is not None:
            raise UserError(f"{path} is damaged: {reason}")
        return path
    final = path / "final"
    checkpoint, passed = newest(path / "checkpoints")
    if final.is_dir() and damage(final) is None:
        ahead = read_json(final / "progress.json")["step"]
        if checkpoint is None or read_json(checkpoint / "progress.json")["step"] <= ahead:
            return final
    if checkpoint is not None:
        return checkpoint
    if passed:
        raise UserError(f"{path}: no checkpoint is whole ({'; '.join(passed)})")
    raise UserError(f"{path} holds no checkpoint; give a run, a checkpoint, a final folder or an export")


def open_trained(path: str | Path, device: torch.device) -> Opened:
    """Open a run, checkpoint, final folder or `.pt` export with its EMA weights on the device.

    A UserError says what is missing, damaged or of another architecture.
    """
    path = Path(path)
    if path.is_file():
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            weights, config, data, step = (found[key] for key in ("weights", "config", "data", "step"))
            digest = hashlib.sha256(b"".join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest()
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} is damaged or no export of this project: {reason}") from None
    elif path.is_dir():
        folder = _find(path)
        weights = read_tensors(folder, "ema")
        config, data = read_json(folder / "config.json"), read_json(folder / "data.json")
        step = read_json(folder / "progress.json")["step"]
        digest = read_json(folder / "MANIFEST.json")["files"]["ema.safetensors"]["sha256"]
    else:
        raise UserError(f"{path}: there is no such run or checkpoint")
    if not {"model", "process", "image", "class_conditional"} <= set(config):
        raise UserError(f"{path} is not a pixel diffusion run")
    image = validate(ImageConfig, config["image"], origin=f"{path}: image")
    class_names = tuple(data["class_names"])
    model = validate(UNetConfig, config["model"], origin=f"{path}: model")
    network = build_unet(model, image, count_classes(config["class_conditional"], class_names))
    load_weights(network, weights, path)
    if config.get("cpu_threads") is not None:
        torch.set_num_threads(config["cpu_threads"])  # so that processes agree to the bit, as in training
    return Opened(
        path=path,
        network=network.to(device).eval().requires_grad_(False),
        process=build_process(validate(ProcessConfig, config["process"], origin=f"{path}: process")),
        image=image,
        class_names=class_names,
        config=config,
        step=step,
        digest=digest,
    )
