"""Sheets, curves and GIFs."""

import argparse
import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src import figures
from src.config import UserError, quoted
from src.config.validation import _override
from tests.conftest import ROOT


def test_to_uint8_covers_the_range() -> None:
    x = torch.tensor([-2.0, -1, 0, 1, 2]).reshape(1, 1, 1, 5)
    assert figures.to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255]
    assert figures.to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_a_grid_has_its_images_row_by_row() -> None:
    cells = np.zeros((5, 64, 64, 3), np.uint8)
    for i in range(5):
        cells[i] = 40 * i
    sheet = np.asarray(figures.grid(cells, columns=3))
    assert sheet.shape == (4 + 2 * 68, 4 + 3 * 68, 3)
    assert [sheet[36, 36 + 68 * i, 0] for i in range(3)] == [0, 40, 80] and sheet[104, 36, 0] == 120
    assert sheet[104, 172].tolist() == [255] * 3, "the empty place is white"
    labelled = figures.grid(cells, columns=3, labels=["a very long label indeed"] * 5, title="t")
    assert labelled.height > sheet.shape[0]
    assert figures.grid(np.zeros((1, 16, 16, 1), np.uint8), columns=1).width == 64 + 8, "small images are enlarged"


def test_in_a_row_and_save(tmp_path: Path) -> None:
    both = figures.in_a_row([Image.new("RGB", (3, 5)), Image.new("RGB", (4, 2))])
    assert both.size == (7, 5) and both.getpixel((6, 4)) == (255, 255, 255)
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG")):
        figures.save(both, tmp_path / "new" / name)
        with Image.open(tmp_path / "new" / name) as image:
            assert image.format == kind
    assert not list((tmp_path / "new").glob("*.part"))


def test_what_cannot_be_written_leaves_nothing_half_done(tmp_path: Path) -> None:
    """As on a full disk: the process may write files of 100 bytes."""
    code = (
        "import resource, signal, numpy as np; from pathlib import Path; from PIL import Image; from src import figures\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))\n"
        "lines = {'y': {'a': ([0], [1])}}\n"
        "one = lambda: figures.save(noise, Path('a.png'))\n"
        "other = lambda: figures.curves(Path('b.png'), lines, xlabel='x')\n"
        "for draw in (one, other):\n"
        "    try:\n        draw()\n    except OSError as error:\n        print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(errno.EFBIG)] * 2, done.stderr
    assert not list(tmp_path.iterdir())


def test_curves(tmp_path: Path) -> None:
    figures.curves(tmp_path / "c.png", {"y": {"a": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}}, xlabel="x", log={"y"})
    with Image.open(tmp_path / "c.png") as image:
        assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    bent = {"y": {"a": ([1, 10, 100], [1, 10, 100])}}  # a straight line where both scales are alike
    for name, log in (("linear", []), ("both", ["x", "y"]), ("x", ["x"])):
        figures.curves(tmp_path / f"{name}.png", bent, xlabel="x", log=log)
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in ("linear", "both", "x")}) == 3


@pytest.mark.parametrize("ffmpeg", [True, False])
def test_gif_with_and_without_ffmpeg(tmp_path: Path, ffmpeg: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ffmpeg:
        monkeypatch.setattr(figures, "ffmpeg", lambda: None)
    elif figures.ffmpeg() is None:
        pytest.skip("no ffmpeg here")
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"f_{i:03d}.png")
        figures.save(Image.new("RGB", (8, 8), (80 * i, 0, 0)), paths[-1])
    command = figures.gif(paths, tmp_path / "f_%03d.png", tmp_path / "out.gif", fps=5)
    with Image.open(tmp_path / "out.gif") as image:
        assert getattr(image, "n_frames", 1) == 3 and image.info["duration"] == 200 and image.info.get("loop") == 0
    assert command.startswith("ffmpeg ") and "-framerate 5" in command
    if ffmpeg:
        (tmp_path / "out.gif").unlink()
        subprocess.run([figures.ffmpeg() or "", *shlex.split(command)[1:]], check=True)
        assert (tmp_path / "out.gif").exists()
    with pytest.raises(UserError, match="no frames"):
        figures.gif([], tmp_path / "f_%03d.png", tmp_path / "none.gif", fps=5)


