"""report.html: a run on one page that needs no network, made of what lies in its directory.

python -m src.report.report runs/NAME
"""

import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import CommandLine, UserError, quoted, run_script
from ..config.packages import MissingPackage
from ..runtime.failures import warn_on_failure
from ..storage.files import write_whole
from .charts import draw_charts, short
from .run_files import KINDS, Progress, finite_or_none, read_document, read_lines, read_log
from .samples import load_other_images, load_samples

if TYPE_CHECKING:
    import jinja2

NAME = "report.html"
NAMES = 50  # of files that were left out
EVERY_SECONDS = 60.0
COST = 100  # writing takes at most a hundredth of the time


@cache
def load_template() -> "jinja2.Template":
    """page.html, compiled once: that takes longer than filling it in."""
    import jinja2

    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return jinja2.Template(text, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def make_report(run_dir: Path) -> bytes:
    """The page of a run, as HTML. What is missing or damaged there is missing on the page."""
    config, facts, status = (read_document(run_dir / f"{name}.json", dict) or {} for name in ("config", "data", "status"))
    skipped = read_document(run_dir / "skipped.json", list)
    entries = [entry for entry in skipped or () if isinstance(entry, dict)]
    reasons = Counter(str(entry.get("reason")) for entry in entries).most_common()
    warnings, log = read_log(run_dir / "log.txt")
    lines = read_lines(run_dir / "metrics.jsonl")
    progress = Progress(lines, facts.get("images"))
    try:
        charts = draw_charts(lines, progress.images_at)
    except MissingPackage as error:
        charts = str(error)
    samples, images = load_samples(run_dir / "samples"), list(load_other_images(run_dir))
    state, step, steps = str(status.get("state", "starting")), *(finite_or_none(status.get(key)) for key in ("step", "steps"))
    path = run_dir.resolve()
    page = load_template().render(
        name=str(config.get("name", path.name)),
        kind=next((kind for kind in KINDS if kind.key in config), None),
        folder=(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix(),  # as a person types it
        state=state,
        written=finite_or_none(status.get("time")),
        step=step,
        steps=steps,
        facts=facts,
        progress=progress,
        seconds_left=progress.seconds_left(step, steps) if state == "running" else None,
        samples=samples,
        charts=charts,
        images=[image for image in images if image is not None],
        unreadable=samples.unreadable + images.count(None),
        counts=[f"{name}: {count}" for name, count in (facts.get("counts") or {}).items()],
        skipped=None if skipped is None else [f"{entry.get('name')}: {entry.get('reason')}" for entry in entries],
        reasons=[f"{count:,}: {reason}" for reason, count in reasons],
        most_names=NAMES,
        warnings=warnings,
        log=log,
        config=json.dumps(config, indent=1, ensure_ascii=False) if config else "",
        now=time.time(),
        versions=f"Python {platform.python_version()}, torch {version('torch')}, accelerate {version('accelerate')}",
        **{function.__name__: function for function in (short, duration, quoted, datetime.fromtimestamp)},
    )
    return page.encode("utf-8", errors="replace")


def duration(seconds: float) -> str:
    """Seconds in the unit that people use for so many."""
    for least, unit_seconds, unit in ((172800, 86400, "days"), (5400, 3600, "h"), (90, 60, "min")):
        if seconds > least:
            return f"{seconds / unit_seconds:.1f} {unit}"
    return f"{seconds:.0f} s"


def write_report(run_dir: Path) -> None:
    """report.html of a run, whole or not at all."""
    write_whole(run_dir / NAME, make_report(run_dir))


class Reporter:
    """Writes the report of a run while it trains. Where that fails it says so once, and the run goes on."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run_dir, self._say = run_dir, say
        self._next, self._failed = 0.0, False

    def write(self, *, now: bool) -> None:
        """At once, or, not `now`, when the last one is a minute old, and later where writing takes long."""
        began = time.monotonic()
        if not now and began < self._next:
            return
        with warn_on_failure(NAME, self._warn):
            write_report(self._run_dir)
        ended = time.monotonic()
        self._next = ended + max(EVERY_SECONDS, COST * (ended - began))

    def _warn(self, what: str, reason: str) -> None:
        if not self._failed:
            self._say(f"warning: {what} is not written ({reason}); training goes on")
        self._failed = True


def main() -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    run_dir = parser.parse_args().run
    if not (run_dir / "config.json").is_file() or not (run_dir / "log.txt").is_file():
        raise UserError(f"{run_dir} is no run: there is no config.json and log.txt in it; give a folder such as runs/NAME")
    staged = run_dir / f".{NAME}.by_hand.part"  # a live run may be writing its own meanwhile
    write_whole(staged, make_report(run_dir))
    staged.replace(run_dir / NAME)
    print(run_dir / NAME)


if __name__ == "__main__":
    run_script(main)
