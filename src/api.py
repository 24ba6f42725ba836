"""Draw from a run in Python: atelier.from_pretrained gives what was trained, ready to draw."""

from . import threads  # noqa: F401, I001 (before torch, which reads it at its start)
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import figures
from .config import UserError, validate
from .config.sizes import Sides, sides_of
from .runs.opened import Opened, open_trained
from .runtime.failures import explain_out_of_memory
from .runtime.launch import start_sampling
from .sampling.config import SamplerConfig
from .sampling.files import batches_by_shape
from .sampling.plan import DrawRequest, Plan, plan_samples
from .sampling.sampler import Sampler, build_sampler
from .storage.hub import forget

if TYPE_CHECKING:
    from PIL import Image


class Pretrained:
    """A run of images that draws. `opened` is the run with its network, its process and its config, on the `device`."""

    def __init__(self, opened: Opened, device: torch.device) -> None:
        self.opened, self.device = opened, device

    def __repr__(self) -> str:
        return f"Pretrained({str(self.opened.path)!r}, step {self.opened.step}, on {self.device})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its classes, none where it has none."""
        return self.opened.class_names if self.opened.num_classes is not None else ()

    def draw(
        self,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        size: int | Sides | None = None,
        batch_size: int = 16,
        condition: str | Path | None = None,
        condition_guidance: float = 1.0,
        **settings: Any,
    ) -> "list[Image.Image]":
        """Draw images, the same as `sample.py` with the same settings: to the bit, on the same device.

        `classes` are names or numbers, or text as `A/B/C`, dealt to the images in equal blocks (default: random ones);
        `num_samples` is 16 by default, or a few more, for the classes. `size` is (height, width) or the side of a square.
        `batch_size` images are drawn at a time, and change each other only by rounding. A run that draws from images is given
        them as `condition`, a file or a folder, and draws `num_samples` of each (default 1). All other `settings` are the keys
        of a sampler: solver, steps, spacing, eta, guidance, guidance_interval, guide_with and the others of `SamplerConfig`.
        A UserError says what does not fit.
        """
        opened = self.opened
        if opened.condition is not None and condition is None:
            raise UserError(f"{opened.path} draws from images ({opened.condition.kind}): give condition, a file or a folder")
        text = None if classes is None else classes if isinstance(classes, str) else self._join(classes)
        if (num_samples is not None and num_samples < 1) or batch_size < 1 or not 0 <= seed < 2**64:
            raise UserError("num_samples and batch_size must be at least 1, seed from 0 to 2^64 - 1")
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        spec = validate(SamplerConfig, listed, origin="draw")
        if spec.guided and spec.guidance_method == "classifier":
            raise UserError("guidance by a classifier is for sample.py, which takes --classifier RUN; draw guides without one")
        request = DrawRequest(
            run=str(opened.path),
            spec=spec,
            num_samples=num_samples,
            classes=text,
            size=None if size is None else "x".join(map(str, sides_of(size))),
            seed=seed,
            condition=None if condition is None else str(condition),
        )
        opened = opened if size is None else opened.at_size(sides_of(size))
        sampler = build_sampler(opened, spec, condition_guidance=condition_guidance)
        return self._draw(sampler, seed, batch_size, plan_samples(opened, sampler, request.arguments))

    def _draw(self, sampler: Sampler, seed: int, batch_size: int, plan: Plan) -> "list[Image.Image]":
        """The images in their order; those of one shape are drawn together."""
        values = plan.condition
        shapes = [(sampler.shape[0], *each.shape[1:]) for each in values or ()] if self.opened.buckets else []
        images = dict[int, "Image.Image"]()
        with explain_out_of_memory(batch_size, batch_size, key="batch_size"):
            for batch in batches_by_shape(shapes, plan.count, batch_size):
                labels = [plan.labels[i] for i in batch] if plan.labels is not None else None
                given = torch.stack([values[i] for i in batch]) if values is not None else None
                shaped = sampler.at_shape(shapes[batch[0]]) if shapes else sampler
                x = shaped.draw(seed, batch, labels, device=self.device, batch_size=batch_size, condition=given)
                images |= {i: figures.to_image(pixels) for i, pixels in zip(batch, figures.to_uint8(x), strict=True)}
        return [images[i] for i in range(plan.count)]

    def _join(self, classes: Any) -> str:
        """Classes as one text. A number, of NumPy and torch too, is that of a class, also where a class has a number for its
        name."""
        names, words = self.class_names, list[str]()
        for each in classes if np.ndim(classes) else [classes]:
            each = each if isinstance(each, str) else operator.index(each)
            if isinstance(each, int) and not 0 <= each < len(names):
                raise UserError(f"class {each} is not known: {self.opened.path} has {len(names)} classes")
            words.append((names[each] if isinstance(each, int) else each).replace("/", "\\/"))
        return "/".join(words)


def from_pretrained(name: str, *, device: str | None = None) -> Pretrained:
    """Open a run by its path (a run, a checkpoint, a final folder, an export) or by its name on the Hugging Face hub,
    OWNER/NAME[@REVISION], on the `device` (cpu, cuda, mps; default: the best there is). A UserError says what is missing."""
    _, chosen = start_sampling(device)
    forget(name)
    return Pretrained(open_trained(name, chosen), chosen)