# ---------------------------------------------------------------------------------------------- an ffmpeg that does not start

BROKEN = {
    "no program": "not a program at all",
    "an interpreter that is gone": "#!/no/such/interpreter\n",
    "a library that is gone": "#!/bin/sh\necho 'error while loading shared libraries: libx.so' >&2\nexit 127\n",
    "one that is killed": "#!/bin/sh\nkill -9 $$\n",
    "one that does nothing": "#!/bin/sh\nexit 0\n",
    "one that fails at all": "#!/bin/sh\necho 'cannot do that' >&2\nexit 1\n",
}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Three frames in a folder whose name means something to a program in between."""
    paths = []
    for i in range(3):
        paths.append(tmp_path / "my runs" / "100% [new] %d 'x' #1 $HOME *" / f"f_{i:03d}.png")
        figures.save(Image.new("RGB", (8, 8), (80 * i, 0, 0)), paths[-1])
    return paths


def frames_in(path: Path) -> int:
    with Image.open(path) as image:
        return getattr(image, "n_frames", 1)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("shipped", [True, False])
def test_an_ffmpeg_that_does_not_start(
    broken: str,
    shipped: bool,
    three: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ffmpeg"
    program.write_text(BROKEN[broken])
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    figures._warn.cache_clear()
    if not shipped:
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    for _ in range(2):
        figures.gif(three, three[0].with_name("f_%03d.png"), tmp_path / "out.gif", fps=5)
    assert frames_in(tmp_path / "out.gif") == 3 and not (tmp_path / ".out.gif").exists()
    warnings = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("step ")]  # of another test's run
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {program} "), "one line, once"
    if shipped:
        figures.mp4(three[0].with_name("f_%03d.png"), tmp_path / "out.mp4", fps=5)
        assert (tmp_path / "out.mp4").stat().st_size > 500
    else:
        with pytest.raises((UserError, RuntimeError), match="no MP4 is made"):
            figures.mp4(three[0].with_name("f_%03d.png"), tmp_path / "out.mp4", fps=5)


def test_names_that_mean_something_to_a_program(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames are found, and the command that is told makes the same again when it is pasted into a shell."""
    program = figures.ffmpeg()
    if program is None:
        pytest.skip("no ffmpeg here")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(program)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    pattern = three[0].with_name("f_%03d.png")
    for name, make in (
        ("a:b % 'c'.gif", lambda out: figures.gif(three, pattern, out, fps=5)),
        ("d%d.mp4", lambda out: figures.mp4(pattern, out, fps=5)),
    ):
        out = pattern.with_name(name)
        command = make(out)
        before = out.read_bytes()
        out.unlink()
        subprocess.run(command, shell=True, check=True)
        assert out.read_bytes() == before
    monkeypatch.chdir(tmp_path)
    for folder in ("-x", "http:", "%03d"):  # an option, an address, a number
        paths = [Path(folder) / f"f_{i:03d}.png" for i in range(3)]
        for path, frame in zip(paths, three, strict=True):
            figures.save(Image.open(frame), path)
        command = figures.gif(paths, Path(folder) / "f_%03d.png", Path(folder) / "out.gif", fps=5)
        assert frames_in(Path(folder) / "out.gif") == 3
        subprocess.run(command, shell=True, check=True)


@pytest.mark.parametrize(
    "path",
    [
        "runs/a",
        "my runs/100% [new] 'x' #1",
        "-x",
        "[new]",
        "{a}",
        '"q"',
        "12",
        "true",
        "~/x",
        "a\nb",
        "$(touch no)",
        "порт рет",
        "/abs/-x",
    ],
)
def test_a_printed_path_can_be_pasted(path: str, tmp_path: Path) -> None:
    """Through a shell, an argument parser and --set it is still that path."""
    code = "import sys, json; print(json.dumps(sys.argv[1:]))"
    word = quoted(path)
    line = f"{shlex.quote(sys.executable)} -S -c {shlex.quote(code)} {word} --set autoencoder={word}"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    path_word, flag, assigned = json.loads(done.stdout)
    assert Path(path_word) == Path(path) and flag == "--set" and not list(tmp_path.iterdir())
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    assert parser.parse_args([path_word]).run == path_word
    raw: dict = {}
    _override(None, raw, assigned)
    assert Path(raw["autoencoder"]) == Path(path)


