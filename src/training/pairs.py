"""Pairs (source, its sample) that an earlier run makes ahead, to train straighter paths on: reflow."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from pydantic import Discriminator, Tag

from ..config import UserError, config, config_error, dump, kind_of, read_json
from ..config.progress import within
from ..data import GaussianSource, ImageSet, SourceEnd
from ..data.latents import FILES, open_blocks
from ..data.names import same_names
from ..data.transforms import DECODER
from ..diffusion import SOLVERS
from ..runs.latents import CONTENT, write_sample_blocks
from ..runs.opened import open_run
from ..runtime.examples import Examples
from ..runtime.processes import ranks_of
from ..runtime.stream import BatchPlan, MicroBatch, Order, positions_of
from ..sampling.config import SamplerConfig
from ..sampling.sampler import build_sampler, random_labels
from ..storage.blocks import Block
from ..storage.caches import BLOCK, blocks_of, make_cache, write_block
from ..storage.files import write_whole
from .config import LatentConfig
from .inputs import Batches, Coupling


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
        if SOLVERS[self.sampler.solver].stochastic or self.sampler.eta:
            raise config_error("sampler: noise on the way parts a source from its sample; use euler, midpoint, heun or rk4")
        if self.sampler.stop_at is not None or self.sampler.double_sampling is not None:
            raise config_error("sampler: pairs are of a source and the end of its way; leave stop_at and double_sampling out")
        return self


Pairs = Annotated[
    Annotated[str | None, Tag("plain")] | Annotated[PairsConfig, Tag("object")],
    Discriminator(kind_of),
]


@config
class BlendConfig(LatentConfig):
    """The keys of a run that blends a `source` with its data, or trains on the `pairs` of an earlier run."""

    source: SourceEnd = GaussianSource(source="gaussian")
    pairs: Pairs = None


LATENTS = {"autoencoder": "autoencoder", "mean": "mean", "std": "scale"}


def _at(facts: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        facts = (facts or {}).get(key)
    return facts


class PairMaker:
    """Makes pairs for a coupling by the run that a config names, once it is seen to be a run of the same data and source.

    `contract` says what the pairs are of, `count` how many there are, and `folder` where they are kept: in that run's folder,
    else in `run_dir`.
    """

    def __init__(
        self, spec: str | PairsConfig, coupling: Coupling, num_classes: int | None, run_dir: Path, device: torch.device
    ) -> None:
        self.spec = spec = PairsConfig(run=spec) if isinstance(spec, str) else spec
        run, data, source = open_run(spec.run, device), coupling.data, coupling.source
        if run.shape != coupling.shape:
            sizes = [" x ".join(map(str, shape)) for shape in (run.shape, coupling.shape)]
            raise UserError(f"pairs.run {spec.run} makes {sizes[0]}, and this run sees {sizes[1]}; name a run of the same data")
        same = same_names(run.class_names, data.train.class_names)
        if num_classes is not None and (run.num_classes is None or not same):
            raise UserError(f"pairs.run {spec.run} has other classes; name another run, or set class_conditional to false")
        if run.gaussian != (source is None):
            raise UserError(f"pairs.run {spec.run} starts from another source; give both runs the same")
        shared = {"other data": ("fingerprint",), "another source": ("source", "fingerprint")}
        shared |= {f"latents of another {word}": ("latents", key) for key, word in LATENTS.items()}
        facts = coupling.facts
        for what, keys in shared.items():
            # an imported run does not say what it was trained on
            if "fingerprint" in run.facts and _at(facts, keys) != _at(run.facts, keys):
                raise UserError(f"pairs.run {spec.run} was trained on {what}; give both runs the same")
        self.count = spec.count if source is None else min(spec.count, len(source.train))
        if num_classes is None:
            run.no_class()
        self.contract = {"weights": run.digest, "shape": list(coupling.shape)}
        self.contract |= {key: value for key, value in dump(spec).items() if key != "run"}
        self.name = hashlib.sha256(json.dumps(self.contract).encode()).hexdigest()[:8]
        self.folder = (Path(spec.run) if (Path(spec.run) / "checkpoints").is_dir() else run_dir) / "pairs" / self.name
        start = source.source_sampler(of_train=True) if source is not None else None
        self._sampler, self._device = build_sampler(run, spec.sampler, source=start), device
        self._num_classes = len(run.class_names) if num_classes is not None else None
        self.source_images = source.train if source is not None and isinstance(source.train, ImageSet) else None

    def make(self, indices: Sequence[int]) -> tuple[NDArray[np.float32], list[int]]:
        """(n, 1, 2, *shape): source and sample as the network sees them, with labels, -1 for none; in batches of always one
        size."""
        spec, sampler, classes = self.spec, self._sampler, self._num_classes
        labels = random_labels(spec.seed, indices, classes) if classes is not None else [-1] * len(indices)
        pairs, size = list[NDArray[np.float32]](), spec.batch_size
        for first in range(0, len(indices), size):
            part = list(indices[first : first + size])
            padded = [*part, *[part[-1]] * (size - len(part))]
            padded_labels = [*labels[first : first + len(part)], *[0] * (size - len(part))]
            x = sampler.start(spec.seed, padded).to(self._device, sampler.dtype)
            condition = torch.tensor(padded_labels, device=self._device) if classes is not None else None
            end = sampler.move(x, condition, seed=spec.seed, indices=padded)
            pairs.append(torch.stack([x, end], dim=1)[: len(part)].float().cpu().numpy())
            within(len(part))
        return np.concatenate(pairs)[:, None], labels

    def files(self) -> dict[str, Any]:
        """What the folder remembers of the files that the source's images come from."""
        images = self.source_images
        if images is None:
            return {}
        return {FILES: {"decoder": DECODER, "state": images.state, CONTENT: images.contents(range(len(images)))}}


