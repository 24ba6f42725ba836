"""The page on its server: where it listens, what it lets in, and the one line that each mistake ends in."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest
import torch

from src.app.controls import Page
from src.app.device import Device
from src.app.page import MOST_UPLOAD, build_page, check_port
from src.app.places import Places
from src.app.space import PACKAGES, render_card, write_space
from src.config import UserError
from src.runs.opened import Opened, open_run
from tests.app.conftest import closed_loops, served
from tests.conftest import ROOT, environment, launch, one_line, refused

pytest.importorskip("gradio", reason="the extra `app` is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::ResourceWarning")]
CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def address(place: Path) -> Iterator[str]:
    with served() as page:
        yield page.local_url.rstrip("/")


def get(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def call(address: str, name: str, *values: Any) -> list[str]:
    """The events of a handler of the page, as its own client asks for them."""
    body = json.dumps({"data": values}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/call/{name}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        number = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/{name}/{number}", timeout=120) as answer:
        return [line for line in answer.read().decode().split("\n\n") if line]


def test_the_page_listens_on_the_loopback_and_shows_reports_alone(address: str, place: Path) -> None:
    assert address.startswith("http://127.0.0.1:")
    config = json.loads(get(f"{address}/config")[1])
    assert config["analytics_enabled"] is False
    status, report = get(f"{address}/report/runs/shapes")
    assert status == 200 and report == (place / "runs" / "shapes" / "report.html").read_text()
    with urllib.request.urlopen(f"{address}/report/runs/shapes") as answer:
        assert answer.headers["Content-Security-Policy"] == "sandbox allow-scripts"
    for path in ("runs/nothing", "runs/shapes/../shapes", "..%2f..%2fetc", "runs/shapes/final", "models/shapes.pt"):
        assert get(f"{address}/report/{path}")[0] == 404
    for path in ("runs/shapes/config.json", "app.py", "/etc/passwd", "runs/shapes/final/ema.safetensors"):
        file = (place / path).resolve()
        assert get(f"{address}/gradio_api/file={file}")[0] in (403, 404), "no file of a run is given away"


def test_an_upload_of_300_mb_is_refused(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="large.png"\r\nContent-Type: image/png\r\n\r\n'
    tail, piece, pieces = b"\r\n--x--\r\n", bytes(1 << 20), 300
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(len(head) + pieces * len(piece) + len(tail)))
    connection.endheaders()
    sent = 0
    try:
        connection.send(head)
        for _ in range(pieces):
            connection.send(piece)
            sent += 1
        connection.send(tail)
    except OSError:  # the server has hung up
        pass
    try:
        answer = connection.getresponse()
        assert answer.status == 413 and "\n" not in answer.read().decode().strip()
    except (OSError, http.client.HTTPException):
        assert sent < pieces
    left = [path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file()]
    assert not left and MOST_UPLOAD == "50mb", "and nothing of it stays"


def test_a_handler_says_one_line(address: str, place: Path) -> None:
    fields = {"sampler": ["ddim", 2, "even", 1, None], "count": [2, 0, "", False, None]}
    events = call(address, "draw", "runs/shapes", "newest", [], "", *fields["count"], *fields["sampler"])
    assert "event: complete" in events[-1] and "2 images of runs/shapes" in events[-1]
    assert "python sample.py runs/shapes --num-samples 2 --batch-size 2 --seed 0 --solver ddim --steps 2" in events[-1]
    events = call(address, "draw", "runs/larger", "newest", [], "", *fields["count"], *fields["sampler"])
    assert "event: error" in events[-1] and "go to the tab Edit" in events[-1] and "Traceback" not in events[-1]


def test_a_file_that_is_no_image(address: str) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
        b"no image\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/upload", body, headers)) as answer:
        (path,) = json.load(answer)
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    editor = {"background": file, "layers": [], "composite": file}
    sampler = ["ddim", 2, "even", 1, None]
    events = call(address, "edit", editor, "runs/shapes", "newest", 0.6, 1, 1, [], 1, 0, *sampler)
    assert "event: error" in events[-1] and "that file is no image that can be read" in events[-1], events
    assert "Traceback" not in events[-1] and path not in events[-1]


def test_a_run_that_vanishes_while_the_page_is_open(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shapes", "other"):
        shutil.copytree(workplace / "runs" / "shapes", tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    with served() as page:
        address = page.local_url.rstrip("/")
        shutil.rmtree(tmp_path / "runs" / "other")
        values = ("newest", [], "", 2, 0, "", False, None, "ddim", 2, "even", 1, None)
        assert "the run runs/other is gone; choose another" in call(address, "draw", "runs/other", *values)[-1]
        assert "event: complete" in call(address, "draw", "runs/shapes", *values)[-1], "the others are there"
        assert get(f"{address}/report/runs/other")[0] == 404


def test_visitors_log_in(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(auth=("ada", "secret")) as page:
        address = page.local_url.rstrip("/")
        assert f"the page is at {address}/; Ctrl-C ends it" in capsys.readouterr().out
        assert get(f"{address}/report/runs/shapes") == (401, "log in first") and get(f"{address}/config")[0] == 401
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        login = urllib.parse.urlencode({"username": "ada", "password": "secret"}).encode()
        opener.open(f"{address}/login", login).close()
        with opener.open(f"{address}/report/runs/shapes") as answer:
            assert answer.status == 200


def test_a_port_in_use(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} of 127.0.0.1 cannot be used \(Address already in use\); give"):
            check_port("127.0.0.1", port)
        line = one_line(launch("app.py", "--port", str(port), "--device", "cpu"))
        assert f"port {port} of 127.0.0.1 cannot be used" in line
    check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot be used"):
        check_port("203.0.113.7", port)


def test_without_gradio(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"^the page \(app.py\) needs the package gradio: pip install gradio$"), served():
        pass
    with pytest.raises(UserError, match="a Space .* needs the package gradio"):
        write_space(Path("x"), "runs/shapes", CPU)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--port", "70000"], "ports go from 1 to 65535"),
        (["--auth", "ada"], "give it as USER:PASSWORD"),
        (["--export", "x"], "--export DIR writes a Space of one run"),
        (["--export", "x", "runs/nothing"], "there is no such run"),
        (["--hosst", "x"], "did you mean --host"),
    ],
)
def test_mistakes_of_app_py(words: list[str], line: str) -> None:
    assert line in refused("app", *words)


def test_every_field_has_a_label(place: Path, tmp_path: Path) -> None:
    with closed_loops():
        blocks = build_page(Page(Places(), Device(CPU), tmp_path))
    kinds = ("Dropdown", "Number", "Slider", "Textbox", "Checkbox", "Image", "ImageEditor", "Sketchpad", "Files")
    fields = [block for block in blocks.blocks.values() if type(block).__name__ in kinds]
    assert len(fields) > 40 and all(field.label for field in fields)


def test_a_space_starts_as_it_is(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "space"
    paths = write_space(out, "runs/shapes", CPU)
    assert {path.name for path in paths} == {".gitattributes", "README.md", "app.py", "requirements.txt", "runs", "src"}
    assert not list(out.rglob("*.jsonl")) and not list(out.rglob("data/*.png")), (
        "weights and a preview, and nothing of the data"
    )
    previews = [path.relative_to(out) for path in (out / "runs").rglob("*.png")]
    assert len(previews) == 1 and (place / previews[0]).is_file(), "the gallery shows it"
    header = (out / "README.md").read_text().split("---")[1]
    for line in ('title: "shapes"', "sdk: gradio", "app_file: app.py"):
        assert f"\n{line}\n" in header
    assert open_run(out / "runs" / "shapes", CPU).digest == open_run("runs/shapes", CPU).digest
    port = free_port()
    variables = environment(GRADIO_SERVER_PORT=str(port), GRADIO_SERVER_NAME="127.0.0.1")
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=out, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                status, text = get(f"http://127.0.0.1:{port}/config")
                break
            except OSError:
                time.sleep(0.3)
        else:
            pytest.fail(f"it does not start: {process.stdout.read() if process.stdout and process.poll() is not None else ''}")
        assert status == 200 and "runs/shapes" in text
    finally:
        process.terminate()
        process.communicate(timeout=30)
    with pytest.raises(UserError, match="is there already"):
        write_space(out, "runs/shapes", CPU)


def test_a_space_of_a_checkpoint_or_an_export_has_its_weights(place: Path, tmp_path: Path) -> None:
    export, checkpoint = "models/shapes.pt", "runs/shapes/checkpoints/step_00000020"
    for run, exported_as in ((checkpoint, "runs/shapes"), (export, export)):
        out = tmp_path / run.split("/")[0]
        write_space(out, run, CPU)
        exported, ours = (open_run(path, CPU) for path in (out / exported_as, run))
        for key, value in ours.network.state_dict().items():
            assert torch.equal(exported.network.state_dict()[key], value)
        assert exported.step == ours.step and not list(out.rglob("optimizer*.safetensors"))
    write_space(tmp_path / "larger", "runs/larger", CPU)
    assert not list((tmp_path / "larger" / "runs").rglob("*.png")), "a preview of it shows images of the data"
    write_space(tmp_path / "points", "runs/points", CPU)
    opened = open_run(tmp_path / "points" / "runs" / "points", CPU)
    card = render_card(opened, 'a "name": b')
    assert 'title: "a \\"name\\": b"' in card and '\n# a "name": b\n' in card


def test_a_space_needs_packages_that_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {line.split(">=")[0] for line in project["dependencies"]}
    assert set(PACKAGES) <= known and project["optional-dependencies"]["app"] == ["gradio>=6.0"]


def test_a_run_that_starts_from_images_is_no_space(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Opened, "gaussian", property(lambda run: False))
    with pytest.raises(UserError, match="runs/shapes starts from images, not from noise, and no image travels with a Space"):
        write_space(tmp_path / "space", "runs/shapes", CPU)
    assert not (tmp_path / "space").exists()
