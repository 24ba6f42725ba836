"""Open what was trained: a run directory, a checkpoint, a final folder, or an export."""

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UserError, read_json, validate
from ..data import ImageConfig
from ..diffusion import Process, ProcessConfig, build_process
from ..models import UNet, UNetConfig
from ..models.layers import channels_last
from ..training.checkpoint import damage, load_weights, newest, read_tensors
from .autoencoder import LatentCodec, kept_autoencoder
from .sampler import Bound, Sampler, SamplerConfig


@dataclass(frozen=True)
class Opened:
    """EMA weights with all that belongs to them. `digest` is the hash of the weights; `codec` makes pictures of what a latent
    run draws, and `shape` (C, H, W) is what its network sees."""

    path: Path
    network: nn.Module
    process: Process
    image: ImageConfig
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    config: dict[str, Any]
    step: int
    digest: str
    codec: LatentCodec | None = None
    bounds: tuple[Bound, Bound] = (-1.0, 1.0)

    @property
    def num_classes(self) -> int | None:
        return count_classes(self.config["class_conditional"], self.class_names)

    @property
    def name(self) -> str:
        return self.config["name"]

    def sampler(self, spec: SamplerConfig) -> Sampler:
        return sampler_of(
            spec,
            self.network,
            self.process,
            self.shape,
            self.num_classes,
            clip=self.config["process"]["clip"],
            label_dropout=self.config["label_dropout"],
            codec=self.codec,
            bounds=self.bounds,
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


def sampler_of(
    spec: SamplerConfig,
    network: nn.Module,
    process: Process,
    shape: Sequence[int],
    num_classes: int | None,
    *,
    clip: bool,
    label_dropout: float,
    codec: LatentCodec | None = None,
    bounds: tuple[Bound, Bound] = (-1.0, 1.0),
) -> Sampler:
    """The sampler of a network trained with this `label_dropout`; `clip` holds estimates of x_0 inside `bounds`."""
    return Sampler(
        network,
        process,
        spec,
        shape=shape,
        num_classes=num_classes,
        clip_x0=bounds if clip else None,
        guidable=label_dropout > 0,
        codec=codec,
    )


def count_classes(class_conditional: bool | None, class_names: Sequence[str]) -> int | None:
    """How many classes a network has: None where it learns none. True asks for classes, None takes what the data has."""
    if class_conditional and not class_names:
        raise UserError(
            "class_conditional is true and the data has no classes: use class subfolders or a label_column, or "
            "--set class_conditional=null"
        )
    return len(class_names) if class_names and class_conditional is not False else None


def build_unet(config: UNetConfig, shape: Sequence[int], num_classes: int | None) -> UNet:
    """The U-Net of pictures or latents (C, H, W), in channels_last, which is faster; H must be divisible by its factor."""
    channels, size = shape[0], shape[1]
    if size % config.factor:
        near = sorted({size // config.factor * config.factor, -(-size // config.factor) * config.factor} - {0})
        raise UserError(
            f"the network sees {size} px, not divisible by {config.factor}, what {len(config.channel_mult)} entries of "
            f"model.channel_mult ask for; change them, or image.size, so it sees {' or '.join(map(str, near))}"
        )
    return channels_last(UNet(config, in_channels=channels, num_classes=num_classes))


def start_from(name: str, class_names: Sequence[str], *networks: Any) -> str:
    """Put the EMA weights of the diffusion run `name` into networks of the same architecture; where its classes are others,
    all but the embedding of the labels. Gives what was done, in words."""
    found = open_trained(name, torch.device("cpu"))
    weights, key = found.network.state_dict(), "label_embedding.weight"
    own = networks[0].state_dict()
    same = found.class_names == tuple(class_names) and key in weights
    told = f"starting from the weights of {name} (step {found.step})"
    if key in own and not same:
        told += "; its classes are others, so the label embedding is new"
    elif key in weights and key not in own:
        told += "; without its label embedding, since this run learns no classes"
    if key not in own or not same:
        weights = {name: value for name, value in weights.items() if name != key}
    for network in networks:
        mine = network.state_dict()
        load_weights(network, weights if same or key not in mine else {**weights, key: mine[key]}, Path(name))
    return told


def latent_bounds(facts: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The lowest and highest of each channel over all latents, as they are known to a latent run: (D, 1, 1) each."""
    low, high = (torch.tensor(facts[key], device=device)[:, None, None] for key in ("low", "high"))
    return low, high


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
    path = folder = Path(path)
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
    if "stages" in config:
        raise UserError(f"{path} is an autoencoder, which draws nothing by itself: train_ldm.py trains on its latents")
    if not {"model", "process", "image", "class_conditional"} <= set(config):
        raise UserError(f"{path} is no diffusion run of this project")
    image = validate(ImageConfig, config["image"], origin=f"{path}: image")
    shape, latent = (image.channels, image.size, image.size), {}
    if "latents" in data:
        facts = data["latents"]
        autoencoder = kept_autoencoder(folder, device)
        if autoencoder.digest != facts["autoencoder"]:
            raise UserError(f"{path}: the autoencoder beside it is another than the one it was trained on")
        shape = tuple(facts["shape"])
        latent = {
            "codec": LatentCodec(autoencoder.network, facts["mean"], facts["std"]),
            "bounds": latent_bounds(facts, device),
        }
    class_names = tuple(data["class_names"])
    model = validate(UNetConfig, config["model"], origin=f"{path}: model")
    network = build_unet(model, shape, count_classes(config["class_conditional"], class_names))
    load_weights(network, weights, path)
    if config.get("cpu_threads") is not None:
        torch.set_num_threads(config["cpu_threads"])  # so that processes agree to the bit, as in training
    return Opened(
        path=path,
        network=network.to(device).eval().requires_grad_(False),
        process=build_process(validate(ProcessConfig, config["process"], origin=f"{path}: process")),
        image=image,
        shape=shape,
        class_names=class_names,
        config=config,
        step=step,
        digest=digest,
        **latent,
    )
