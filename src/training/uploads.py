"""A run in a bucket: brought back before it starts, and its checkpoints put there while it goes on."""

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path

from ..config import read_json
from ..data.buckets import Bucket, Remote, manifest, open_bucket, passing, pull, push
from .checkpoint import MANIFEST, newest, spared_steps, step_folder

RETRY_SECONDS = 60.0


def _place(run_dir: Path) -> str:
    """Where in the bucket a run is: where `setup.sh push runs/NAME` puts it."""
    return f"runs/{run_dir.resolve().name}"


def _steps(objects: dict[str, Remote]) -> list[str]:
    """The names of the checkpoints that are whole in the bucket, in order: their manifests came last."""
    return sorted(name.split("/")[1] for name in objects if name.startswith("checkpoints/step_") and name.endswith(MANIFEST))


def _of_another_step(name: str, steps: set[str]) -> bool:
    parts = name.split("/")
    return parts[0] == "checkpoints" and len(parts) > 1 and parts[1] not in steps


def _spared(checkpoint: Path) -> set[str]:
    """The checkpoints that a run needs beside its last ones, by name."""
    keep_best = read_json(checkpoint / "config.json")["checkpoint"]["keep_best"]
    steps = spared_steps(read_json(checkpoint / "progress.json"), keep_best=keep_best)
    return {step_folder(Path(), step).name for step in steps}


def bring_back(url: str, run_dir: Path) -> str | None:
    """Where the bucket's newest checkpoint of the run is of a later step than any whole one here: bring it and all but the
    other checkpoints. Gives a line about it, or None.

    Every process calls it, before any waits for another: the first of a machine does it, and the others find it done.
    """
    with open_bucket(url) as bucket:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(run_dir.with_name(f".{run_dir.name}.bring.lock"), "a+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            steps = _steps(bucket.list(_place(run_dir)))
            found, _ = newest(run_dir / "checkpoints")
            if not steps or (found is not None and found.name >= steps[-1]):
                return None
            pull(bucket, _place(run_dir), run_dir, skip=lambda name: passing(name) or _of_another_step(name, {steps[-1]}))
            kept = _spared(run_dir / "checkpoints" / steps[-1]) & set(steps)
            if kept:
                pull(bucket, _place(run_dir), run_dir, skip=lambda name: passing(name) or _of_another_step(name, kept))
            return f"brought {' and '.join(sorted({steps[-1], *kept}))} of {run_dir} from {bucket.url}"


class Uploads:
    """Puts the newest checkpoint of a run into a bucket whenever there is a new one, in a thread, and after it the rest of
    the run; removes there those that `keep` newest and this folder no longer hold.

    What fails is said once and tried again; it never ends the run.
    """

    def __init__(self, url: str, run_dir: Path, keep: int) -> None:
        self._bucket, self._run_dir, self._keep = open_bucket(url), run_dir, keep
        self.say: Callable[[str], None] = print
        self._condition = threading.Condition()
        self._wanted = 0  # so many times there was something to put
        self._closing = False
        self._failed: str | None = None
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is a new checkpoint, or another newest."""
        with self._condition:
            self._wanted += 1
            self._condition.notify()

    def close(self) -> None:
        """Put what is left, as long as that takes; where it fails, say how to do it later."""
        with self._condition:
            self._closing = True
            self._wanted += 1
            self._condition.notify()
        self._thread.join()
        self._bucket.__exit__()
        if self._failed is None:
            self.say(f"all of {self._run_dir} is in {self._bucket.url}")
        else:
            self.say(f"NOT all of the run is in the bucket; later: ./setup.sh push runs/{self._run_dir.name}")

    def _work(self) -> None:
        tried, closing = 0, False
        while not closing:
            with self._condition:
                wait = RETRY_SECONDS if self._failed is not None else None
                self._condition.wait_for(lambda: self._wanted > tried, timeout=wait)  # noqa: B023
                tried, closing = self._wanted, self._closing
            try:
                self._put(self._bucket)
                if self._failed is not None:
                    self.say("uploads to the bucket work again")
                self._failed = None
            except Exception as error:  # whatever it is, training goes on
                if self._failed is None:
                    self.say(f"warning: not uploaded ({error}); it is tried again, and training goes on")
                self._failed = str(error)

    def _put(self, bucket: Bucket) -> None:
        here, place = self._run_dir / "checkpoints", _place(self._run_dir)
        found = sorted(path.parent.name for path in here.glob(f"step_*/{MANIFEST}"))
        if found:
            push(bucket, here / found[-1], f"{place}/checkpoints/{found[-1]}", shown=False)
        push(bucket, self._run_dir, place, skip=lambda name: passing(name) or name == "checkpoints", shown=False)
        self._tidy(bucket, place, found)

    def _tidy(self, bucket: Bucket, place: str, here: list[str]) -> None:
        """Remove checkpoints from the bucket that retention has removed here, and newer ones that were gone back behind."""
        objects = bucket.list(place)
        steps = _steps(objects)
        if not here:
            return
        kept = {*here, *_spared(self._run_dir / "checkpoints" / here[-1])}
        kept |= set([step for step in steps if step <= here[-1]][-self._keep :])
        for name in sorted(objects, key=lambda name: not manifest(name)):
            if _of_another_step(name, kept):
                bucket.delete(f"{place}/{name}", objects[name])
