"""Pairs (source, its sample) that an earlier run makes ahead, to train straighter paths on: reflow."""

import hashlib
import json
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from pydantic import Discriminator, Tag
from torch import Tensor

from ..config import UserError, config, config_error, dump, kind_of, read_json
from ..config.progress import within
from ..data import ImageSet
from ..data.latents import FILES, LatentSet, open_blocks
from ..data.names import same_names
from ..data.transforms import DECODER
from ..diffusion import DETERMINISTIC
from ..runs.ends import Coupling
from ..runs.latents import CONTENT
from ..runs.opened import open_run
from ..runtime.examples import Examples
from ..runtime.processes import ranks_of
from ..runtime.stream import BatchPlan, MicroBatch, Order, positions_of
from ..sampling.build import build_sampler
from ..sampling.sampler import Sampler, SamplerConfig, random_labels
from ..storage.blocks import Block
from ..storage.caches import BLOCK, blocks_of, make_cache, write_block
from .trials import Attempt


@config
class PairsConfig:
    """`count` pairs (source, sample) of the finished run `run` (at most one for each source that is learned from), made once,
    on all ranks, by `sampler`: its calls cost their time once, and what it draws is what is learned.

    Sec. 2.2, Liu et al. 2022, arXiv:2209.03003.
    """

    run: str
    count: int = pydantic.Field(20_000, ge=2)
    seed: int = pydantic.Field(1, ge=0, lt=2**32)
    sampler: SamplerConfig = SamplerConfig(solver="heun", steps=32)
    batch_size: int = pydantic.Field(64, ge=1, le=BLOCK)

    @pydantic.model_validator(mode="after")
    def _paired(self) -> "PairsConfig":
        if self.sampler.solver not in DETERMINISTIC and (self.sampler.solver != "ddim" or self.sampler.eta):
            raise config_error("sampler: noise on the way parts a source from its sample; use euler, midpoint, heun or rk4")
        if self.sampler.stop_at is not None or self.sampler.double_sampling is not None:
            raise config_error("sampler: pairs are of a source and the end of its way; leave stop_at and double_sampling out")
        return self


Pairs = Annotated[
    Annotated[str | None, Tag("plain")] | Annotated[PairsConfig, Tag("object")],
    Discriminator(kind_of),
]


LATENTS = {"autoencoder": "autoencoder", "mean": "mean", "std": "scale"}


def _at(facts: Any, way: Sequence[str]) -> Any:
    for key in way:
        facts = (facts or {}).get(key)
    return facts


