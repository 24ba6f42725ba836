"""cluster/slurm.sh, with stand-ins for Slurm: a task for each process, a warning, the queue again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.config import read_json
from tests import kills
from tests.conftest import ROOT, environment, launch
from tests.test_setup import checkout, write_images

# `srun` starts a process for each task, passes SIGUSR1 on, and ends with the worst of their statuses.
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
tasks, log = int(os.environ["SLURM_NTASKS"]), None
while words[0].startswith("--"):
    key, _, value = words.pop(0).partition("=")
    tasks, log = (int(value), log) if key == "--ntasks" else (tasks, value) if key == "--output" else (tasks, log)
started = []
signal.signal(signal.SIGUSR1, lambda *_: [process.send_signal(signal.SIGUSR1) for process in started])
for i in range(tasks):
    file = open(log.replace("%t", str(i)), "a") if log else None
    own = dict(os.environ, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
    started.append(subprocess.Popen(words, env=own, stdout=file, stderr=file))
sys.exit(max(abs(process.wait()) for process in started))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> {asked}
[ "$1" = show ] && echo 127.0.0.1
true
"""


# A rank that stops at a warning, or dies at once.
RANK = """#!/bin/sh
[ "$1" = dies.py ] && exit 1
trap 'echo stopped at step 3; exit 1' USR1
echo ready
for i in $(seq 400); do sleep 0.05; done
"""


def cluster(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A checkout with cluster/, and an environment in which its commands are stand-ins and a job has two tasks on a node."""
    folder, bins = checkout(tmp_path / "clone"), tmp_path / "bin"
    (folder / "cluster").mkdir()
    shutil.copy(ROOT / "cluster" / "slurm.sh", folder / "cluster" / "slurm.sh")
    bins.mkdir()
    stand_ins = {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL.format(asked=tmp_path / "asked")}
    for name, text in stand_ins.items():
        (bins / name).write_text(text)
        (bins / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NAME": "atelier", "NTASKS": "2", "JOB_NUM_NODES": "1", "JOB_NODELIST": "node"}
    slurm |= {"SUBMIT_DIR": str(folder), "TMPDIR": str(tmp_path / "local")}
    (tmp_path / "local").mkdir()
    extra = {f"SLURM_{key}": value for key, value in slurm.items()} | {"ATELIER_BUCKET": "", "USER": "somebody"}
    return folder, extra | {"PATH": f"{bins}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"}


def submit(folder: Path, extra: dict[str, str], *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", "cluster/slurm.sh", *words], cwd=folder, env=environment(**extra), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_what_an_earlier_start_said_does_not_count_and_any_warning_is_passed_on(tmp_path: Path) -> None:
    folder, extra = cluster(tmp_path)
    (tmp_path / "bin" / "python").write_text(RANK)
    (tmp_path / "bin" / "python").chmod(0o755)
    (folder / ".venv" / "bin" / "activate").write_text(f'export PATH="{tmp_path / "bin"}:$PATH"\n')
    logs = [folder / "logs" / f"atelier_7_rank{rank}.txt" for rank in (0, 1)]
    batch = submit(folder, extra, "stops.py")
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
        assert batch.poll() is None, batch.communicate()
        time.sleep(0.02)
    batch.send_signal(signal.SIGUSR2)
    output, _ = batch.communicate(timeout=30)
    assert batch.returncode == 1 and "stopped at step 3" in logs[0].read_text(), output
    assert "requeue 7" in (tmp_path / "asked").read_text()
    batch = submit(folder, extra | {"GRACE": "100"}, "dies.py")
    output, _ = batch.communicate(timeout=30)  # and not a hundred seconds
    assert batch.returncode == 1, output


@pytest.mark.soak
def test_a_job_that_is_warned_saves_and_is_queued_again(tmp_path: Path) -> None:
    folder, extra = cluster(tmp_path)
    extra["STAGE"] = "packed"
    packed = launch("prepare_data.py", "pack", write_images(tmp_path / "mine"), "--size", "16", "--out", folder / "packed")
    assert packed.status == 0, packed.all

    job = kills.Job(
        "ddpm_accelerate.py",
        "configs/smoke/ddpm.json",
        kills.settings(
            data={"source": "packed", "path": "packed"},
            held_out=0,
            steps=40,
            log__every=1,
            checkpoint__every=20,
            preview__every=20,
            log__trackers=[],
            stop_signal="USR2",
        ),
    )
    status, batch = folder / "runs" / "x" / "status.json", submit(folder, extra, *job.arguments(Path("runs/x")))
    while not (status.exists() and read_json(status)["step"] >= 4):
        assert batch.poll() is None, batch.communicate()
        time.sleep(0.02)
    batch.send_signal(signal.SIGUSR1)
    output, _ = batch.communicate(timeout=120)
    logs = [folder / "logs" / f"atelier_7_rank{rank}.txt" for rank in (0, 1)]
    assert batch.returncode == 1, output + logs[0].read_text()
    assert read_json(status)["state"] == "stopped" and "requeue 7" in (tmp_path / "asked").read_text()
    assert "a step is 16 images = 2 x cpu" in logs[0].read_text() and "stopped at step" in logs[0].read_text()
    assert "stopping after this step" in logs[1].read_text() and "a step is" not in logs[1].read_text()
    staged = list((tmp_path / "local").iterdir())
    assert len(staged) == 1 and staged[0].name.endswith("_packed") and (staged[0] / "pixels.bin").exists()
    (staged[0] / "manifest.json").unlink()  # as of a copy that was interrupted

    (tmp_path / "asked").unlink()
    batch = submit(folder, extra, *job.arguments(Path("runs/x")))
    output, _ = batch.communicate(timeout=240)
    assert batch.returncode == 0 and "requeue" not in (tmp_path / "asked").read_text(), output + logs[0].read_text()
    assert "going on at step" in logs[0].read_text() and read_json(status)["state"] == "finished"
    done = launch(*job.arguments(folder / "runs" / "never"), cwd=folder)
    assert done.status == 0, done.all
    kills.same_end(folder / "runs" / "never", folder / "runs" / "x")
