"""How an evaluation is set up, and what comes of it: numbers, a table for the screen, files, and sheets to look at."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..data import ImageConfig, ImageSet
from ..metrics import distances
from ..metrics.distances import Array
from ..metrics.features import Features
from ..runtime.failures import warn_on_failure
from ..sampling.batches import in_batches
from ..sampling.sampler import Sampler
from ..storage.blocks import Ranks, claim_folder, in_blocks
from ..storage.files import write_whole
from .features import BLOCK, extract_all, on_screen, pixels_of, real_features
from .registry import METRICS, Comparison, FeatureSets

# The images that samples are compared with, as evaluation.json names them: it keeps the word that older files have.
TRAINING, HELD_OUT, GIVEN = "training pictures", "held-out pictures", "given pictures"
PixelsOf = Callable[[Sequence[int]], Tensor]  # indices -> (B, C, H, W) uint8
SHOWN = 12  # samples on the sheet of nearest training images


@dataclass(frozen=True)
class Setup:
    """In which features an evaluation measures, on which ranks, and where the results go (default evaluations/NAME/...)."""

    networks: Sequence[Features]
    out: Path | None
    ranks: Ranks
    device: torch.device
    batch_size: int
    seed: int

    @property
    def computes(self) -> bool:
        """Whether this rank computes the metrics, once all ranks have extracted the features."""
        return self.ranks.rank == 0

    def claim(self, name: str, kind: str, request: dict[str, Any]) -> Path:
        """The folder for results that depend on `request`; a UserError where it holds other results."""
        request = {**request, "features": [[network.name, network.digest] for network in self.networks]}
        tag = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:8]
        out = self.out or Path("evaluations") / name / f"{kind}_{tag}"
        claim_folder(out / "request.json", json.loads(json.dumps(request)), self.ranks, holds="figures", newer_keys=("files",))
        return out

    def real_features(self, data: ImageSet, image: ImageConfig) -> dict[str, Array]:
        """{name of a network: (N, dim)} of all real images; (0, dim) on ranks that compute nothing."""
        return {network.name: real_features(network, data, image, read=self.computes) for network in self.networks}

    def sample_pixels(self, sampler: Sampler, labels: Sequence[int] | None) -> PixelsOf:
        """A function that draws samples by their indices, of these classes."""

        def pixels(indices: Sequence[int]) -> Tensor:
            classes = [labels[i] for i in indices] if labels is not None else None
            return pixels_of(sampler.draw(self.seed, indices, classes, device=self.device, batch_size=self.batch_size))

        return pixels

    def extract(self, out: Path, count: int, pixels: PixelsOf, doing: str, *, block: int = BLOCK) -> dict[str, Array]:
        """{name of a network: (count, dim)} of the `pixels`, in files of `block` images in `out`; on every rank."""

        def make(part: range) -> dict[str, Array]:
            return extract_all(self.networks, map(pixels, in_batches(part, self.batch_size)))

        return in_blocks(out, count, block, make, self.ranks, doing=doing)

    def sample_features(self, sampler: Sampler, labels: Sequence[int] | None, count: int, out: Path) -> dict[str, Array]:
        """The features of samples that are drawn on the way."""
        block = self.batch_size * max(1, min(BLOCK, count // 16) // self.batch_size)  # work for 16 ranks, even on fewer
        return self.extract(out, count, self.sample_pixels(sampler, labels), "sampling", block=block)


@dataclass
class Results:
    """`values` for metrics.jsonl, `document` for other programs, `lines` for the screen, `files` to look at."""

    out: Path
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def add_table(self, title: str, comparisons: Sequence[Comparison]) -> None:
        """A row for each metric and a column for each network; what the numbers compare with, and notes on them.

        The number of samples (or of held-out images) is a part of a value's name: numbers of other counts do not compare.
        """
        names = [comparison.sets.network.name for comparison in comparisons]
        width = max(14, *(len(name) + 2 for name in names))
        self.lines += [title, f"  {'':<29}" + "".join(f"{name:>{width}}" for name in names)]
        for key, metric in METRICS.items():
            if metric.label and any(key in comparison.values for comparison in comparisons):
                cells = [metric.format.format(each.values[key]) if key in each.values else "" for each in comparisons]
                self.lines.append(f"  {metric.label:<29}" + "".join(f"{cell:>{width}}" for cell in cells))
        for sets, values, notes in comparisons:
            network = sets.network
            self.lines.append(f"  {network.name} compares with {network.comparable}")
            self.lines += [f"  note: {on_screen(note)}" for note in notes]
            for key, value in values.items():
                count = len(sets.comparable if METRICS[key].counted == "held_out" else sets.samples)
                self.values[f"{key}_{network.name}_of_{count}"] = value
            self.document[network.name] = {**values, "compares_with": network.comparable, "notes": notes}

    def write(self) -> None:
        """Write evaluation.json."""
        write_whole(self.out / "evaluation.json", (json.dumps({"step": self.step, **self.document}, indent=1) + "\n").encode())

    def add_sheet(self, name: str, draw: Callable[[Path], None]) -> None:
        """Call `draw` with a path in the folder. Where it fails, a warning says so."""
        with warn_on_failure(name):
            draw(self.out / name)
            self.files.append(self.out / name)

    def add_nearest(
        self,
        sets: FeatureSets,
        pixels: PixelsOf,
        load: Callable[[Sequence[int]], figures.Pixels],
        reference: str,
        batch_size: int,
    ) -> None:
        """nearest.png: the samples nearest to a real image (`reference` says which those are), and as many of the others, each
        followed by the three real images nearest to it. `pixels` gives samples, `load` real images as (N, H, W, C) uint8."""

        def draw(path: Path) -> None:
            order = np.argsort(sets.nearest, kind="stable")
            usual = order[len(order) // 2 :][:SHOWN] if len(order) >= 2 * SHOWN else order[:0]
            chosen = [*order[:SHOWN].tolist(), *usual.tolist()]
            _, neighbours = distances.nearest(sets.samples[chosen], sets.real, most=3)
            samples = torch.cat([pixels(part) for part in in_batches(chosen, batch_size)]).permute(0, 2, 3, 1).numpy()
            real = load(neighbours.flatten().tolist()).reshape(len(chosen), -1, *samples.shape[1:])
            rows = np.concatenate([samples[:, None], real], axis=1).reshape(-1, *samples.shape[1:])
            names = [f"usual #{i}" if i in usual else f"#{i}" for i in chosen]
            labels = [
                word for i, name in zip(chosen, names, strict=True) for word in (name, f"at {sets.nearest[i]:.3g}", "", "")
            ]
            first = f"the {min(SHOWN, len(order))} samples nearest to the {reference}"
            title = f"{first}, then usual ones; beside each, its nearest three"
            figures.save(figures.grid(rows, columns=8, labels=labels, title=title), path)

        self.add_sheet("nearest.png", draw)
