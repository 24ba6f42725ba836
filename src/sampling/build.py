"""The sampler of a trained network."""

import re
from collections.abc import Sequence

from torch import nn

from ..config import UserError
from ..data.names import join_names, parse_classes, same_names
from ..diffusion import Process
from ..runs.autoencoder import LatentCodec
from ..runs.classifier import OpenedClassifier
from ..runs.densities import Bound, Start
from ..runs.opened import Opened, Run
from .config import SamplerConfig
from .sampler import Sampler


def count_for_classes(count: int, classes: str | None, class_names: Sequence[str] = ()) -> int:
    """The least number of images from `count` on that can be dealt to the classes A/B/C in equal blocks. Without the
    `class_names`, which a name with a slash in it needs, each slash divides two classes."""
    if classes is None:
        return count
    each = len(parse_classes(classes, class_names)) if class_names else len(re.split(r"(?<!\\)/", classes))
    return -(-count // each) * each


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
    classifier: OpenedClassifier | None = None,
    source: Start | None = None,
    origin: str | None = None,
) -> Sampler:
    """The sampler of a network that was trained with this `label_dropout`. `clip` clamps estimates of x_0 to `bounds`. `origin`
    names the network where the samples must be finite."""
    return Sampler(
        network,
        process,
        spec,
        shape=shape,
        num_classes=num_classes,
        clip_x0=bounds if clip else None,
        guidable=label_dropout > 0,
        codec=codec,
        classifier=classifier,
        source=source,
        origin=origin,
    )


def build_sampler(
    run: Run, spec: SamplerConfig, classifier: OpenedClassifier | None = None, *, source: Start | None = None
) -> Sampler:
    """The sampler of an opened run. It starts from `source`, or else where the run itself starts. A UserError says why the
    `classifier` does not fit the run."""
    clip, images = False, {}
    if isinstance(run, Opened):  # not 2-D points
        if classifier is not None:
            _check_classifier(run, classifier)
        clip = run.config["process"]["clip"]
        images = {"codec": run.codec, "bounds": run.bounds, "classifier": classifier}
    return sampler_of(
        spec,
        run.network,
        run.process,
        run.shape,
        run.num_classes,
        clip=clip,
        label_dropout=run.config["label_dropout"],
        source=source or run.starts(),
        origin=run.origin,
        **images,
    )


def _check_classifier(run: Opened, classifier: OpenedClassifier) -> None:
    """Refuse a classifier of other images or classes."""
    channels, size = classifier.image.channels, classifier.image.size
    if run.codec is not None:
        raise UserError(f"{run.path} draws latents, which no classifier of images sees; use classifier_free guidance")
    if run.shape[:2] != (channels, size):
        raise UserError(
            f"the classifier {classifier.path} sees {size} px in {channels} channel(s), {run.path} draws {run.shape[1]} px "
            f"in {run.shape[0]}; train one with the same image"
        )
    if run.num_classes is not None and not same_names(run.class_names, classifier.class_names):
        raise UserError(
            f"the classifier {classifier.path} knows other classes ({join_names(classifier.class_names)}) than {run.path} "
            f"({join_names(run.class_names)})"
        )
