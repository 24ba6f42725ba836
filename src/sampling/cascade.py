"""Cascades: what one run draws, made larger by an upsampler (Ho et al. 2021, arXiv:2106.15282)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config import UserError
from ..data.conditions import LowCondition
from ..data.names import normal_form
from ..runs.opened import Opened, open_trained
from ..storage.blocks import Ranks
from .conditions import Conditioned, read_conditions
from .config import SamplerConfig
from .edit import load_low
from .files import Watch, write_samples
from .sampler import Sampler, build_sampler


def open_upsampler(path: str, device: torch.device) -> Opened:
    """A run that makes images larger; a UserError where it does something else."""
    opened = open_trained(path, device)
    if not isinstance(opened.condition, LowCondition):
        raise UserError(f"{path} makes no images larger; --then takes a run with the condition low, or an imported upsampler")
    return opened


def sampler_of(opened: Opened, spec: SamplerConfig) -> Sampler:
    """The sampler of an upsampler, guided where it can be; without the guide of the run that draws the small images."""
    guidable = opened.num_classes is not None and opened.config["label_dropout"] > 0 and spec.guide_with is None
    return build_sampler(opened, replace(spec, guide_with=None).without_guidance(not guidable))


def write_larger(
    opened: Opened,
    sampler: Sampler,
    folder: Path,
    *,
    class_names: Sequence[str] | None,
    level: float,
    seed: int,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
    watch: Watch | None = None,
) -> list[Path]:
    """Make the samples of the folder larger, into its subfolder `larger`. `class_names` are those of the samples, in order;
    an upsampler that does not know one of them draws without a class. `level` is that of the noise on the samples."""
    if opened.low_resolution is not None:
        values = list(load_low(opened, str(folder))[0])
        conditioned = Conditioned(values, values, None)
    else:
        conditioned = read_conditions(opened, str(folder), level=level, seed=seed)
    labels, known = None, {normal_form(name): i for i, name in enumerate(opened.class_names)}
    if opened.num_classes is not None:
        if class_names is not None and all(normal_form(name) in known for name in class_names):
            labels = [known[normal_form(name)] for name in class_names]
        else:
            opened.no_class()
    return write_samples(
        opened,
        sampler,
        folder / "larger",
        count=len(conditioned.values),
        batch_size=batch_size,
        labels=labels,
        seed=seed,
        frames=False,
        device=device,
        ranks=ranks,
        condition=conditioned.values,
        request={"condition": conditioned.digest},
        watch=watch,
    )
