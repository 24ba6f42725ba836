"""README.md and docs/: size, links, images, and that every command that they show runs.

Commands in ```sh blocks run here, on small stand-ins for the reader's images; those of other blocks (```console, ```powershell,
no language) need a network, hours or other data, and are held to the scripts' options and configs alone.
"""

import json
import re
import shlex
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from src.config import load
from tests.conftest import ROOT, launch, run_here, run_in_process
from tests.test_house import SCRIPTS, script_of

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
NAMES = [path.name for path in PAGES]

# ---------------------------------------------------------------------------------------------- pages, links, images


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.S))


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_five_minutes() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9000


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8")))
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / unquote(place)).resolve() if place else path
        assert target.exists() and ROOT in target.parents, f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


def test_every_page_is_in_the_readmes_index_and_says_first_what_it_is_for() -> None:
    index = (ROOT / "README.md").read_text(encoding="utf-8").split("## Documentation")[1]
    for path in PAGES:
        if path.name != "README.md":
            assert f"](docs/{path.name})" in index, path.name
            title, first = path.read_text(encoding="utf-8").split("\n\n")[:2]
            assert title.startswith("# ") and first.startswith("You "), path.name


def test_images_are_small_and_shown() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    images = [path for path in (ROOT / "docs").iterdir() if path.suffix != ".md"]
    assert {path.suffix for path in images} == {".png", ".gif"}
    assert sum(path.stat().st_size for path in images) < 8_000_000
    assert [path.name for path in images if path.name not in text] == []


def test_the_site_has_every_page_and_no_dead_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    command = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = launch(*command, cwd=ROOT, NO_MKDOCS_2_WARNING="1")
    assert done.status == 0, done.out + done.err
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    for path in PAGES:
        if path.name != "README.md":
            assert (tmp_path / f"{path.stem}.html").exists() and f'href="{path.stem}.html"' in start, path.name
    assert (tmp_path / "benchmarks" / "results" / "race_samples.png").exists()
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [path.name for path in PAGES if path.name != "README.md" and f" {path.name}\n" not in nav] == []
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    assert 'id="src.sampling.sampler.build_sampler"' in reference and "x_t = alpha" in reference
    pages = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")]
    loaded = [link for page in pages for link in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)', page)]
    assert loaded == [], "a page loads something from elsewhere"


# ---------------------------------------------------------------------------------------------- commands