class PairEnds(Coupling):
    """The ends of a run, paired as an earlier run has moved the one to the other. Made in its folder (else in `run_dir`)."""

    def __init__(
        self,
        spec: str | PairsConfig,
        ends: Coupling,
        num_classes: int | None,
        run_dir: Path,
        accelerator: Accelerator,
        attempt: Attempt,
    ) -> None:
        super().__init__(ends.data, ends.source)
        spec = PairsConfig(run=spec) if isinstance(spec, str) else spec
        run = open_run(spec.run, accelerator.device)
        if run.shape != self.shape:
            sizes = [" x ".join(map(str, shape)) for shape in (run.shape, self.shape)]
            raise UserError(f"pairs.run {spec.run} makes {sizes[0]}, and this run sees {sizes[1]}; name a run of the same data")
        same = same_names(run.class_names, ends.data.train.class_names)
        if num_classes is not None and (run.num_classes is None or not same):
            raise UserError(f"pairs.run {spec.run} has other classes; name another run, or set class_conditional to false")
        if run.gaussian != (ends.source is None):
            raise UserError(f"pairs.run {spec.run} starts from another source; give both runs the same")
        mine, its = ends.facts, run.facts
        shared = {"other data": ("fingerprint",), "another source": ("source", "fingerprint")}
        shared |= {f"latents of another {word}": ("latents", key) for key, word in LATENTS.items()}
        for what, way in shared.items():
            if "fingerprint" in its and _at(mine, way) != _at(its, way):  # an import does not say what it was trained on
                raise UserError(f"pairs.run {spec.run} was trained on {what}; give both runs the same")
        count = spec.count if ends.source is None else min(spec.count, len(ends.source.train))
        if num_classes is None:
            run.no_class()
        self._contract = {"weights": run.digest, "shape": list(self.shape)}
        self._contract |= {key: value for key, value in dump(spec).items() if key != "run"}
        name = hashlib.sha256(json.dumps(self._contract).encode()).hexdigest()[:8]
        folder = (Path(spec.run) if (Path(spec.run) / "checkpoints").is_dir() else run_dir) / "pairs" / name
        source = ends.source.starts(trained=True) if ends.source is not None else None
        sampler, classes = (
            build_sampler(run, spec.sampler, source=source),
            len(run.class_names) if num_classes is not None else None,
        )

        def write(_: str, block: Block) -> None:
            values, labels = _make(sampler, spec, block.items, classes, accelerator.device)
            write_block(block, values, {"labels": labels})

        if attempt.trial and not folder.exists():  # the first ones stand for all
            attempt.enters("making the first pairs")
            began = time.monotonic()
            values, labels = _make(sampler, spec, range(min(count, 64)), classes, accelerator.device)
            repeats = -(-count // len(values))
            attempt.ahead((time.monotonic() - began) * (repeats / accelerator.num_processes - 1))
            self._pairs, self._labels = LatentSet([values] * repeats, accelerator.device), np.tile(labels, repeats)
            return
        files = ends.source.train if ends.source is not None and isinstance(ends.source.train, ImageSet) else None
        if not folder.exists():
            notes = None
            if files is not None:
                notes = {FILES: {"decoder": DECODER, "state": files.state, CONTENT: files.contents(range(len(files)))}}
            words, ranks = {"name": "folder of pairs", "doing": "making pairs"}, ranks_of(accelerator)
            make_cache(folder, self._contract, {"pairs": count}, write, lambda _: {}, ranks, **words, notes=notes)
        manifest = read_json(folder / "manifest.json")
        if any(manifest.get(key) != value for key, value in self._contract.items()):
            raise UserError(f"the folder of pairs {folder} is of something else; remove it, and it is made again")
        if files is not None and accelerator.is_main_process:
            known = manifest.get(FILES)
            if known and known["state"] != files.state and known[CONTENT] != files.contents(range(len(files))):
                raise UserError(
                    f"the folder of pairs {folder} was made from other source images (files of the same names and sizes have "
                    "another content now); remove it, and it is made again"
                )
        accelerator.wait_for_everyone()
        self._pairs = open_blocks(folder, "pairs", count, accelerator.device, "folder of pairs")
        self._pairs.load_to_device()
        facts = [read_json(block.path) for block in blocks_of(folder, "pairs", count)]
        self._labels = np.array([label for block in facts for label in block["labels"]], dtype=np.int64)

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"images": self.num_images, "pairs": self._contract}

    @property
    def num_images(self) -> int:
        return len(self._labels)

    def held_out(self) -> Examples | None:
        """Nothing: what is held out is not paired."""
        return None

    def stream(
        self, split: BatchPlan, *, seed: int, balanced: bool, start_step: int, dtype: torch.dtype, **_: Any
    ) -> Generator[tuple[MicroBatch, Tensor | None], None, None]:
        order = Order(self._labels, seed, balanced=balanced)
        for positions in positions_of(split, start_step):
            chosen = order(positions)
            source, data = self._pairs.moments(chosen, np.zeros(len(chosen), dtype=bool)).to(dtype).unbind(1)
            yield MicroBatch(data, torch.from_numpy(self._labels[chosen]), positions.start), source


def _make(
    sampler: Sampler, spec: PairsConfig, indices: Sequence[int], classes: int | None, device: torch.device
) -> tuple[NDArray[np.float32], list[int]]:
    """(n, 1, 2, *shape): source and sample as the network sees them, with labels, -1 for none; in batches of always one
    size."""
    made, labels = [], random_labels(spec.seed, indices, classes) if classes is not None else [-1] * len(indices)
    size = spec.batch_size
    for first in range(0, len(indices), size):
        part = list(indices[first : first + size])
        padded = [*part, *[part[-1]] * (size - len(part))]
        own = [*labels[first : first + len(part)], *[0] * (size - len(part))]
        x = sampler.start(spec.seed, padded).to(device, sampler.dtype)
        condition = torch.tensor(own, device=device) if classes is not None else None
        end = sampler.move(x, condition, seed=spec.seed, indices=padded)
        made.append(torch.stack([x, end], dim=1)[: len(part)].float().cpu().numpy())
        within(len(part))
    return np.concatenate(made)[:, None], labels
