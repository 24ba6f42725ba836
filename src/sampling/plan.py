"""What `sample.py` and the app draw: how many images of which classes, and the images that they are drawn from."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..runs.classifier import OpenedClassifier
from ..runs.opened import Opened
from .conditions import Conditioned, read_given
from .config import count_for_classes
from .edit import Edit, files_of, fingerprint, load_edit
from .sampler import Sampler, random_labels


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
