"""setup.sh: the environment, the bucket's folders, and a run that goes on where another machine left it."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from src.runtime.checkpoint import newest
from tests import kills
from tests.conftest import ROOT, environment, metrics
from tests.storage_server import StorageServer

SHELLS = [
    pytest.param(shell, marks=pytest.mark.skipif(shutil.which(shell) is None, reason=f"there is no {shell} here"))
    for shell in ("bash", "zsh")
]


@pytest.fixture
def server() -> Iterator[StorageServer]:
    with StorageServer() as server:
        yield server


def checkout(folder: Path) -> Path:
    """A clone as `make env` leaves it: its environment is this one's."""
    folder.mkdir()
    for path in (ROOT / "src", ROOT / "configs", *ROOT.glob("*.py")):
        (folder / path.name).symlink_to(path)
    (folder / ".ci").mkdir()
    for name in ("setup.sh", "Makefile", "pyproject.toml", "environment.yaml", ".ci/torch_cpu_build.py"):
        shutil.copy2(ROOT / name, folder / name)
        os.utime(folder / name, (0, 0))
    venv = folder / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "bin" / "activate").write_text(f'export VIRTUAL_ENV="{venv}" PATH="{Path(sys.executable).parent}:$PATH"\n')
    (venv / "core").touch()
    return folder


def sh(shell: str, text: str, folder: Path, server: StorageServer | None = None, **extra: str) -> subprocess.CompletedProcess:
    """`text` in a shell that reads no start files."""
    quiet = {"bash": ["--noprofile", "--norc"], "zsh": ["-f"]}[shell]
    settings = {"ATELIER_BUCKET": "gs://bucket"} | ({"STORAGE_EMULATOR_HOST": server.url} if server is not None else {})
    return subprocess.run(
        [shell, *quiet, "-c", text],
        cwd=folder,
        env=environment(**settings | extra),
        capture_output=True,
        text=True,
        timeout=240,
    )


def write_images(folder: Path) -> Path:
    """40 of them in two classes, each of one colour."""
    rng = random.Random(0)
    for i in range(40):
        path = folder / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), tuple(rng.randrange(256) for _ in range(3))).save(path)
    return folder


@pytest.mark.parametrize("shell", SHELLS)
def test_sourced_it_leaves_the_shell_as_it_was_but_for_the_environment(
    shell: str, server: StorageServer, tmp_path: Path
) -> None:
    """With a bucket that there is not, from another folder, where unset variables are errors, twice, and with arguments that
    are the caller's."""
    folder = checkout(tmp_path / "clone")
    text = 'set -u; set -- push runs/x; before="$-"; cd /; source {0}/setup.sh; source {0}/setup.sh; '
    text += (
        'echo "status $?"; [ "$before" = "$-" ] && echo same options; echo "$# $1 $PWD $VIRTUAL_ENV"; set | grep "^_atelier"; '
    )
    text += "command -v _atelier_setup || echo nothing left"
    done = sh(shell, text.format(folder), tmp_path, server, ATELIER_BUCKET="gs://wrong")
    assert "status 0\nsame options\n2 push / " in done.stdout and f"{folder}/.venv\nnothing left\n" in done.stdout, done
    assert done.stderr.count("gs://wrong: there is no such bucket; is the name right?") == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("the environment is active") == 2


def test_it_brings_data_sets_and_checkpoints_and_takes_runs_there_and_back(server: StorageServer, tmp_path: Path) -> None:
    folder = checkout(tmp_path / "clone")
    with zipfile.ZipFile(tmp_path / "cats.zip", "w") as file:
        file.writestr("cats/a.png", b"an image")
    server.put("datasets/cats.zip", (tmp_path / "cats.zip").read_bytes())
    server.put("checkpoints/old/MANIFEST.json", b"{}")
    done = sh("bash", "./setup.sh --dry-run", folder, server)
    assert done.returncode == 0 and "would pull 1 files" in done.stdout and not (folder / "datasets").exists(), done
    done = sh("bash", "source ./setup.sh; echo alive", folder, server)
    assert done.stdout.endswith("alive\n") and (folder / "datasets" / "cats" / "a.png").read_bytes() == b"an image", done
    assert (folder / "checkpoints" / "old" / "MANIFEST.json").exists()
    (folder / "runs" / "x").mkdir(parents=True)
    (folder / "runs" / "x" / "log.txt").write_text("one line")
    done = sh("bash", "./setup.sh push runs/x --dry-run", folder, server)
    assert done.returncode == 0 and "would push 1 files" in done.stdout and "runs/x/log.txt" not in server.objects()
    assert sh("bash", "./setup.sh push runs/x", folder, server).returncode == 0
    assert server.objects()["runs/x/log.txt"] == b"one line"
    shutil.rmtree(folder / "runs")
    done = sh("bash", "./setup.sh pull x && ./setup.sh status", folder, server)
    assert (folder / "runs" / "x" / "log.txt").read_text() == "one line"
    assert re.search(r"runs/x +1 +0 +0 +0", done.stdout), done
    done = sh("bash", "./setup.sh pull ../x", folder, server)
    assert (
        done.returncode == 2
        and done.stderr == "error: '../x' leaves the project folder; give a folder inside, such as runs/NAME\n"
    )


