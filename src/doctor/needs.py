"""What a training config asks of the machine: images, trackers, what it starts from, weights, room."""

import math
import netrc
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import UserError, dump
from ..config.packages import is_installed
from ..runtime.checkpoint import count_spared
from ..storage.downloads import is_on_hub
from ..storage.files import size
from ..training.dry_run import planned_stages
from ..training.ema import WIDTHS
from ..training.uploads import starts, weights_in
from .health import Verdict, backbone_weights, efficientnet_weights, free_space, shared_memory, verdict_on, within

Check = Callable[[], Verdict]


def data(cfg: Any) -> Verdict:
    """The folders and files that its images come from; a run counts what is in them."""
    there, missing, elsewhere, settings = [], [], [], dump(cfg)
    named = [settings.get(key) or [] for key in ("data", "source")]
    for source in [source for value in named for source in (value if isinstance(value, list) else [value])]:
        path = source.get("path") or source.get("data_dir")
        if source["source"] == "datasets" and path is None:
            (there if Path(source["name"]).expanduser().is_dir() else elsewhere).append(source["name"])
        elif path is not None:
            (there if Path(path).expanduser().exists() else missing).append(path)
    if missing:
        advice = "bring it (docs/data.md says from where), or name another: --set data.path=FOLDER"
        return Verdict("fail", f"{' and '.join(missing)}: not here", advice)
    if elsewhere:
        words = f"{' and '.join(elsewhere)}: a data set of the hub, not tried"
        return Verdict("skip", words, "python prepare_data.py check tries a folder that is here")
    return Verdict("pass", f"{' and '.join(there)} is here" if there else "it makes or brings its own")


def trackers(cfg: Any) -> Verdict:
    missing = [name for name in cfg.log.trackers if not is_installed(name)]
    if missing:
        how = f"pip install {' '.join(missing)}; or --set log.trackers=[]"
        return Verdict("warn", f"{' and '.join(missing)} is not installed: the run goes on without", how)
    if "wandb" in cfg.log.trackers and os.environ.get("WANDB_MODE", "online") == "online":
        logged_in = bool(os.environ.get("WANDB_API_KEY"))
        with suppress(OSError, netrc.NetrcParseError):
            logged_in = logged_in or netrc.netrc().authenticators("api.wandb.ai") is not None
        if not logged_in:
            return Verdict("warn", "nobody is logged in to wandb here", "wandb login, or export WANDB_MODE=offline")
    return Verdict("pass", f"{' and '.join(cfg.log.trackers) or 'none'} asked for")


def starts_from(cfg: Any, bucket: str | None = None) -> Verdict:
    """The run whose weights are the start, and the one whose pairs are trained on."""
    from ..runs.folders import read_weights

    lines = []
    for key, name in starts(cfg, fresh=True).items():
        if key == "autoencoder":
            continue
        if is_on_hub(name) and not _in_bucket(bucket, name):
            lines.append(f"{name}: of the hub, not tried")
            continue
        try:
            lines.append(f"{name} (step {read_weights(Path(name).expanduser()).step}) is here")
        except UserError as error:
            if not _in_bucket(bucket, name):
                return Verdict("fail", f"{key}: {error}", f"bring that run here, or --set {key}=ANOTHER")
            lines.append(f"{name} is in {bucket}: a launch with that bucket brings it")
    return Verdict("pass", " and ".join(lines) or "from nothing")


def _in_bucket(url: str | None, name: str) -> bool:
    """Whether a launch brings the run `name`; not where the bucket cannot be read, which has a row of its own."""
    from ..storage.buckets import open_bucket

    def look_up() -> Verdict:
        with open_bucket(str(url)) as bucket:
            return verdict_on(weights_in(bucket, Path(name).as_posix()) is not None, name, "")

    try:
        return url is not None and Path(name).parts[:1] == ("runs",) and within(30, look_up).status == "pass"
    except (UserError, TimeoutError):
        return False


def autoencoder(cfg: Any, bucket: str | None = None) -> Verdict:
    from ..runs.autoencoder import open_autoencoder

    name = cfg.autoencoder
    if is_on_hub(name):
        return Verdict("skip", f"{name}: of the hub, not tried")
    try:
        open_autoencoder(name, torch.device("cpu"))
    except UserError as error:
        if _in_bucket(bucket, name):
            return Verdict("pass", f"{name} is in {bucket}: a launch with that bucket brings it")
        return Verdict("fail", str(error), "bring the run here, train it, or --set autoencoder=ANOTHER")
    return Verdict("pass", f"{name} is here and whole")


def hub(cfg: Any) -> Verdict:
    """Whether there is a token to push with. Whether it may write is seen at the start of the run: here nothing is made."""
    from huggingface_hub import get_token

    if get_token() is None:
        return Verdict("fail", f"there is no token to push to {cfg.hub.repo} with", "hf auth login, or set HF_TOKEN")
    return Verdict("pass", f"there is a token; at its start the run says whether it may write to {cfg.hub.repo}")


