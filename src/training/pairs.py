"""Pairs of a source and a sample, which an earlier run makes and a later one learns from (reflow)."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import UserError, dump, read_json
from ..config.progress import within
from ..data import ImageSet
from ..data.buckets import Buckets
from ..data.latents import FILES, open_blocks
from ..data.names import same_names
from ..data.transforms import DECODER
from ..runs.latents import CONTENT, write_sample_blocks
from ..runs.opened import open_run
from ..runtime.processes import ranks_of
from ..runtime.stream import BatchPlan, Examples, MicroBatch, StepOrder
from ..sampling.sampler import build_sampler, describe_spec, random_labels
from ..storage.blocks import Block, blocks_of, make_cache, write_block
from ..storage.files import write_whole
from .changed_config import at
from .config import PairsConfig, StepsConfig
from .inputs import Batches, Coupling

if TYPE_CHECKING:
    from accelerate import Accelerator

# What both runs were trained on, by its key in the facts of a run.
SHARED = {
    "fingerprint": "other data",
    "source.fingerprint": "another source",
    "latents.autoencoder": "latents of another autoencoder",
    "latents.mean": "latents of another mean",
    "latents.std": "latents of another scale",
}


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
        facts = coupling.facts
        for key, what in SHARED.items() if "fingerprint" in run.facts else ():  # an imported run does not say what it saw
            if at(facts, key) != at(run.facts, key):
                raise UserError(f"pairs.run {spec.run} was trained on {what}; give both runs the same")
        self.count = spec.count if source is None else min(spec.count, len(source.train))
        if num_classes is None:
            run.no_class()
        if run.config.get("condition") is not None:
            raise UserError(f"pairs.run {spec.run} draws from images; name a run that draws from noise or its source alone")
        start = source.source_sampler(of_train=True) if source is not None else None
        self._sampler, self._device = build_sampler(run, spec.sampler, source=start), device
        settings = {key: value for key, value in dump(spec).items() if key != "run"}
        settings["sampler"] = describe_spec(self._sampler)
        self.contract = {"weights": run.digest, "shape": list(coupling.shape), **settings}
        self.name = hashlib.sha256(json.dumps(self.contract).encode()).hexdigest()[:8]
        self.folder = (Path(spec.run) if (Path(spec.run) / "checkpoints").is_dir() else run_dir) / "pairs" / self.name
        self._num_classes = len(run.class_names) if num_classes is not None else None
        self.source_images = source.train if source is not None and isinstance(source.train, ImageSet) else None

    def make(self, indices: Sequence[int]) -> tuple[NDArray[np.float32], list[int]]:
        """(n, 1, 2, *shape): source and sample as the network sees them, with labels, -1 for none; in batches of always one
        size."""
        sampler, classes, seed, size = self._sampler, self._num_classes, self.spec.seed, self.spec.batch_size
        labels = random_labels(seed, indices, classes) if classes is not None else [-1] * len(indices)
        pairs = list[NDArray[np.float32]]()
        for first in range(0, len(indices), size):
            part = list(indices[first : first + size])
            rest = size - len(part)
            padded = [*part, *[part[-1]] * rest]
            x = sampler.start(seed, padded).to(self._device, sampler.dtype)
            condition = None
            if classes is not None:
                condition = torch.tensor([*labels[first : first + size], *[0] * rest], device=self._device)
            end = sampler.move(x, condition, seed=seed, indices=padded)
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
        self, spec: str | PairsConfig, coupling: Coupling, num_classes: int | None, run_dir: Path, accelerator: "Accelerator"
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
        files, known = maker.source_images, manifest.get(FILES) if accelerator.is_main_process else None
        if files and known and known["state"] != files.state and known[CONTENT] != files.contents(range(len(files))):
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

    def shape_at(self, step: int) -> tuple[int, ...]:
        """What the network sees of one of the images of a step of `stream`."""
        return self.data.shape_at(self._order, step)

    def held_out_examples(self) -> Examples | None:
        """Nothing: what is held out is not paired."""
        return None

    def stream(self, cfg: StepsConfig, batch_plan: BatchPlan, start_step: int, device: torch.device) -> Batches:
        all_alike = Buckets((), np.zeros(len(self._labels), np.int64))
        self._order = StepOrder(all_alike, self._labels, batch_plan, cfg.seed, balanced=cfg.balance_classes)
        return self._read(getattr(torch, cfg.dtype), start_step)

    def _read(self, dtype: torch.dtype, start_step: int) -> Batches:
        for step, part in self._order.parts(start_step):
            indices, position = self._order(step, part), self._order.plan.positions(step, part).start
            source, data = self._pairs.moments(indices, np.zeros(len(indices), dtype=bool)).to(dtype).unbind(1)
            yield MicroBatch(data, torch.from_numpy(self._labels[indices]), position), source


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