def test_executed_its_status_is_that_of_the_bringing(server: StorageServer, tmp_path: Path) -> None:
    folder = checkout(tmp_path / "clone")
    assert sh("bash", "./setup.sh", folder, server).returncode == 0
    server.put("datasets/cats.zip", b"nonsense")
    done = sh("bash", "./setup.sh", folder, server)
    assert done.returncode == 2 and "error: datasets/cats.zip: neither a zip nor a tar" in done.stderr, done
    assert "brought nothing, or not all" in done.stderr and "the environment is there" in done.stderr
    assert sh("bash", "./setup.sh", folder, server, ATELIER_BUCKET="gs://wrong").returncode == 2


def test_without_bucket_or_network_the_environment_comes_up(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "clone")
    done = sh("bash", "source ./setup.sh; echo $?; command -v python", folder, ATELIER_BUCKET="")
    assert done.stdout == f"0\n{Path(sys.executable).parent}/python\n" and "set ATELIER_BUCKET" in done.stderr, done


def test_an_environment_is_made_with_conda_where_it_is_else_with_make(tmp_path: Path) -> None:
    """With stand-ins that note what they are asked."""
    folder, bins = checkout(tmp_path / "clone"), tmp_path / "bin"
    bins.mkdir()
    conda = f'#!/bin/sh\necho "conda $@" >> {tmp_path}/asked\n[ "$1" = shell.posix ] && '
    conda += """echo 'conda() { if [ "$1" = activate ]; then echo active $2; else command conda "$@"; fi; }'\n"""
    conda += f'if [ "$1" = env ]; then [ "$2" = update ] || [ ! -f {tmp_path}/broken ]; exit; fi\n'
    (bins / "conda").write_text(conda)
    (bins / "conda").chmod(0o755)
    path = {"PATH": f"{bins}:/usr/bin:/bin", "ATELIER_BUCKET": ""}
    done = sh("bash", "source ./setup.sh; source ./setup.sh", folder, **path)
    assert done.stdout == "active ddpm\nactive ddpm\n" and done.stderr.count("minutes, once") == 1, done
    assert (tmp_path / "asked").read_text().count("env create -q -f environment.yaml") == 1
    (tmp_path / "broken").touch()
    (folder / ".conda-made").unlink()  # as where it was left half-made
    done = sh("bash", "source ./setup.sh", folder, **path)
    assert done.stdout == "active ddpm\n" and "env update -q -n ddpm" in (tmp_path / "asked").read_text(), done

    (bins / "conda").unlink()
    (folder / ".venv" / "core").unlink()
    (bins / "make").write_text(f'#!/bin/sh\necho "make $@" >> {tmp_path}/asked\n[ "$1" != --question ]\n')
    (bins / "make").chmod(0o755)
    assert sh("bash", "source ./setup.sh; echo $?", folder, **path).stdout == "0\n"
    assert (tmp_path / "asked").read_text().endswith("make --question env\nmake env\n")
    done = sh("bash", "source ./setup.sh; echo alive $?", folder, **path, PYTHON="/bin/false")
    assert done.stdout == "alive 2\n" and "neither conda nor make and a python3 with venv is here: install one" in done.stderr
    assert sh("bash", "./setup.sh", folder, **path, PYTHON="/bin/false").returncode == 2
    done = sh("bash", "set -e; source ./setup.sh; echo alive", folder, **path, PYTHON="/bin/false")
    assert done.stdout == "alive\n" and "the environment was not made" in done.stderr, done