def blocks(text: str, languages: tuple[str, ...]) -> list[str]:
    """The contents of the code blocks in one of these languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if language in languages]


def shell_lines(text: str, *languages: str) -> list[str]:
    """The commands of the blocks in these languages, one a line, continued lines joined."""
    joined = re.sub(r"[\\`]\n", " ", "\n".join(blocks(text, languages)))
    joined = re.sub(r"'[^'\n]*(?:\n[^'\n]*)+'", lambda quoted: quoted[0].replace("\n", " "), joined)  # JSON over several lines
    return [line.split(" #")[0].strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


@cache
def help_of(*words: str) -> str:
    return run_in_process(*words, "--help").out


@pytest.mark.parametrize("page", NAMES)
def test_commands_have_options_and_configs_that_there_are(page: str) -> None:
    path = next(path for path in PAGES if path.name == page)
    for line in shell_lines(path.read_text(encoding="utf-8"), "sh", "console", "powershell", ""):
        if (installed := re.search(r"^(accelerate launch -m )?atelier ([a-z-]+)", line)) is not None and installed[2] != "init":
            script = f"{installed[2].replace('-', '_')}.py"  # the command of the wheel
            line = line.replace(installed[0], f"python {script}")
        if not re.match(r"(python|accelerate launch|ACCELERATE_USE_CPU=true \S+|sbatch) ", line):
            continue
        words = shlex.split(line)
        place = next((i for i, word in enumerate(words) if word.endswith(".py") and "/" not in word), None)
        if place is None:  # a module, or a benchmark
            assert words[1] == "-m" or (ROOT / words[1]).exists(), line
            continue
        script, words = words[place], words[place + 1 :]
        assert script.removesuffix(".py") in SCRIPTS, line
        commands = words[:1] if script in ("convert.py", "prepare_data.py") else []
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"{re.escape(word)}\b", help_of(script, *commands)), f"{word} of: {line}"
        if "-cfg" in words:
            config = ROOT / words[words.index("-cfg") + 1]
            assert config.exists(), line
            settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            if not any("$" in setting for setting in settings):
                assert f"{script_of(config).__name__}.py" == script or script == "doctor.py", line
                load(config, script_of(config).Config, settings)


def test_modules_and_files_that_pages_name_are_there() -> None:
    for path in LINKED:
        text = path.read_text(encoding="utf-8")
        for module in re.findall(r"python -m (src[\w.]*)", text):
            assert find_spec(module) is not None, f"{path.name}: {module}"
        for file in re.findall(r"`((?:configs|tests|cluster|notebooks|benchmarks)/[\w/.]+\.\w+)`", text):
            assert (ROOT / file).exists(), f"{path.name}: {file}"


# ---------------------------------------------------------------------------------------------- commands that run

# Not run here: what needs a network, several GPUs, or its own test.
NOT_HERE = ("make", "accelerate", "ACCELERATE", "export", "source", "sbatch", "./setup.sh", "python doctor", "python bench")
SMALL = {"batch_size": 4, "workers": 0, "mixed_precision": "no", "checkpoint.every": None}
SMALL_DIFFUSION = {"steps": 4, "model.blocks": 1, "preview.num_samples": 2, "preview.batch_size": 2, "preview.sampler.steps": 2}
UNET = {"model": {"base_channels": 16, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "full"], "norm_groups": 8}}
POINTS = {"model.width": 16, "model.layers": 2, "steps": 4, "batch_size": 64, "preview.num_samples": 16}
TINY = {
    "ddpm_accelerate.py": SMALL | SMALL_DIFFUSION | UNET | {"image.size": 16},
    "train_classifier.py": SMALL | {"steps": 4, "classifier.blocks": 1, "preview.num_measured": 4, "image.size": 16},
    "train_ldm.py": SMALL | SMALL_DIFFUSION | UNET | {"image.size": 64, "held_out": 0.1},
    "train_iadb.py": POINTS | {"checkpoint.every": None},
    "train_vae.py": SMALL
    | {"image.size": 64, "held_out": 0.1, "micro_batch_size": 4, "model.widths": [8, 8, 8, 8], "model.blocks": 1}
    | {"discriminator.base_channels": 8, "stages": [{"steps": 2, "adversarial": {"weight": 0.1}}, {"steps": 1, "tanh": True}]},
}
TOGETHER = (
    ("README.md",),
    ("docs/data.md",),
    ("docs/autoencoder.md", "docs/latents.md"),
    ("docs/pixels.md",),
    ("docs/blending.md",),
    ("docs/sampling.md", "docs/evaluation.md", "docs/exports.md"),
    ("docs/configuration.md", "docs/reliability.md"),
)


def small(line: str) -> list[str]:
    """The words of a command, made to run in seconds on the stand-ins."""
    words = shlex.split(line)[1:]
    if "guided" not in line:  # that run is one of digits, trained here; the other ones know four shapes
        classes = {"3/7": "circle/cross", "3/7/1/0": "circle/cross/square/triangle", "High_Renaissance": "circle"}
        words = [classes.get(word, word) for word in words]
    if "-cfg" in words:
        settings = TINY[words[0]] | ({"steps": 8} if "--continue-as" in words else {})
        words += [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    if words[0] == "sample.py":
        words += ["--steps", "10" if "--image" in words else "2"]
        if "--invert" not in words:
            words += ["--num-samples", "10" if "0/1/2/3/4/5/6/7/8/9" in words else "4"]
        words = ["4" if before == "--start-at" else word for before, word in zip(["", *words], words, strict=False)]
    if words[0] == "interpolate.py":
        words += ["--steps", "2", "--frames-between", "2"]
    if words[0] == "evaluate.py":
        words = [word.replace("efficientnet_lite0", "random") for word in words]
        words += ["--num-images", "4" if "--likelihood" in words else "12"]
        if "vae" not in line and "--data" not in words:  # reconstructions and a folder's images are not drawn
            words += ["--steps", "2", *([] if "--likelihood" in words else ["--num-samples", "12"])]
    return words


def test_every_page_with_commands_is_run() -> None:
    shown = {name for path in PAGES for name in [path.relative_to(ROOT).as_posix()] if runnable(name)}
    assert shown == {name for group in TOGETHER for name in group}
    assert sum(len(runnable(name)) for name in shown) >= 40


def runnable(page: str) -> list[str]:
    lines = shell_lines((ROOT / page).read_text(encoding="utf-8"), "sh")
    return [line for line in lines if not line.startswith(NOT_HERE)]


LAUNCHED = 3  # of the readme's commands are launched as a reader does: the check of the images and both trainings
SLOW = {"docs/pixels.md", "docs/blending.md"}  # of these `make soak` runs the commands


@pytest.mark.timeout(900)  # up to some twenty scripts, one after the other
@pytest.mark.parametrize(
    "pages",
    [pytest.param(group, marks=[pytest.mark.soak] if SLOW & set(group) else []) for group in TOGETHER],
    ids=lambda pages: "+".join(Path(page).stem for page in pages),
)
def test_commands_run(pages: tuple[str, ...], smoke_run: Path, ldm_run: Path, vae_run: Path, tmp_path: Path) -> None:
    """Each command of the pages' ```sh blocks, but those of make, accelerate, benchmarks, buckets and clusters
    (tests/test_setup.py and tests/test_cluster.py have those)."""
    lines = [line for page in pages for line in runnable(page)]
    draw = np.random.default_rng(0)

    def image(path: str, size: int) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (size, size, 3), np.uint8)).save(tmp_path / path)

    for name in ("cats", "dogs"):
        for i in range(24):
            image(f"images/{name}/{i}.png", 48)
    for i in range(12):
        image(f"samples/mine/{i}.png", 16)
    for path in ("three.png", "mask.png", "my_digits/1.png"):
        image(path, 16)
    shutil.make_archive(str(tmp_path / "my_images"), "zip", tmp_path / "images")
    if not any("unpack" in line for line in lines):
        shutil.copytree(tmp_path / "images", tmp_path / "datasets" / "mine")
    shutil.copytree(tmp_path / "images", tmp_path / "datasets" / "landscape")
    for name in (*(f"{script}.py" for script in SCRIPTS), "src", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    known = {"digits_ddpm": smoke_run, "digits_ldm": ldm_run, "wikiart256_ldm": ldm_run, "digits_vae": vae_run}
    for name, run in known.items():
        shutil.copytree(run / "final", tmp_path / "runs" / name / "final")
    for number, line in enumerate(lines):
        assert line.startswith("python "), line
        print(line)  # shown where it fails
        words = small(line)
        if pages[0] == "README.md" and number < LAUNCHED:
            done = launch(*words, cwd=tmp_path)
            assert done.status == 0, f"{line}\n{done.all}"
        else:  # the others in this process, which spares them their imports
            run_here(words[0].removesuffix(".py"), *words[1:], cwd=tmp_path)


def test_the_blocks_of_python_run(ldm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two of docs/python.md (tests/test_python.py runs the others)."""
    codes = blocks((ROOT / "docs" / "python.md").read_text(encoding="utf-8"), ("python",))
    shutil.copytree(ldm_run / "final", tmp_path / "runs" / "digits_ldm" / "final")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert len(codes) == 4 and len(codes[2].splitlines()) <= 10
    for code, figure in zip(codes[2:], ("digits.png", "points.png"), strict=True):
        code = (
            code.replace('"0/1/2/3/4/5/6/7/8/9", 10', '"0/1/2/3", 8')
            .replace("range(10)", "range(8)")
            .replace('"steps=300"', '"steps=30", "model.width=16"')
        )
        exec(code, {"__name__": "docs"})
        assert (tmp_path / figure).exists()
