"""A pipeline of diffusers that draws the images of an exported run. `convert.py to-diffusers` writes this file as pipeline.py
into the folder; nothing in Atelier imports it, and it imports nothing of Atelier.

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    images = pipeline(batch_size=4, classes=[3, 7, 3, 7], guidance_scale=2, seed=0).images

The images of (seed, index) are those of Atelier's `sample.py --seed SEED`: they start from the same noise, and DDIM with eta 0
(Song et al. 2020, arXiv:2010.02502; on the straight blend that is Euler's rule) takes the same steps.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor


def noise_of(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(indices), *shape), float32 on the CPU: a function of (seed, image) alone, by Philox."""
    keys = [np.array([seed, i], dtype=np.uint64) for i in indices]
    generators = (np.random.Generator(np.random.Philox(key=key)) for key in keys)
    return torch.from_numpy(np.stack([each.standard_normal(tuple(shape), dtype=np.float32) for each in generators]))


def alphas_bar(schedule: dict[str, Any]) -> Tensor:
    """The squares of alpha at the levels 0 .. steps - 1 of a table, float64."""
    steps, kind = schedule["steps"], schedule["kind"]
    if kind == "cosine":  # Eq. 17, Nichol & Dhariwal 2021, arXiv:2102.09672
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(steps)], dtype=torch.float64)
    else:
        scale = 1000 / steps if schedule["rescale_betas"] else 1.0
        start, end = scale * schedule["beta_start"], scale * schedule["beta_end"]
        if kind == "quadratic":
            betas = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        else:
            betas = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start
    squares = torch.cumprod(1 - betas, dim=0)
    if schedule["zero_terminal_snr"]:  # Alg. 1, Lin et al. 2023, arXiv:2305.08891
        alpha = squares.sqrt()
        squares = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return squares


def levels(process: dict[str, Any], steps: int) -> list[tuple[float, float, float]]:
    """(what the network is fed, alpha, sigma) at each step from the noise on, and at last of the clean image."""
    schedule, time = process["schedule"], process["time_input"] or {}
    if schedule["kind"] == "blend":
        scale, is_alpha = time.get("scale", 1000.0), time.get("kind") == "alpha"
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        return [(scale * (1 - t if is_alpha else t), 1 - t, t) for t in grid]
    total = schedule["steps"]
    if steps > total:
        raise ValueError(f"num_inference_steps {steps} is more than the {total} levels of the schedule")
    squares, stride, at, taken = alphas_bar(schedule), (total - 1) / max(1, steps - 1), 0.0, list[int]()
    for _ in range(steps):
        taken.append(round(at))
        at += stride
    taken = [total - 1] if steps == 1 else taken
    return [(float(i), math.sqrt(squares[i]), math.sqrt(1 - squares[i])) for i in reversed(taken)] + [(-1.0, 1.0, 0.0)]


