"""What the tests share: where the reference numbers are, launching scripts, smoke runs that several tests look at."""

import gc
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from src.config import UserError, progress

if TYPE_CHECKING:
    from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SMOKE = "configs/smoke/ddpm.json"
torch.set_num_threads(1)  # tests run side by side
gc.set_threshold(100_000, 20, 20)  # what is imported and collected stays: there is little garbage among it


def pytest_collection_finish() -> None:
    freeze_modules()


def freeze_modules() -> None:
    """What is imported stays to the end: the search for garbage leaves it out, which took a third of a small run's time."""
    if len(sys.modules) > modules_frozen[-1]:
        modules_frozen.append(len(sys.modules))
        gc.freeze()


modules_frozen = [0]  # how many there were, each time


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans are remembered where the test can be forgotten."""
    monkeypatch.setenv("ATELIER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    """What a script left open in this process is warned of in its own test, not in whichever one collects it; and no job goes
    on to say how far it is."""
    yield
    left = [*progress._pulses]
    progress._pulses.clear()
    assert not left, "a job that is over still says every half minute what it does"
    if ran_here:
        ran_here.clear()
        gc.collect()
        freeze_modules()


ran_here: list[str] = []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["HubServer"]:
    """A hub on this machine, for this process and those that it starts, with an empty cache and the token of `me`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from src.storage import hub
    from tests.hub_server import TOKEN, HubServer

    with HubServer() as server:
        folder = tmp_path / "hf_home"
        variables = {"ENDPOINT": server.url, "HOME": str(folder), "HUB_CACHE": str(folder / "hub"), "HUB_DISABLE_XET": "1"}
        for name, value in variables.items():
            monkeypatch.setenv(f"HF_{name}", value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(folder / "stored_tokens"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between its tries
        monkeypatch.setattr(hub, "_brought", {})
        yield server


def shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"../shared/{name} is not here: a user's clone has none")
    return folder


@pytest.fixture
def vectors() -> Path:
    return shared_folder("vectors")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """In CI, with ../shared there, a vector test that skips has failed."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and "vectors" in getattr(item, "fixturenames", ()) and os.environ.get("CI") and SHARED.is_dir():
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped although ../shared is here: {report.longrepr}"


def randomise(network: torch.nn.Module, scale: float = 0.1) -> torch.nn.Module:
    """Every parameter from a normal, the zero-initialised ones too, so that every branch counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network


def command(processes: int, *arguments: str | Path) -> list[str]:
    """A script on one process with plain python, or on several as the design says."""
    words = [str(argument) for argument in arguments]
    if processes == 1:
        return [sys.executable, *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, *words]


def environment(processes: int = 1, **extra: str) -> dict[str, str]:
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    several = {"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}
    return {**clean, **several, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1", **extra}


@dataclass
class Finished:
    status: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err


def launch(
    *arguments: str | Path,
    processes: int = 1,
    cwd: Path = ROOT,
    timeout: float = 240,
    limit: tuple[int, int] | None = None,
    **extra: str,
) -> Finished:
    """Run a script of the repository to its end; `limit` is (resource.RLIMIT_..., bytes)."""
    done = subprocess.run(
        command(processes, *arguments),
        cwd=cwd,
        env=environment(processes, **extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        preexec_fn=None if limit is None else lambda: resource.setrlimit(limit[0], (limit[1],) * 2),
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def one_line(finished: Finished) -> str:
    """The one line of a user's mistake: exit status 2, no traceback, one line on standard error."""
    assert finished.status == 2, finished.all
    assert "Traceback" not in finished.all, finished.all
    lines = [line for line in finished.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.err
    return lines[0]


class Charts:
    """Whether runs in this process draw theirs: that takes longer than a small run trains."""

    are_real = False


@pytest.fixture
def real_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are about what is in them."""
    monkeypatch.setattr(Charts, "are_real", True)


def save_blank(_: object, file: Any, *, format: str, **__: object) -> None:
    """Figure.savefig, but what it writes is empty."""
    if format == "svg":
        file.write("<svg></svg>")
    else:
        Image.new("L", (8, 8), 255).save(file, format)


def run_here(script: str, *arguments: str | Path, cwd: Path = ROOT) -> None:
    """A script's main to its end in this process, with charts that are empty: quick where launching is not what is tested."""
    ran_here.append(script)
    AcceleratorState._reset_state(True)
    exact = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.syspath_prepend(str(ROOT))
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        if not Charts.are_real:
            with suppress(ImportError):  # a test may take matplotlib away
                patch.setattr("matplotlib.figure.Figure.savefig", save_blank)
        try:
            assert not importlib.import_module(script).main()
        finally:
            AcceleratorState._reset_state(True)
            torch.use_deterministic_algorithms(exact)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def run_in_process(script: str, *arguments: str | Path, cwd: Path = ROOT) -> Finished:
    """`launch` of one process without its start: what the script says, and 2 where that is a mistake in one line."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run_here(script.removesuffix(".py"), *arguments, cwd=cwd)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except SystemExit as ended:  # as --schema does
            status = int(ended.code or 0)
    return Finished(status, out.getvalue(), err.getvalue())


def refused(script: str, *arguments: str | Path) -> str:
    """The message of the mistake that a script's main ends on, in this process."""
    with pytest.raises(UserError) as raised:
        run_here(script, *arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke config trained on one process; read only."""
    run = tmp_path_factory.mktemp("smoke") / "one"
    models = run.parent / "models"
    done = launch(
        "ddpm_accelerate.py",
        "-cfg",
        SMOKE,
        "--run-dir",
        run,
        "--set",
        "export_every=30",
        "--set",
        f"export_dir={models}",
    )
    assert done.status == 0, done.all
    assert "= 1 x cpu x 2 x 8" in done.out, "one process, two micro-batches"
    return run


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes the smoke config with changes (a function of the dictionary) to a file."""

    def write(change: Callable[[dict], object] = lambda raw: None) -> Path:
        raw = json.loads((ROOT / SMOKE).read_text())
        change(raw)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(raw))
        return path

    return write


@pytest.fixture(scope="session")
def vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke autoencoder, all four stages, on one process; read only but for latent caches."""
    run = tmp_path_factory.mktemp("vae") / "one"
    done = run_in_process("train_vae.py", "-cfg", "configs/smoke/vae.json", "--run-dir", run)
    assert done.status == 0 and "Traceback" not in done.all, done.all
    return run


@pytest.fixture(scope="session")
def ldm_run(vae_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke diffusion on its latents, on one process; read only."""
    run = tmp_path_factory.mktemp("ldm") / "one"
    words = ("-cfg", "configs/smoke/ldm.json", "--set", f"autoencoder={vae_run}", "--run-dir", run)
    done = run_in_process("train_ldm.py", *words)
    assert done.status == 0 and "Traceback" not in done.all and "Warning" not in done.err, done.all
    return run


@pytest.fixture(scope="session")
def iadb_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke config of blending, noise to images, on one process; read only but for pairs."""
    run = tmp_path_factory.mktemp("iadb") / "one"
    done = run_in_process("train_iadb.py", "-cfg", "configs/smoke/iadb.json", "--run-dir", run)
    assert done.status == 0 and "Traceback" not in done.all and "Warning" not in done.err, done.all
    return run