def perceptual(cfg: Any) -> Verdict:
    if all(stage.perceptual is None for stage in cfg.stages) or cfg.perceptual.network == "random":
        return Verdict("pass", "no stage asks for a network's weights")
    if cfg.perceptual.network == "efficientnet_lite0":
        return efficientnet_weights(required=True)
    return backbone_weights(cfg.perceptual.network, cfg.perceptual.weights, required=True)


def teacher(cfg: Any) -> Verdict:
    """The network that latents are aligned to."""
    if all(stage.alignment is None for stage in cfg.stages) or cfg.teacher.network == "random":
        return Verdict("pass", "no stage asks for a network's weights")
    from ..losses import Teacher

    try:
        Teacher(cfg.teacher)
    except UserError as error:
        return Verdict("fail", str(error), "name a file with --set teacher.weights=FILE")
    return Verdict("pass", f"{cfg.teacher.network} is here and whole")


def count_parameters(cfg: Any) -> tuple[int, int]:
    """Of the network and, of an autoencoder's config, its adversary; a latent network is counted at 4 channels."""
    from ..models import VAE, Discriminator, build_model
    from ..runs.classifier import build_classifier

    networks = list[nn.Module]()
    with torch.device("meta"):
        if hasattr(cfg, "stages"):
            networks = [VAE(cfg.model, cfg.image.channels), Discriminator(cfg.discriminator, cfg.image.channels)]
        elif hasattr(cfg, "classifier"):
            networks = [build_classifier(cfg.classifier, cfg.image, 10)]
        else:
            shape = (2,)
            if cfg.image is not None:
                channels = cfg.image.channels if getattr(cfg, "autoencoder", None) is None else 4
                shape = (channels, cfg.model.factor, cfg.model.factor)
            options = {"learned": cfg.process.variance == "learned", "condition_channels": len(cfg.condition_names(shape))}
            options["augmented"] = cfg.augmentation is not None
            networks = [build_model(cfg.model, shape, None, **options)]
    network, *adversary = (sum(parameter.numel() for parameter in network.parameters()) for network in networks)
    return network, sum(adversary)


def room(cfg: Any, folder: Path) -> Verdict:
    """Free space for the checkpoints that are kept and the one being written: weights, EMA and two moments each."""
    network, adversary = count_parameters(cfg)
    averages = 0 if cfg.ema.snapshot_every is None else len(WIDTHS)
    one = ((4 + averages) * network + 3 * adversary) * (8 if cfg.dtype == "float64" else 4)
    count = cfg.checkpoint.keep + 1 + count_spared(cfg)
    return free_space(folder, float(one * count), f"{count} checkpoints of {size(one)}")


def loader(cfg: Any, world: int) -> Verdict:
    """Shared memory for the batches that a machine's workers have ready: four each, and the one they fill."""
    if cfg.workers == 0 or getattr(cfg, "image", None) is None:
        return Verdict("pass", "the loader has no workers")
    workers, share = min(cfg.workers, os.cpu_count() or 1) * world, -(-cfg.batch_size // world)
    micro = min(cfg.micro_batch_size or share, share)
    return shared_memory(float(workers * 5 * micro * math.prod(cfg.image.shape)))


def batches(cfg: Any, world: int) -> Verdict:
    """Whether a step's images can be dealt to so many processes; of how many images there are it does not depend."""
    plans = [stage.batch_plan for stage in planned_stages(cfg, 10**6, world, {})]
    words = dict.fromkeys(f"{plan.batch} images = {world} x {plan.accumulation} x {plan.micro}" for plan in plans)
    return Verdict("pass", f"a step is {', then '.join(words)}")


def checks(cfg: Any, folder: Path, local_world: int, world: int, bucket: str | None = None) -> dict[str, Check]:
    """Those of this config, by name; of `world` processes `local_world` are on this machine, the run is written into `folder`,
    and what it starts from may be in the `bucket`."""
    chosen: dict[str, Check] = {
        "batches": partial(batches, cfg, world),
        "data": partial(data, cfg),
        "trackers": partial(trackers, cfg),
        "starting weights": partial(starts_from, cfg, bucket),
    }
    if getattr(cfg, "autoencoder", None) is not None:
        chosen["autoencoder"] = partial(autoencoder, cfg, bucket)
    if cfg.hub is not None:
        chosen["hub"] = partial(hub, cfg)
    if hasattr(cfg, "perceptual"):
        chosen["perceptual loss"] = partial(perceptual, cfg)
        if any(stage.alignment is not None for stage in cfg.stages):
            chosen["teacher"] = partial(teacher, cfg)
    return chosen | {"free space": partial(room, cfg, folder), "shared memory": partial(loader, cfg, local_world)}