class AtelierPipeline(DiffusionPipeline):
    """`process` is what Atelier's configs call so; `negated` says that the U-Net gives minus its target. `low` and `high` bound
    each channel of the latents, where the process clips them. `null_class` says that the last class of the U-Net is none."""

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae", "scheduler"]  # noqa: RUF012 (diffusers writes it so)

    def __init__(
        self,
        unet: Any,
        vae: Any = None,
        scheduler: Any = None,
        process: Any = None,
        negated: bool = False,
        low: Any = None,
        high: Any = None,
        class_names: Any = (),
        null_class: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        values = {"process": process, "negated": negated, "low": low, "high": high}
        self.register_to_config(**values, class_names=list(class_names), null_class=null_class)

    @property
    def _settings(self) -> Any:
        """What was registered, as attributes."""
        return self.config

    @property
    def num_classes(self) -> int | None:
        """How many classes there are, without the null class; None where the network has none."""
        count = self.unet.config.num_class_embeds
        return count - self._settings.null_class if count is not None else None

    def _labels(self, classes: int | str | Sequence[int | str] | None, count: int) -> Tensor | None:
        """A class for each image, by number or name; where `classes` is None, all of them in turn."""
        if self.num_classes is None:
            if classes is not None:
                raise ValueError("this network has no classes; leave classes out")
            return None
        given = list(range(self.num_classes)) if classes is None else [classes] if isinstance(classes, int | str) else classes
        names = list(self._settings.class_names)
        labels = [names.index(each) if isinstance(each, str) and each in names else each for each in given]
        for label in labels:
            if not isinstance(label, int) or not 0 <= label < self.num_classes:
                known = ", ".join(names) or f"0 to {self.num_classes - 1}"
                raise ValueError(f"class {label!r} is not known; the classes are: {known}")
        if classes is not None and len(labels) not in (1, count):
            raise ValueError(f"classes has {len(labels)} entries for {count} images; give one for all, or one for each")
        return torch.tensor([labels[i % len(labels)] for i in range(count)], device=self.unet.device)

    def _estimate(self, x: Tensor, level: tuple[float, float, float], labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The network's x0 and eps: x_t = alpha x0 + sigma eps, and its target is p x0 + q eps."""
        time, alpha, sigma = level
        times = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        y = self.unet(x.to(self.unet.dtype), times, class_labels=labels).sample[:, : x.shape[1]].to(x.dtype)
        y = -y if self._settings.negated else y
        targets = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-sigma, alpha), "blend": (1.0, -1.0)}
        p, q = targets[self._settings.process["target"]]
        d = alpha * q - sigma * p
        return (q / d) * x - (sigma / d) * y, (alpha / d) * y - (p / d) * x

    def _bound(self, x0: Tensor) -> Tensor:
        if self.vae is None:
            return x0.clamp(-1, 1)
        bounds = (self._settings.low, self._settings.high)
        low, high = (torch.tensor(each, dtype=x0.dtype, device=x0.device)[:, None, None] for each in bounds)
        return torch.clamp(x0, min=low, max=high)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        classes: int | str | Sequence[int | str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        seed: int = 0,
        first_index: int = 0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw the images `first_index` and following of `seed`.

        `classes` are numbers or names, one for all images or one for each; `guidance_scale` 1 is no guidance (Ho & Salimans
        2022). `height` and `width` are in pixels. `latents` (batch_size, channels, h, w) is the noise to start from in place
        of the seed's. `output_type` is pil, np (B, H, W, C) or pt (B, C, H, W), both in [0, 1].
        """
        if batch_size < 1 or num_inference_steps < 1 or output_type not in ("pil", "np", "pt"):
            raise ValueError("batch_size and num_inference_steps must be at least 1, and output_type pil, np or pt")
        labels = self._labels(classes, batch_size)
        if guidance_scale != 1 and (labels is None or not self._settings.null_class):
            raise ValueError("guidance_scale needs a network with classes that learned without them, too (label_dropout)")
        unet, factor = self.unet, 1
        if self.vae is not None:
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        sides = unet.config.sample_size if isinstance(unet.config.sample_size, list | tuple) else [unet.config.sample_size] * 2
        sides = [given // factor if given is not None else side for given, side in zip((height, width), sides, strict=True)]
        if latents is None:
            latents = noise_of(seed, range(first_index, first_index + batch_size), (unet.config.in_channels, *sides))
        x = latents.to(unet.device, torch.float32)
        null = torch.full((batch_size,), self.num_classes or 0, device=unet.device)
        process, progress_bar = self._settings.process, cast(Any, self.progress_bar)
        for level, following in progress_bar(list(pairwise(levels(process, num_inference_steps)))):
            _, alpha, sigma = level
            x0, eps = self._estimate(x, level, labels)
            if guidance_scale != 1:
                null_x0, null_eps = self._estimate(x, level, null)
                x0, eps = null_x0 + guidance_scale * (x0 - null_x0), null_eps + guidance_scale * (eps - null_eps)
            if process["clip"]:
                x0 = self._bound(x0)
                eps = (x - alpha * x0) / sigma
            x = following[1] * x0 + following[2] * eps
        if self.vae is not None:
            z = x / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
            x = self.vae.decode(z.to(self.vae.dtype)).sample.float()
        if output_type == "pil":
            images: Any = self._to_pil(x)
        else:
            images = (x / 2 + 0.5).clamp(0, 1).cpu()
            images = images.permute(0, 2, 3, 1).numpy() if output_type == "np" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _to_pil(self, x: Tensor) -> list[Any]:
        from PIL import Image

        scaled = ((x.cpu() + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
        return [Image.fromarray(each[:, :, 0] if each.shape[2] == 1 else each) for each in scaled]
