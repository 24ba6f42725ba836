"""A run that is pushed to the hub while it trains: when, what, and what happens where that fails."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ddpm_accelerate
from src.config import dump, load
from src.doctor import needs
from src.runs.opened import open_run
from src.runtime.checkpoint import step_folder, write_folder
from src.storage.hub import HubConfig, local_path
from src.training import background
from src.training.background import Background
from src.training.entry import run_training
from src.training.hub import HubPushes
from src.training.rehearsal import rehearsal_config
from src.training.run_directory import changes
from tests.conftest import ROOT, SMOKE, launch, refused, run_here
from tests.hub_server import TOKEN, HubServer

CONFIG = load(ROOT / SMOKE, ddpm_accelerate.Config)
FACTS = {"class_names": ["a", "b"], "counts": {"a": 3, "b": 2}, "images": 5, "held_out_images": 1}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(background, "LAST_RETRY_SECONDS", 0.01)


def save(run: Path, step: int, *, final: bool = False) -> None:
    tensors = {"ema": {"w": torch.full((4,), float(step))}, "optimizer": {"m": torch.zeros(4)}}
    documents = {"progress": {"step": step, "best": None}, "config": dump(CONFIG), "data": FACTS}
    write_folder(run / "final" if final else step_folder(run / "checkpoints", step), tensors, documents)


def wait_for(what: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < 30
        time.sleep(0.02)


def pushes(run: Path, **settings: object) -> tuple[HubPushes, list[str]]:
    lines = list[str]()
    started = HubPushes(HubConfig(repo="me/cats", **settings), run)  # type: ignore[arg-type]
    started.say = lines.append
    return started, lines


def step_there(hub: HubServer, branch: str = "main") -> int | None:
    files = hub.files("me/cats", branch) if "me/cats" in hub.repos else {}
    return json.loads(files["progress.json"])["step"] if "progress.json" in files else None


def test_each_checkpoint_and_the_end_are_pushed(hub: HubServer, tmp_path: Path) -> None:
    run = tmp_path / "x"
    sent, lines = pushes(run, every="checkpoint", private=True)
    wait_for(lambda: "me/cats" in hub.repos)
    assert hub.repos["me/cats"].private, "it is made at the start"
    for step in (2, 4):
        save(run, step)
        sent.wake(step)
        assert sent.pinned <= {2, 4}
        wait_for(lambda step=step: step_there(hub) == step)
    save(run, 6)
    save(run, 6, final=True)
    assert sent.close() and step_there(hub) == 6 and lines == [f"{run} is at {hub.url}/me/cats"]
    assert hub.messages("me/cats") == ["smoke_ddpm, step 2", "smoke_ddpm, step 4", "smoke_ddpm, step 6"]
    names = {"README.md", "config.json", "data.json", "ema.safetensors", "progress.json", "MANIFEST.json"}
    assert hub.files("me/cats").keys() == names, "no state of the optimizer"


def test_only_the_end_is_pushed_by_default(hub: HubServer, tmp_path: Path) -> None:
    run = tmp_path / "x"
    sent, lines = pushes(run)
    save(run, 2)
    sent.wake(2)
    assert sent.close() and lines == [] and hub.messages("me/cats") == [], "it was stopped before its end"
    save(run, 4, final=True)
    sent, lines = pushes(run, revision="v1")
    assert sent.close() and step_there(hub, "v1") == 4 and step_there(hub) is None
    assert lines == [f"{run} is at {hub.url}/me/cats/tree/v1"]


def test_a_push_that_fails_is_said_once_and_tried_again(hub: HubServer, tmp_path: Path) -> None:
    run = tmp_path / "x"
    sent, lines = pushes(run, every="checkpoint")
    wait_for(lambda: "me/cats" in hub.repos)
    hub.faults.add(500, "^commit ", times=30)
    hub.faults.add("cut", "^preupload ", times=7)
    save(run, 2)
    sent.wake(2)
    wait_for(lambda: hub.faults.met[500] >= 14)
    assert len(lines) == 1, lines
    assert lines[0].startswith("warning: not pushed to the hub (") and lines[0].endswith(
        "; it is tried again, and training goes on"
    )
    wait_for(lambda: step_there(hub) == 2)
    assert sent.close()
    assert lines[1:] == ["pushes to the hub work again", f"{run} is at {hub.url}/me/cats"]


def test_a_wrong_token_is_said_at_the_start_and_a_command_at_the_end(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "x"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    sent, lines = pushes(run)
    wait_for(lambda: hub.count("create") > 1)
    save(run, 4, final=True)
    assert not sent.close()
    words, reason = [*lines, capsys.readouterr().out], "does not take the token for me/cats (status 401)"
    assert sum(reason in word and "warning" in word for word in words) == 1 and "hf_wrong" not in "".join(words)
    first, last = f"{run} is NOT at me/cats on the hub as it is here (", f"); later: python convert.py push {run} me/cats"
    assert lines[-1].startswith(first) and reason in lines[-1] and lines[-1].endswith(last)
    monkeypatch.delenv("HF_TOKEN")
    sent, lines = pushes(run)
    assert not sent.close() and lines[-1].startswith(f"{first}there is no token") and lines[-1].endswith(last)


def test_a_run_that_is_not_on_the_hub_ends_with_status_1_and_the_same_command_pushes_it(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, args = tmp_path / "x", argparse.Namespace(run_dir=str(tmp_path / "x"), dry_run=False, verify_resume=False)
    cfg = replace(CONFIG, hub=HubConfig(repo="me/cats"))
    save(run, 2)
    save(run, 2, final=True)
    hub.faults.add(403, "^commit ", times=3)
    assert run_training(lambda *_: 0, cfg, args) == 1
    assert "is NOT at me/cats on the hub" in capsys.readouterr().out
    assert run_training(lambda *_: 0, cfg, args) == 0 and step_there(hub) == 2
    assert f"{run} is at {hub.url}/me/cats" in capsys.readouterr().out
    assert rehearsal_config(cfg).hub is None, "a rehearsal pushes nothing"


def test_a_run_trains_and_is_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """And the token is nowhere: neither in the run nor in what the hub has received."""
    run = tmp_path / "cats"
    keys = {"steps": 4, "preview.every": 2, "preview.quality": "null", "checkpoint.every": 2, "log.trackers": "[]"}
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    words += ["--set", 'hub={"repo": "me/cats", "every": "checkpoint"}', "--run-dir", str(run)]
    run_here("ddpm_accelerate", "-cfg", SMOKE, *words)
    files = hub.files("me/cats")
    assert files["ema.safetensors"] == (run / "final" / "ema.safetensors").read_bytes()
    assert files["previews/step_00000004.png"] == (run / "samples" / "step_00000004.png").read_bytes()
    card = files["README.md"].decode()
    assert "(previews/step_00000004.png)" in card and "| held out loss | 4 | " in card
    assert {name for name in files if "/" in name} == {"previews/step_00000004.png"}, "older previews are replaced, and no data"
    opened = open_run("me/cats", torch.device("cpu"))
    assert opened.step == 4 and local_path("me/cats").is_dir()
    written = [path for path in run.rglob("*") if path.is_file()]
    assert written and not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN.encode() not in b"".join([*files.values(), *hub.bodies])
    assert "is at" not in (run / "config.json").read_text()


def test_of_two_processes_one_pushes(hub: HubServer, tmp_path: Path) -> None:
    keys = {"steps": 2, "preview.quality": "null", "log.trackers": "[]", "held_out": 0, "hub": '{"repo": "me/cats"}'}
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    done = launch("ddpm_accelerate.py", "-cfg", SMOKE, *words, "--run-dir", tmp_path / "run", processes=2)
    assert done.status == 0 and "= 2 x cpu" in done.out and f"is at {hub.url}/me/cats" in done.out, done.all
    assert hub.messages("me/cats") == ["smoke_ddpm, step 2"] and hub.count("create") == 2, "at the start, and with the push"
    assert TOKEN not in done.all


def test_the_doctor_looks_for_a_token(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = replace(CONFIG, hub=HubConfig(repo="me/cats"))
    check = needs.checks(cfg, tmp_path, 1, 1)["hub"]
    assert check().status == "pass" and TOKEN not in str(check()) and not hub.requests
    monkeypatch.delenv("HF_TOKEN")
    assert check().status == "fail" and "no token to push to me/cats" in check().found
    assert "hub" not in needs.checks(CONFIG, tmp_path, 1, 1)


def test_a_run_may_go_to_the_hub_later_too() -> None:
    later = replace(CONFIG, hub=HubConfig(repo="me/cats"))
    before = {key: value for key, value in dump(CONFIG).items() if key != "hub"}  # as runs were begun before there was one
    assert changes(later, before) == (["hub"], []) and changes(CONFIG, dump(later)) == (["hub"], [])
    assert changes(replace(later, hub=HubConfig(repo="me/dogs", private=True)), dump(later))[1] == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('{"repo": "cats"}', "hub.repo: give OWNER/NAME, the name of a repository on the Hugging Face hub, not 'cats'"),
        ('{"repo": "me/cats", "token": "hf_secret"}', "hub.token: unknown key"),
        ('{"repo": "me/cats", "every": "hour"}', "hub.every"),
        ("me/cats", "hub"),
    ],
)
def test_mistakes_in_the_key(tmp_path: Path, value: str, words: str) -> None:
    message = refused("ddpm_accelerate", "-cfg", SMOKE, "--set", f"hub={value}", "--run-dir", tmp_path / "run")
    assert words in message and "hf_secret" not in message and not (tmp_path / "run").exists()


def test_no_error_of_a_library_ends_the_thread_in_silence(tmp_path: Path) -> None:
    class Broken(Background):
        def _put(self, step: str | None, back: bool) -> None:
            raise SystemExit("of a library")

        def _last_line(self, failed: str | None) -> str | None:
            return f"NOT there ({failed})"

    lines = list[str]()
    broken = Broken(tmp_path, "there")
    broken.say = lines.append
    assert not broken.close() and lines[-1] == "NOT there (of a library)"