def test_an_environment_that_cannot_be_brought_up_to_date_is_active_all_the_same(tmp_path: Path) -> None:
    """As without a network, where pyproject.toml is newer; and of conda where it was made by hand."""
    folder, bins = checkout(tmp_path / "clone"), tmp_path / "bin"
    bins.mkdir()
    (bins / "make").write_text("#!/bin/sh\nexit 1\n")
    (bins / "make").chmod(0o755)
    path = {"PATH": f"{bins}:/usr/bin:/bin", "ATELIER_BUCKET": ""}
    done = sh("bash", "source ./setup.sh; echo $? $VIRTUAL_ENV", folder, **path)
    assert done.stdout == f"0 {folder}/.venv\n" and "was not brought up to date: as it is" in done.stderr, done
    (folder / ".venv" / "core").unlink()  # half-made
    done = sh("bash", "source ./setup.sh; echo $?", folder, **path)
    assert done.stdout == "1\n" and "the environment was not made" in done.stderr, done

    hook = """conda() { if [ "$1" = activate ]; then echo active $2; else command conda "$@"; fi; }"""
    (bins / "conda").write_text(f"#!/bin/sh\n[ \"$1\" = shell.posix ] && echo '{hook}'\n")
    (bins / "conda").chmod(0o755)
    done = sh("bash", "source ./setup.sh; echo $?", folder, **path)
    assert done.stdout == "active ddpm\n0\n" and "was not brought up to date: as it is" in done.stderr, done
    assert not (folder / ".conda-made").exists(), "so it is tried again"
    (bins / "conda").write_text(f"#!/bin/sh\n[ \"$1\" = shell.posix ] && echo '{hook.replace('echo active $2', 'return 1')}'\n")
    done = sh("bash", "source ./setup.sh; echo $?", folder, **path)
    assert done.stdout == "1\n" and "the environment was not made" in done.stderr, done


@pytest.mark.parametrize("demo", ["demo", "demo-pixels"])
def test_a_demo_can_be_made_again(tmp_path: Path, demo: str) -> None:
    """Its images of last time, of another run, are not in the way."""
    folder = checkout(tmp_path / "clone")
    done = subprocess.run(["make", "-n", demo, "PYTHON=false"], cwd=folder, capture_output=True, text=True, check=True)
    out = re.search(r"--out (samples/\w+)", done.stdout)
    assert out is not None and done.stdout.index(f"rm -rf {out[1]}\n") < done.stdout.index("sample.py"), done


@pytest.mark.soak
def test_a_run_goes_on_on_another_machine_to_the_same_end(server: StorageServer, tmp_path: Path) -> None:
    """An empty folder, its images from the bucket, a run killed half-way, the folder gone; elsewhere the same command."""
    shutil.make_archive(str(tmp_path / "mine"), "zip", write_images(tmp_path / "mine"))
    server.put("datasets/mine.zip", (tmp_path / "mine.zip").read_bytes())
    sets = kills.settings(
        data={"source": "folder", "path": "datasets/mine"}, held_out=0.1, steps=60, checkpoint__every=6, log__every=1,
        log__trackers=[], preview__every=30, checkpoint__keep=2, name="mine",
    )  # fmt: skip
    words = ["ddpm_accelerate.py", "-cfg", "configs/smoke/ddpm.json", *sets]
    command = " ".join(f"'{word}'" for word in ["python", *words, "--set", "bucket=gs://bucket"])

    one = checkout(tmp_path / "one")
    process = subprocess.Popen(
        ["bash", "-c", f"source ./setup.sh && exec {command}"], cwd=one, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=environment(ATELIER_BUCKET="gs://bucket", STORAGE_EMULATOR_HOST=server.url),
    )  # fmt: skip
    try:
        began = time.monotonic()
        while not any("step_00000012/MANIFEST.json" in name for _, name in server.requests):
            assert process.poll() is None and time.monotonic() - began < 120
            time.sleep(0.02)
    finally:
        kills.kill_all(process)
        assert process.stderr is not None
        process.stderr.close()
    server.wait_until_idle()
    checkpoint, _ = newest(one / "runs" / "mine" / "checkpoints")
    assert checkpoint is not None and checkpoint.name < "step_00000060", "it was killed before its end"
    shutil.rmtree(one)

    two = checkout(tmp_path / "two")
    done = sh("bash", f"source ./setup.sh && {command}", two, server)
    assert done.returncode == 0, done
    matched = re.search(r"brought step_(\d+) of runs/mine from gs://bucket", done.stdout)
    assert matched is not None and f"going on at step {int(matched[1])} of 60" in done.stdout and int(matched[1]) >= 12, done
    assert "all of runs/mine is in gs://bucket" in done.stdout
    subprocess.run([sys.executable, *words, "--run-dir", "runs/never"], cwd=two, env=environment(), check=True)
    kills.same_end(two / "runs" / "never", two / "runs" / "mine")
    assert [line["step"] for line in metrics(two / "runs" / "mine")] == list(range(1, 61)), "the log goes on, too"
    steps = {name.split("/")[3] for name in server.objects() if name.startswith("runs/mine/checkpoints/")}
    last = two / "runs" / "mine" / "checkpoints" / "step_00000060"
    best = json.loads((last / "progress.json").read_text())["best"]["step"]
    assert steps == {"step_00000054", last.name, f"step_{best:08d}"}, "the bucket keeps as many as the folder"
    assert steps == {path.name for path in last.parent.iterdir()}
    assert "runs/mine/final/ema.safetensors" in server.objects()
