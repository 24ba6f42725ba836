"""Locks on files, with and without what POSIX brings; and a run where native Windows' lack of it is imitated."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from src.storage import locks
from tests.conftest import ROOT, SMOKE, environment, metrics

HOLD = """
import sys
from src.storage.locks import take_lock
file = open(sys.argv[1], "a+")
print(take_lock(file), flush=True)
sys.stdin.read()
"""


def test_a_lock_keeps_another_process_out_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    words = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with open(path, "a+") as file:
            assert not locks.take_lock(file)
            other.kill()
            assert locks.take_lock(file, wait=True)


class Windows(types.ModuleType):
    """msvcrt's locks, as far as this process can imitate them: of bytes, by place."""

    LK_NBLCK = 2

    def __init__(self, failures: int, code: int = errno.EACCES) -> None:
        super().__init__("msvcrt")
        self.failures, self.code, self.places = failures, code, list[int]()

    def locking(self, handle: int, mode: int, count: int) -> None:
        assert (mode, count) == (self.LK_NBLCK, 1)
        self.places.append(os.lseek(handle, 0, os.SEEK_CUR))
        if self.failures:
            self.failures -= 1
            raise OSError(self.code, os.strerror(self.code))


def test_the_locks_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(windows: Any, *, wait: bool) -> bool:
        monkeypatch.setattr(locks, "fcntl", None)
        monkeypatch.setattr(locks, "msvcrt", windows)
        (tmp_path / "lock").unlink(missing_ok=True)
        with open(tmp_path / "lock", "a+") as file:
            file.write("process 7 on here")
            taken = locks.take_lock(file, wait=wait)
            file.write("!")
        assert (tmp_path / "lock").read_text() == "process 7 on here!", "what is written stays where it belongs"
        return taken

    unlocked, held = Windows(0), Windows(1)
    assert take(unlocked, wait=False) and unlocked.places[0] > 1 << 20, "others may still read what the file says"
    assert not take(held, wait=False)
    waited = Windows(2)
    assert take(waited, wait=True) and len(waited.places) == 3
    with pytest.raises(OSError, match="space"):
        take(Windows(1, errno.ENOSPC), wait=True)
    assert take(None, wait=True), "without either kind of lock nobody is kept out"


WITHOUT = """
import os, runpy, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
    delattr(signal, name)
for name in ("setsid", "set_blocking", "getuid"):
    delattr(os, name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_posix(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, words)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def test_one_process_trains_and_samples_where_posix_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    out = without_posix("ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", run, "--set", "steps=6", "--set", "preview.every=3")
    assert "= 1 x cpu" in out and metrics(run)[-1]["step"] == 6
    without_posix("sample.py", run, "--num-samples", "2", "--steps", "2", "--out", tmp_path / "samples")
    assert (tmp_path / "samples" / "grid.png").exists()