class PairCoupling(Coupling):
    """A coupling whose pairs an earlier run has made: its sources, each with the sample at the end of its path."""

    def __init__(
        self, spec: str | PairsConfig, coupling: Coupling, num_classes: int | None, run_dir: Path, accelerator: Accelerator
    ) -> None:
        super().__init__(coupling.data, coupling.source)
        maker = PairMaker(spec, coupling, num_classes, run_dir, accelerator.device)
        folder, self._contract = maker.folder, maker.contract

        def write(_: str, block: Block) -> None:
            values, labels = maker.make(block.items)
            write_block(block, values, {"labels": labels})

        if not folder.exists():
            words, ranks = {"name": "folder of pairs", "doing": "making pairs"}, ranks_of(accelerator)
            make_cache(folder, self._contract, {"pairs": maker.count}, write, lambda _: {}, ranks, **words, notes=maker.files())
        manifest = read_json(folder / "manifest.json")
        if any(manifest.get(key) != value for key, value in self._contract.items()):
            raise UserError(f"the folder of pairs {folder} is of something else; remove it, and it is made again")
        if maker.source_images is not None and accelerator.is_main_process and (known := manifest.get(FILES)):
            files = maker.source_images
            if known["state"] != files.state and known[CONTENT] != files.contents(range(len(files))):
                raise UserError(
                    f"the folder of pairs {folder} was made from other source images (files of the same names and sizes have "
                    "another content now); remove it, and it is made again"
                )
        accelerator.wait_for_everyone()
        self._pairs = open_blocks(folder, "pairs", maker.count, accelerator.device, "folder of pairs")
        self._pairs.load_to_device()
        facts = [read_json(block.path) for block in blocks_of(folder, "pairs", maker.count)]
        self._labels = np.array([label for block in facts for label in block["labels"]], dtype=np.int64)

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"images": self.num_images, "pairs": self._contract}

    @property
    def num_images(self) -> int:
        return len(self._labels)

    def held_out_examples(self) -> Examples | None:
        """Nothing: what is held out is not paired."""
        return None

    def stream(
        self, batch_plan: BatchPlan, *, seed: int, balanced: bool, start_step: int, dtype: torch.dtype, **_: Any
    ) -> Batches:
        order = Order(self._labels, seed, balanced=balanced)
        for positions in positions_of(batch_plan, start_step):
            indices = order(positions)
            source, data = self._pairs.moments(indices, np.zeros(len(indices), dtype=bool)).to(dtype).unbind(1)
            yield MicroBatch(data, torch.from_numpy(self._labels[indices]), positions.start), source


def write_sample_pairs(maker: PairMaker, folder: Path) -> float:
    """Make a folder of pairs for a rehearsal: a few of them stand for all. Gives the seconds that one process would need for
    the rest."""
    began = time.monotonic()
    values, labels = maker.make(range(min(maker.count, 64)))
    seconds = time.monotonic() - began
    write_sample_blocks(folder, "pairs", maker.count, values, {"labels": labels})
    manifest = {**maker.contract, **maker.files(), "counts": {"pairs": maker.count}}
    write_whole(folder / "manifest.json", json.dumps(manifest).encode())
    return seconds * (maker.count / len(labels) - 1)
