"""What `sample.py`, `from_pretrained` and the app draw: how many images of which classes, and what they are drawn from."""

import argparse
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import UserError
from ..runs.classifier import OpenedClassifier
from ..runs.opened import Opened
from .conditions import Conditioned, read_given
from .config import SamplerConfig, count_for_classes, sampler_words
from .edit import Edit, files_of, fingerprint, load_edit
from .sampler import Sampler, random_labels


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """The arguments of sample.py that `from_pretrained` and the app know, with the defaults that they have there. `run` is a
    path as the script takes it, `spec` the sampler."""

    run: str
    spec: SamplerConfig = field(default_factory=SamplerConfig)
    num_samples: int | None = None
    batch_size: int = 16
    classes: str | None = None
    size: str | None = None
    seed: int = 0
    frames: bool = False
    image: str | None = None
    start_at: int = 0
    mask: str | None = None
    resamplings: int = 1
    condition: str | None = None
    then: str | None = None
    condition_guidance: float = 1.0
    condition_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise UserError("the seed goes from 0 to 2^64 - 1")
        if (self.num_samples is not None and self.num_samples < 1) or self.resamplings < 1:
            raise UserError("the number of images and of resamplings is at least 1")

    @property
    def arguments(self) -> argparse.Namespace:
        """As sample.py reads them, without those of the sampler."""
        others = {"low": None, "truth": None, "source": None, "classifier": None}
        return argparse.Namespace(**{key.name: getattr(self, key.name) for key in fields(self)}, **others)

    @property
    def words(self) -> list[str]:
        """The arguments of `python sample.py`: number, batch size, seed and sampler always, the others where they are not the
        default."""
        words = [self.run]
        for key in fields(self):
            value, option = getattr(self, key.name), f"--{key.name.replace('_', '-')}"
            if key.name in ("run", "spec") or (value == key.default and key.name not in ("seed", "batch_size")):
                continue
            words += [option] if value is True else [option, str(value)]
        return [*words, *sampler_words(self.spec)]

    def command(self, device: str | None = None) -> str:
        """The whole command, as a shell takes it. `device` is named where it is not the best that there is."""
        return command_line("sample.py", [*self.words, *(["--device", device] if device is not None else [])])


def command_line(script: str, words: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(["python", script, *words])


@dataclass(frozen=True)
class Plan:
    """What `write_samples` is given of what is asked for: the number of images, their labels (None without classes) and the
    names of all classes, what is kept of an image, and what the network is told of the images that it draws from. `request` is
    what else the samples depend on."""

    count: int
    labels: list[int] | None
    class_names: Sequence[str]
    edit: Edit | None
    condition: list[Tensor] | None
    conditioned: Conditioned | None
    request: dict[str, Any]

    @property
    def job(self) -> dict[str, Any]:
        """The same as arguments of `write_samples`, without the request."""
        return {key.name: getattr(self, key.name) for key in fields(self) if key.name != "request"}


def plan_samples(
    opened: Opened, sampler: Sampler, args: argparse.Namespace, classifier: OpenedClassifier | None = None
) -> Plan:
    """What the arguments of sample.py ask for; `args.num_samples` becomes the number of images in all. A UserError says what
    does not fit the run."""
    known = classifier.class_names if classifier is not None else ()
    class_names = opened.class_names if opened.num_classes is not None else known
    values, conditioned, labels, request = read_given(opened, args)
    if args.size is not None or opened.buckets:
        request["size"] = list(opened.image.sides)
    if args.source is not None:
        files = files_of(args.source)
        args.num_samples, request["source"] = args.num_samples or len(files), fingerprint(files)
    args.num_samples = args.num_samples or count_for_classes(16, args.classes, class_names)
    if args.classes is not None:
        labels = opened.labels(args.classes, args.num_samples, class_names)
    elif labels is not None and opened.num_classes is not None:
        labels = labels[: args.num_samples]
    elif conditioned is not None and opened.num_classes is not None and classifier is None:
        opened.no_class()  # nobody knows the class of what is drawn from a given image
    elif opened.num_classes is not None or classifier is not None:
        labels = random_labels(args.seed, range(args.num_samples), len(class_names))
    edit = None
    if args.image is not None:
        keep = {"start_at": args.start_at, "resamplings": args.resamplings}
        edit = load_edit(opened, args.image, args.mask, steps=sampler.steps, **keep)
        files = {key: hashlib.sha256(Path(getattr(args, key)).read_bytes()).hexdigest() for key in ("image", "mask")
                 if getattr(args, key) is not None}  # fmt: skip
        request["edit"] = {**files, **keep}
    if classifier is not None:
        request["classifier"] = classifier.digest
    return Plan(args.num_samples, labels, class_names, edit, values, conditioned, request)
