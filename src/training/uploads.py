"""A run in a bucket: it is pulled before the run starts, and its checkpoints are pushed while the run goes on."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config import UserError, dump, quoted, read_json
from ..runtime.checkpoint import MANIFEST, newest, spared_steps, step_folder, verify_checkpoint
from ..storage.buckets import CACHES, Bucket, Empty, Remote, Unreached, is_manifest, is_temporary, open_bucket, pull, push
from ..storage.locks import folder_lock
from .background import Background
from .changed_config import ways_on
from .run_directory import changes


def place_of(run_dir: Path) -> str:
    """The place of a run in the bucket: its path below this folder, as `setup.sh push` takes it. A run elsewhere is put at
    runs/NAME and digits of its path, for two may have one name."""
    path = Path(os.path.abspath(run_dir))
    for parent in path.parents:
        if parent.exists() and parent.samefile("."):
            return path.relative_to(parent).as_posix()
    return f"runs/{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _steps(objects: dict[str, Remote]) -> list[str]:
    """The names of the checkpoints that are whole in the bucket, in order: those with a manifest, which comes last."""
    return sorted(name.split("/")[1] for name in objects if name.startswith("checkpoints/step_") and name.endswith(MANIFEST))


def _is_apart(name: str) -> bool:
    """Whether a file of a run moves on its own (checkpoints) or not at all (caches, temporary files)."""
    return is_temporary(name) or name.split("/")[0] in (*CACHES, "checkpoints")


def _spared(checkpoint: Path) -> set[str]:
    """The names of the checkpoints that a run needs beside its last ones."""
    return {step_folder(Path(), step).name for step in spared_steps(read_json(checkpoint / "progress.json"))}


def _refuse_another(bucket: Bucket, place: str, remote: Remote, step: str, run_dir: Path, settings: Any) -> None:
    """A UserError where the checkpoint in the bucket is of a run that was started with another config."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        bucket.get(f"{place}/checkpoints/{step}/config.json", remote, path)
        try:
            before = json.loads(path.read_text())
        except ValueError:  # damaged: the checkpoint is passed over later
            return
    if "auto" in (before.get("mixed_precision", "no"), settings.mixed_precision):  # looked at when the run is here
        before["mixed_precision"] = settings.mixed_precision
    _, other = changes(settings, before)
    if other:
        raise UserError(
            f"{bucket.url} holds another run as {place}: it was started with another {', '.join(other)}; change it back, give "
            f"another --run-dir, or, to start anew, {_how_to_start_anew(bucket, place, run_dir)}"
            f"{ways_on(run_dir, before, dump(settings), other)}"
        )


def bring_back(url: str, run_dir: Path, settings: Any = None) -> str | None:
    """Where the bucket's newest whole checkpoint of the run is of a later step than any here: pull it, those that the run needs
    beside it, and all else but caches. Gives a line about it, or None. A UserError where the run there was started with another
    config than `settings`; without `settings` any is pulled, for another run that goes on from it.

    Every process calls it, before any waits for another: the first of a machine does it, and the others find it done.
    """
    checkpoints, place = run_dir / "checkpoints", place_of(run_dir)
    with open_bucket(url) as bucket, folder_lock(run_dir):
        objects = bucket.list(place)
        steps = _steps(objects)
        if settings is not None and steps and (config := objects.get(f"checkpoints/{steps[-1]}/config.json")) is not None:
            _refuse_another(bucket, place, config, steps[-1], run_dir, settings)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            newest_here, _ = newest(checkpoints)
        else:  # the first process has verified it
            newest_here = max((path.parent for path in checkpoints.glob(f"step_*/{MANIFEST}")), default=None)
        lines, damaged, brought = list[str](), list[str](), None
        for step in reversed([step for step in steps if newest_here is None or step > newest_here.name]):
            pull(bucket, f"{place}/checkpoints/{step}", checkpoints / step)
            if (reason := verify_checkpoint(checkpoints / step)) is None:
                brought = step
                break
            damaged.append(step)
            lines.append(f"passed over {step} of {bucket.url}/{place}: {reason}")
        if brought is not None:
            spared = sorted(_spared(checkpoints / brought) & set(steps))
            for other in spared:
                pull(bucket, f"{place}/checkpoints/{other}", checkpoints / other)
            with suppress(Empty):  # where only checkpoints were pushed
                pull(bucket, place, run_dir, skip=_is_apart)
            lines.append(f"brought {' and '.join([*spared, brought])} of {run_dir} from {bucket.url}")
        elif damaged and newest_here is None:
            raise UserError(f"{'; '.join(lines)}; none is whole: to start anew, {_how_to_start_anew(bucket, place, run_dir)}")
        for step in damaged:  # without a manifest it does not count, until it is pushed anew
            with suppress(UserError):
                bucket.delete(f"{place}/checkpoints/{step}/{MANIFEST}", objects[f"checkpoints/{step}/{MANIFEST}"])
        return "; ".join(lines) or None


def _how_to_start_anew(bucket: Bucket, place: str, run_dir: Path) -> str:
    return f"rm -r {quoted(run_dir)} and gcloud storage rm -r {quoted(f'{bucket.url}/{place}')}"


def bring_run(url: str, name: str) -> str | None:
    """Pull the weights of a run, or of a folder in one, `runs/NAME...`, where they are in the bucket and not whole here: its
    final folder, else its newest checkpoint where none is here. Gives a line about it, or None. Every process may call it."""
    run = Path(name)
    if verify_checkpoint(run) is None or verify_checkpoint(run / "final") is None:
        return None
    with open_bucket(url) as bucket:
        folder = weights_in(bucket, run.as_posix())
        if folder is None or (folder.parent.name == "checkpoints" and newest(folder.parent)[0] is not None):
            return None
        with folder_lock(run):
            if verify_checkpoint(folder) is None:  # another process was first
                return None
            pull(bucket, folder.as_posix(), folder)
        return f"brought {folder} from {bucket.url}"