# ---------------------------------------------------------------------------------------------- names on sheets


def test_names_are_readable_in_any_script() -> None:
    for text in ("портрет", "café", "Ελληνικά", "naïve £5", "High Renaissance"):
        assert figures.readable(text) == text
    assert figures.readable("cafe\u0301") == "café", "decomposed as macOS writes it"
    assert figures.readable("风景 x") == "\\u98ce\\u666f x" and figures.readable("\U0002000b") == "\\U0002000b"
    assert figures.readable("a\udc80\x07\n b") == "a\\udc80\\u0007 b", "a name that is no UTF-8, and control characters"


def ink(sheet: Image.Image) -> int:
    return int((np.asarray(sheet.convert("L")) < 128).sum())


def test_each_letter_is_drawn_and_no_box() -> None:
    def caption(text: str) -> bytes:
        cells = np.full((1, 64, 64, 3), 255, np.uint8)
        return figures.grid(cells, columns=1, labels=[text]).crop((0, 64, 72, 100)).tobytes()

    box = caption("\ufffe")
    captions = [caption(letter) for letter in "портеéüß"]
    assert len(set(captions)) == len(captions) and box not in captions


def test_a_long_name_goes_on_in_the_next_line() -> None:
    measure = figures.lettering()[0].getlength
    for text in ("a_very_long_name_of_a_class", "x" * 60, "风" * 12, "two words", "", "портрет неизвестной", "\U0002000b" * 3):
        for width in (20, 64, 300):
            lines = figures.wrapped(text, width)
            assert "".join(lines).replace(" ", "") == figures.readable(text).replace(" ", ""), "nothing is cut off"
            assert all(measure(line) <= width or len(line) == 1 for line in lines)
    cells = np.full((4, 64, 64, 3), 255, np.uint8)
    one = figures.grid(cells, columns=2, labels=["short"] * 4)
    two = figures.grid(cells, columns=2, labels=["short", "a_very_long_name_of_a_class", "short", "short"])
    rows = len(figures.wrapped("a_very_long_name_of_a_class", 64))
    assert rows > 2 and two.size == (one.width, one.height + (rows - 1) * figures.LINE) and ink(two) > ink(one)
    assert figures.grid(cells, columns=2, labels=["word " * 500] * 4).height < 1000, "a paragraph is shortened"


def test_titles_of_charts_are_no_formulas(tmp_path: Path) -> None:
    figures.curves(
        tmp_path / "c.png", {"$y_{": {"a$b$": ([0, 1], [1, 2]), "风": ([0, 1], [2, 1])}}, xlabel="$", title="$x_{$ 风 " * 30
    )
    with Image.open(tmp_path / "c.png") as image:
        assert image.width == 600


def test_without_matplotlib_there_is_a_font_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    figures.lettering.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert figures.readable("café x") == "caf\\u00e9 x"
        assert ink(figures.grid(np.full((1, 64, 64, 3), 255, np.uint8), columns=1, labels=["café"])) > 20
    figures.lettering.cache_clear()


def test_images_in_a_row_or_a_column_may_be_grey_and_of_several_sizes() -> None:
    grey, red = Image.new("L", (8, 6), 70), Image.new("RGB", (5, 9), "red")
    row, column = np.asarray(figures.in_a_row([grey, red])), np.asarray(figures.in_a_column([grey, red]))
    assert row.shape == (9, 13, 3) and row[0, 0].tolist() == [70, 70, 70] and row[8, 0].tolist() == [255, 255, 255]
    assert column.shape == (15, 8, 3) and column[6, 4].tolist() == [255, 0, 0] and column[6, 5].tolist() == [255, 255, 255]
