"""Write our networks as folders that diffusers loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from ..config import UserError, dump
from ..config.sizes import Sides, sides_of
from ..diffusion import ProcessConfig
from ..diffusion.process import time_input_for
from ..diffusion.schedules import BlendScheduleConfig
from ..models import UNet
from ..runs.diffusers_autoencoder import VERSION, WEIGHTS
from ..storage.files import check_is_new, new_folder, write_flushed
from .cards import render_card
from .diffusers_import import negate_output
from .imported import LATENTS
from .schedulers import scheduler_config
from .unet_2d import state_for_diffusers, unet2d_config

PIPELINE = {"_class_name": "DDPMPipeline", "_diffusers_version": VERSION}
PIPELINE |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
OUR_PIPELINE = Path(__file__).parent / "diffusers_pipeline.py"


def export(
    network: UNet,
    spec: ProcessConfig,
    *,
    image_size: int | Sides,
    out: Path,
    name: str,
    class_names: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    latents: Mapping[str, Any] | None = None,
    autoencoder: Mapping[str, bytes] | None = None,
) -> None:
    """Write the new folder `out`, which diffusers loads; it is whole or absent. Its README.md has Python that samples from it.

    Without `latents` the network sees images (1 or 3 channels, *image_size) in [-1, 1], and a DDPMPipeline loads the
    folder; so does a DDIMPipeline, but for a learned variance and the sigmoid schedule. diffusers has no pipeline for classes,
    for latents (the folder has their autoencoder in `vae`) and for the blend (it has the UNet2DModel, its head negated, and a
    FlowMatchEulerDiscreteScheduler): for these the folder has one of its own, `pipeline.py`. A network of images that is fed
    another time than 1000 t leaves as a UNet2DModel alone. `process.json` and `classes.json` keep what diffusers has no place
    for. `data` is the data.json of the run. `latents` are the facts of a latent run (shape, and mean, std, low, high for each
    channel), and `autoencoder` the files of an AutoencoderKL whose latents, by its scaling_factor and shift_factor, are the
    normalised ones that the U-Net sees. A UserError names the option that a UNet2DModel or the schedulers lack, before
    anything is written.
    """
    unet = unet2d_config(network, image_size=image_size if latents is None else tuple(latents["shape"][1:]))
    scheduler = scheduler_config(spec)
    if latents is not None and scheduler is not None and "clip_sample" in scheduler:
        scheduler["clip_sample"] = False  # diffusers clips all channels to one range, the loop of the card each to its own
    channels, outputs = unet["in_channels"], unet["out_channels"]
    if latents is None and channels not in (1, 3):
        raise UserError(
            f"the network sees {channels} channels; a DDPMPipeline makes images of 1 or 3 channels, and decodes no latents"
        )
    if outputs != channels * (2 if spec.variance == "learned" else 1):
        raise UserError(
            f"a network of {channels} channels in and {outputs} out does not go with process.variance {spec.variance}"
        )
    blend = isinstance(spec.schedule, BlendScheduleConfig)
    place = "unet/" if scheduler is not None or latents is not None else ""
    is_pipeline, has_classes = not blend and latents is None, network.num_classes is not None
    own_pipeline = bool(place) and (has_classes or not is_pipeline)
    index = (
        _pipeline_index(network, spec, scheduler, latents, class_names) if own_pipeline else PIPELINE if is_pipeline else None
    )
    documents = {
        f"{place}config.json": unet,
        "scheduler/scheduler_config.json": scheduler,
        "process.json": None if is_pipeline else dump(spec),
        LATENTS: latents,
        "model_index.json": index,
        "classes.json": {"class_names": list(class_names), "null_class": network.null_class} if has_classes else None,
    }
    files = {path: (json.dumps(content, indent=2) + "\n").encode() for path, content in documents.items() if content}
    if own_pipeline:
        files["pipeline.py"] = OUR_PIPELINE.read_bytes()
    state_dict = state_for_diffusers(network)
    if blend and scheduler is not None:
        state_dict = negate_output(state_dict)
    files[f"{place}{WEIGHTS}.safetensors"] = safetensors.torch.save(state_dict, metadata={"format": "pt"})
    if autoencoder is not None:
        files |= {f"vae/{file}": content for file, content in autoencoder.items()}
        channels = json.loads(autoencoder["config.json"])["out_channels"]
    card = render_card(
        "unet_2d",
        name=name,
        folder=out.name,
        channels=channels,
        size=sides_of(image_size),
        other=_other_size(data or {}, sides_of(image_size)),
        network=network,
        class_names=class_names,
        unet=unet,
        spec=spec,
        blend=blend,
        scheduler=scheduler["_class_name"] if scheduler is not None else None,
        time=_time_in_python(spec) if blend else None,
        facts=latents,
        own_pipeline=own_pipeline,
        data={**(data or {}), "class_names": []},  # the card lists the classes itself
    )
    write_files(out, {**files, "README.md": card.encode()})


def _pipeline_index(
    network: UNet,
    spec: ProcessConfig,
    scheduler: Mapping[str, Any] | None,
    latents: Mapping[str, Any] | None,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """The model_index.json for our pipeline.py: the parts that diffusers loads, and what the pipeline has to know besides."""
    parts = {"unet": ["diffusers", "UNet2DModel"]}
    parts |= {"vae": ["diffusers", "AutoencoderKL"]} if latents is not None else {}
    parts |= {"scheduler": ["diffusers", scheduler["_class_name"]]} if scheduler is not None else {}
    bounds = {key: list(latents[key]) for key in ("low", "high")} if latents is not None and spec.clip else {}
    is_blend = isinstance(spec.schedule, BlendScheduleConfig)
    return {
        "_class_name": ["pipeline", "AtelierPipeline"],
        "_diffusers_version": VERSION,
        **parts,
        "process": dump(spec),
        "negated": is_blend and scheduler is not None,
        **bounds,
        "class_names": list(class_names) if network.num_classes is not None else [],
        "null_class": network.num_classes is not None and network.null_class,
    }


def _other_size(data: Mapping[str, Any], sides: Sides) -> Sides:
    """The most frequent size of the run's `buckets` besides `sides`; `sides` where there is no other."""
    others = [(count, height, width) for height, width, count in data.get("buckets", ()) if (height, width) != sides]
    return max(others)[1:] if others else sides


def _time_in_python(spec: ProcessConfig) -> str:
    """The time that a network on the blend is fed, as Python that knows alpha."""
    time = time_input_for(spec.schedule, spec.time_input)
    expression = "alpha" if time.kind == "alpha" else "(1 - alpha)"
    return expression if time.scale == 1 else f"{str(time.scale).removesuffix('.0')} * {expression}"


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` by their paths into the new folder `out`, which is whole or absent."""
    check_is_new(out)
    with new_folder(out) as staged:
        for path, content in files.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            write_flushed(staged / path, content)