def starts(cfg: Any, *, fresh: bool) -> dict[str, str]:
    """The runs from which a run reads weights, by the key of the config that names them; with `fresh` init_from, too."""
    pairs = getattr(cfg, "pairs", None)
    named = {"autoencoder": getattr(cfg, "autoencoder", None), "pairs": getattr(pairs, "run", pairs)}
    named["init_from"] = cfg.init_from if fresh else None
    return {key: name for key, name in named.items() if name is not None}


def bring(cfg: Any, run_dir: Path, *, trial: bool = False, old: Path | None = None) -> None:
    """Pull what a launch needs from its bucket, if it has one: the run itself (not for a trial), the `old` run that it goes on
    from where it has not begun itself, and the runs below runs/ that it starts from. Prints lines about it."""
    if cfg.bucket is None:
        return
    lines = list[str | None]()
    try:
        if not trial:
            lines.append(bring_back(cfg.bucket, run_dir, cfg))
        has_begun = any((run_dir / "checkpoints").glob("step_*"))
        if old is not None and not has_begun:
            lines.append(bring_back(cfg.bucket, old))
    except Unreached as error:
        folder, _ = newest(run_dir / "checkpoints")
        otherwise = f"goes on from {folder}" if folder is not None else "starts anew, for no checkpoint of it is here"
        raise UserError(f"{error}; with --set bucket=null it does without the bucket, and {otherwise}") from None
    for name in starts(cfg, fresh=trial or not has_begun).values():
        if Path(name).parts[:1] == ("runs",):
            lines.append(bring_run(cfg.bucket, name))
    for line in filter(None, lines):
        print(line, flush=True)


def weights_in(bucket: Bucket, name: str) -> Path | None:
    """The whole folder in the bucket from which the weights of `name`, a run or a folder in one, would be read."""
    objects = bucket.list(name)
    if MANIFEST in objects:
        return Path(name)
    if f"final/{MANIFEST}" in objects:
        return Path(name) / "final"
    steps = _steps(objects)
    return Path(name) / "checkpoints" / steps[-1] if steps else None


class Uploads(Background):
    """A thread that pushes the newest checkpoint of a run into a bucket, with those that the run needs beside it and all else
    of the run. It deletes checkpoints there that are neither here nor among the `keep` last."""

    works = "uploads to the bucket work again"

    def __init__(self, url: str, run_dir: Path, keep: int) -> None:
        self._bucket, self._keep = open_bucket(url), keep
        self._place, self._warned_of_others = place_of(run_dir), False
        super().__init__(run_dir, self._bucket.url)

    def close(self) -> bool:
        is_whole = super().close()
        self._bucket.__exit__()
        return is_whole

    def _last_line(self, failed: str | None) -> str:
        if failed is None:
            return f"all of {self._run_dir} is in {self.where}"
        linked = "" if Path(self._place).exists() else f"ln -s {quoted(self._run_dir.absolute())} {quoted(self._place)} && "
        return f"NOT all of {self._run_dir} is in {self.where}; later: {linked}./setup.sh push {quoted(self._place)}"

    def _put(self, step: str | None, back: bool) -> None:
        """Push the rest of the run first: where the push ends in between, the log is longer than the checkpoint, and is cut."""
        bucket = self._bucket
        push(bucket, self._run_dir, self._place, skip=_is_apart, shown=False)
        if step is None:
            return
        checkpoints = self._run_dir / "checkpoints"
        if (reason := verify_checkpoint(checkpoints / step)) is not None:
            if not (checkpoints / step).exists():  # the run went back behind it meanwhile
                return
            raise UserError(f"{step}: {reason}")
        spared = [
            name for name in _spared(checkpoints / step) if name != step and verify_checkpoint(checkpoints / name) is None
        ]
        for name in [*sorted(spared), step]:
            push(bucket, checkpoints / name, f"{self._place}/checkpoints/{name}", shown=False)
        self._tidy(bucket, step, back, {step, *spared, *(path.parent.name for path in checkpoints.glob(f"step_*/{MANIFEST}"))})

    def _tidy(self, bucket: Bucket, step: str, back: bool, local: set[str]) -> None:
        """Delete from the bucket the checkpoints that the run has removed here, those behind which it went `back`, and parts of
        checkpoints that are not whole."""
        objects = bucket.list(self._place)
        steps = _steps(objects)
        staying = local | set([name for name in steps if name <= step][-self._keep :])
        newer = {name for name in steps if name > step} - local
        if newer and not back:
            staying |= newer
            if not self._warned_of_others:
                self.say(f"warning: {bucket.url} has later steps of this run: does another machine train it, too?")
            self._warned_of_others = True
        for name in sorted(objects, key=lambda name: not is_manifest(name)):
            if name.startswith("checkpoints/") and name.split("/")[1] not in staying:
                bucket.delete(f"{self._place}/{name}", objects[name])


def uploads_of(cfg: Any, run_dir: Path) -> list[Background]:
    """What brings a run of this config elsewhere, beside its training: into its bucket, and to the hub."""
    uploads: list[Background] = [] if cfg.bucket is None else [Uploads(cfg.bucket, run_dir, cfg.checkpoint.keep)]
    if cfg.hub is not None:
        from .hub import HubPushes

        uploads.append(HubPushes(cfg.hub, run_dir))
    return uploads
