"""The runs that the page knows: those below `runs/` and `models/`, and those that its owner named. No other path is opened."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config import UserError
from ..data.names import printable
from ..report.run_files import read_document

ROOTS = ("runs", "models")
NEWEST = "newest"  # the final weights, or those of the newest checkpoint
WIDTH = re.compile(r"\d*\.?\d+")  # of a post-hoc average of the run itself


class Facts(NamedTuple):
    """What the JSON of a run says of it, without its weights: its config, empty where that cannot be read; the names of its
    classes, none where it draws without; and what kind of run it is."""

    config: dict[str, Any]
    class_names: tuple[str, ...]
    kind: str

    @property
    def draws_images(self) -> bool:
        return self.kind in ("images", "export", "hub")

    @property
    def condition(self) -> str | None:
        """The kind of the images that it draws from, if it does."""
        condition = self.config.get("condition")
        return "low" if self.config.get("low_resolution") is not None else condition["kind"] if condition else None


def kind_of_run(config: Mapping[str, Any]) -> str:
    """images, points, autoencoder, classifier, or other of what is none of them."""
    if "stages" in config:
        return "autoencoder"
    if "classifier" in config:
        return "classifier"
    if not {"model", "process", "image"} <= set(config):
        return "other"
    return "points" if config["image"] is None else "images"


def read_facts(path: Path) -> Facts:
    """Those of a run, a checkpoint, a final folder, read anew where its files changed; of an export only that it is one."""
    files = [folder / f"{name}.json" for folder in (path, path / "final") for name in ("config", "data")]
    return _read_facts(path, tuple(file_stamp(file) for file in (path, *files, path / "checkpoints")))


def file_stamp(path: Path) -> tuple[int, int]:
    """When a file was written, and its size; zeros where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=2000)
def _read_facts(path: Path, stamps: tuple[Any, ...]) -> Facts:
    if not path.is_dir():
        return Facts({}, (), "export" if path.suffix == ".pt" else "hub" if "/" in str(path) else "other")
    for folder in (path, path / "final", *sorted(path.glob("checkpoints/step_*"), reverse=True)):
        config, data = (read_document(folder / f"{name}.json", dict) for name in ("config", "data"))
        if config is None:
            continue
        names = (data or {}).get("class_names") or ()
        return Facts(
            config, tuple(map(str, names)) if config.get("class_conditional") is not False else (), kind_of_run(config)
        )
    return Facts({}, (), "other")


@dataclass(frozen=True)
class Places:
    """The folders of the working directory whose entries are runs (`roots`), and the names that the owner gave (`named`), which
    may be anywhere, or on the hub."""

    roots: Sequence[str] = ROOTS
    named: Sequence[str] = ()

    def names(self) -> list[str]:
        """The names of all runs and exports, those that were changed last first; the named ones before all."""
        below: list[tuple[float, str]] = []
        for root in self.roots:
            for path in Path(root).glob("*"):
                name = f"{root}/{path.name}"
                if path.name.startswith(".") or name in self.named or not self._is_run(path):
                    continue
                stamps = [path / "metrics.jsonl", path / "final" / "MANIFEST.json", path]
                below.append((next((stamp.stat().st_mtime for stamp in stamps if stamp.exists()), 0.0), name))
        return [*self.named, *(name for _, name in sorted(below, key=lambda entry: (-entry[0], entry[1])))]

    @staticmethod
    def _is_run(path: Path) -> bool:
        """Whether it has the config of a run, or is an export."""
        if path.is_file():
            return path.suffix == ".pt"
        return any((path / name / "config.json").is_file() for name in (".", "final")) and kind_of_entry(path) != "other"

    def has(self, name: str) -> bool:
        """Whether it is among `names`."""
        root, _, entry = name.rpartition("/")
        is_below = root in self.roots and entry not in ("", "..") and entry[0] != "." and "\\" not in entry
        return name in self.named or (is_below and self._is_run(Path(name)))

    def checkpoints(self, name: str | None) -> list[str]:
        """What of a run can be drawn from: `newest`, its checkpoints and its post-hoc averages, as its folders are named."""
        if not name or not self.has(name):
            return [NEWEST]
        run = Path(name)
        steps = [path.name for path in sorted(run.glob("checkpoints/step_*"), reverse=True) if path.is_dir()]
        widths = [path.name for path in sorted(run.glob("ema/width_*")) if path.is_dir()]
        return [NEWEST, *steps, *widths]

    def place(self, name: str | None, checkpoint: str | None = NEWEST) -> str:
        """The path of a run, or of its checkpoint, as sample.py takes it. A UserError for a name that is
        none of `names`, and for a run that is gone."""
        if not name:
            raise UserError("choose a run; there is none below runs/ or models/ yet if the list is empty")
        if not self.has(name):
            is_inside = any(re.fullmatch(rf"{re.escape(root)}/[^/\\]+", name) for root in self.roots) and ".." not in name
            reason = "is gone; choose another" if is_inside else "is none of the runs on this page; choose one of the list"
            raise UserError(f"the run {printable(name)} {reason}")
        if not checkpoint or checkpoint == NEWEST:
            return name
        if checkpoint not in self.checkpoints(name):
            raise UserError(f"{printable(name)} has no {printable(checkpoint)} any more; choose another checkpoint")
        folder = "ema" if checkpoint.startswith("width_") else "checkpoints"
        return f"{name}/{folder}/{checkpoint}"

    def guide(self, word: str | None) -> str | float | None:
        """What `guide_with` names: a run of this page, or the width of an average of the run itself; None of nothing."""
        if not word:
            return None
        return word if WIDTH.fullmatch(word) else self.place(word)

    def facts(self, name: str | None) -> Facts:
        """Those of a run of this page; empty ones where it is gone."""
        return read_facts(Path(name)) if name and self.has(name) else Facts({}, (), "other")


def kind_of_entry(path: Path) -> str:
    """The kind of run that a folder below a root is."""
    return read_facts(path).kind
