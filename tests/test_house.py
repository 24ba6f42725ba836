"""The floors, the packages, the wheel, the configs."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from src import losses
from src.config import load
from src.diffusion import build_process
from src.doctor import needs
from src.models import VAE, Discriminator, build_model
from src.runs.classifier import build_classifier, noise_process
from src.training.autoencoder_stages import plan_stages
from tests import house
from tests.conftest import ROOT, environment, run_in_process

sys.path.insert(0, str(ROOT))
import ddpm_accelerate
import train_classifier
import train_iadb
import train_ldm
import train_vae

WITH_ACCELERATE = house.LAYERS[house.LAYERS.index("runtime") :]
TRAINING = ("train_vae", "train_ldm", "ddpm_accelerate", "train_iadb", "train_classifier")
SCRIPTS = (*TRAINING, "sample", "interpolate", "evaluate", "posthoc_ema", "prepare_data", "convert", "doctor", "app")
HEAVY = {
    "datasets",
    "diffusers",
    "sklearn",
    "matplotlib",
    "tensorboard",
    "wandb",
    "lpips",
    "torchmetrics",
    "torchvision",
    "efficientnet_lite_pytorch",
    "spandrel",
    "imageio_ffmpeg",
    "gradio",
    "fastapi",
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, whether imported by the module itself and not by a function) of a source file, made absolute."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                imported += [(".".join([*base, name]), id(node) in top) for name in names]
            else:
                imported.append((node.module or "", id(node) in top))
    return imported


def test_no_import_goes_up_between_folders_or_in_a_circle() -> None:
    assert len(house.arrows()) > 200
    folders = {path.name.removesuffix(".py") for path in (ROOT / "src").iterdir()} - {"__init__", "__pycache__"}
    assert folders == set(house.LAYERS)
    assert house.imports_that_go_up() == set(), "these imports go up: move what is imported, or who imports it"
    assert house.circles() == []


def test_the_check_of_imports_sees_functions_and_circles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("config/a", "from ..data.b import x"), ("data/b", "def f():\n    from ..config import a")):
        (tmp_path / "src" / name).parent.mkdir(parents=True)
        (tmp_path / "src" / f"{name}.py").write_text(text)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.imports_that_go_up() == {("config.a", "data.b")}
    assert house.circles() == ["config.a -> data.b -> config.a"]


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("told = 1", ["told"]),
        ("def f(here): pass", ["here"]),
        ("class PictureSet: pass", ["PictureSet"]),
        ("for made in x: pass", ["made"]),
        ("self.seen = 1", ["seen"]),
        ("import a as look", ["look"]),
        ("x.free()\nprint(wrong)\nspoon = made(1)", []),
    ],
)
def test_the_check_of_words_sees_what_is_bound(code: str, names: list[str]) -> None:
    assert [name for _, name in house.bound_names(ast.parse(code)) if house.is_refused(name)] == names


def test_only_convert_uses_interop() -> None:
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / f"{name}.py" for name in SCRIPTS)]:
        if path.parent.name != "interop" and path.name != "convert.py":
            assert not any(module.startswith("src.interop") for module, _ in imports(path)), path


def test_imports_inside_the_package_are_relative_and_accelerate_stays_above() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        for module, _ in imports(path):
            first = module.split(".")[0]
            assert first != "atelier", f"{path}: inside src/ only relative imports"
            assert first not in SCRIPTS, f"{path} imports a script"
            folder = house.module_of(path).split(".")[0]
            assert first != "accelerate" or folder in WITH_ACCELERATE, f"{path} imports accelerate"


def test_scripts_do_not_import_each_other_and_heavy_libraries_wait() -> None:
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / f"{name}.py" for name in SCRIPTS)]:
        for module, at_the_top in imports(path):
            assert module.split(".")[0] not in SCRIPTS, f"{path} imports {module}"
            if path.name != "diffusers_pipeline.py":  # it leaves with exports, and diffusers imports it
                assert not (at_the_top and module.split(".")[0] in HEAVY), f"{path} imports {module} before it is needed"
            assert "diffusers_pipeline" not in module, f"{path} imports {module}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_say_how_threads_wait_before_torch_reads_it(name: str) -> None:
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert isinstance(first, ast.Import) and [alias.name for alias in first.names] == ["src.threads"]


@pytest.mark.parametrize(
    ("variables", "count"),
    [({}, "700"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "passive"}, None), ({"KMP_BLOCKTIME": "0"}, None)],
)
def test_whoever_says_how_threads_wait_decides(variables: dict[str, str], count: str | None, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os\nprint(os.environ.get('GOMP_SPINCOUNT'))")  # torch sees it, not we alone
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    plain = {key: value for key, value in os.environ.items() if key not in names} | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    code = "import src.threads, gc; print(gc.isenabled())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=plain | variables, capture_output=True, text=True)
    assert done.stdout.split() == [str(count), "True"], done.stderr


def test_the_package_list_is_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("__init__.py")}
    wanted = {"atelier" if folder == "." else f"atelier.{folder.replace('/', '.')}" for folder in folders}
    configs = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*") if path.is_file()}
    wanted |= {"atelier.interop.cards", "atelier.scripts"}
    assert set(listed) == wanted | {*(f"atelier.scripts.{folder.replace('/', '.')}" for folder in configs)}
    assert all(
        (folder / "__init__.py").exists() for folder in (ROOT / "src").iterdir() if folder.is_dir() and folder.name[0] != "_"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, since setuptools leaves build/ and an .egg-info beside what it builds
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))):
        shutil.copy(path, source)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as file:
        file.extractall(folder / "site")
    return folder / "site"


def in_site(site: Path, folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python's answer in a folder from which the clone is not seen."""
    variables = {"PYTHONPATH": str(site), **variables}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment(**variables), capture_output=True, text=True)


def test_the_wheel_installs_as_atelier_alone(site: Path, tmp_path: Path) -> None:
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"atelier"}
    assert (site / "atelier/interop/cards/unet_2d.md").exists() and (site / "atelier/report/page.html").exists()
    code = "import atelier.sampling, atelier.diffusion as d, atelier.models; print(atelier.__file__, d.times.__module__)"
    done = in_site(site, tmp_path, "-c", code)
    assert done.returncode == 0 and str(site) in done.stdout, done.stderr


def test_the_installed_command_has_every_script_and_writes_the_configs(site: Path, tmp_path: Path) -> None:
    assert set(SCRIPTS) == {path.stem for path in (site / "atelier" / "scripts").glob("*.py")}
    done = in_site(site, tmp_path, "-m", "atelier", "--help")
    assert done.returncode == 0 and all(f"  {name.replace('_', '-')} " in done.stdout for name in SCRIPTS), done.stderr
    done = in_site(site, tmp_path, "-m", "atelier", "init", "mine")
    copied = {
        path.relative_to(tmp_path / "mine"): path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()
    }
    originals = {path.relative_to(ROOT): path.read_bytes() for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert done.returncode == 0 and copied == originals, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init", "."], "configs is there already"),
        (["init"], "atelier init DIR"),
        (["train_ldn"], "there is no command 'train-ldn'; did you mean train-ldm?"),
        (["sample", "--stpes", "3"], "did you mean --steps? (atelier sample --help"),
    ],
)
def test_a_mistake_in_the_installed_command_is_one_line(site: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "configs").mkdir()
    done = in_site(site, tmp_path, "-m", "atelier", *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert list((tmp_path / "configs").iterdir()) == []


def test_two_processes_train_from_the_wheel_and_the_command_draws(site: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()  # a folder of that name is not in the way
    (tmp_path / "smoke.json").write_text((ROOT / "configs" / "smoke" / "ddpm.json").read_text())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "atelier", "ddpm-accelerate"]
    overrides = [word for one in ("steps=2", "preview.quality=null", "preview.every=null") for word in ("--set", one)]
    done = in_site(
        site, tmp_path, *launcher, "-cfg", "smoke.json", "--run-dir", "run", *overrides,
        ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0 and "= 2 x cpu x" in done.stdout, done.stderr
    done = in_site(site, tmp_path, "-m", "atelier", "sample", "run", "--num-samples", "2", "--steps", "2", "--out", "drawn")
    assert done.returncode == 0 and (tmp_path / "drawn" / "grid.png").exists(), done.stderr


def test_a_spawned_worker_of_the_installed_command_has_the_package(site: Path, tmp_path: Path) -> None:
    """As on a Mac, where a loader's workers are spawned."""
    (tmp_path / "smoke.json").write_text((ROOT / "configs" / "smoke" / "ddpm.json").read_text())
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n"
    )
    words = ["-m", "atelier", "ddpm-accelerate", "-cfg", "smoke.json", "--run-dir", "run", "--set", "workers=1"]
    words += [word for one in ("steps=2", "preview.quality=null", "preview.every=null") for word in ("--set", one)]
    done = in_site(site, tmp_path, *words, PYTHONPATH=f"{site}{os.pathsep}{tmp_path}")
    assert done.returncode == 0, done.stderr


CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.json") if "schemas" not in path.parts)


def script_of(path: Path) -> Any:
    """The training script that a config is for, by the schema that it names."""
    named = (path.parent / json.loads(path.read_text())["$schema"]).resolve()
    assert named.parent == ROOT / "configs" / "schemas"
    scripts = (train_vae, train_ldm, ddpm_accelerate, train_iadb, train_classifier)
    return {script.__name__: script for script in scripts}[named.stem]


def only_scaled(x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Instead of group_norm, whose shapes it has: that is hundreds of operations in Python on the meta device."""
    shape = (-1, *(1 for _ in x.shape[2:]))
    return x * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_runs_one_step_on_the_meta_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "group_norm", only_scaled)
    script = script_of(path)
    cfg = load(path, script.Config)
    assert cfg.name.removeprefix("smoke_") == path.stem
    for world in (1, 2, 4, 8):  # a UserError where its batches cannot be dealt
        assert f"= {world} x " in needs.batches(cfg, world).found
    if script is train_vae:
        return one_stage_after_the_other(cfg)
    if script is train_classifier:
        return one_batch_of_a_classifier(cfg)
    process, conditional = build_process(cfg.process), cfg.class_conditional is not False
    shape = (2,) if cfg.image is None else (cfg.image.channels, cfg.image.size, cfg.image.size)
    if script is train_iadb and cfg.autoencoder is not None:
        shape = (4, cfg.image.size // 8, cfg.image.size // 8)  # Stable Diffusion's
        if (path.with_name(f"{Path(cfg.autoencoder).name}.json")).exists():
            ours = load(path.with_name(f"{Path(cfg.autoencoder).name}.json"), train_vae.Config)
            assert ours.image == cfg.image
            shape = ours.model.latent_shape(cfg.image.size)
    if script is train_ldm:
        autoencoder = load(path.with_name(f"{Path(cfg.autoencoder).name.removeprefix('smoke_')}.json"), train_vae.Config)
        assert (autoencoder.data, autoencoder.held_out) == (cfg.data, cfg.held_out)
        assert replace(autoencoder.image, size=cfg.image.size) == cfg.image
        trained_at = {stage.image_size or autoencoder.image.size for stage in autoencoder.stages}
        assert cfg.image.size in trained_at, "it may be that of a later stage, as wikiart512_ldm's is"
        shape = autoencoder.model.latent_shape(cfg.image.size)
    with torch.device("meta"):
        learned, names = cfg.process.variance == "learned", cfg.condition_names(shape)
        network = build_model(cfg.model, shape, 27 if conditional else None, learned=learned, condition_channels=len(names))
        x0 = torch.zeros(2, *shape)
        condition = {"labels": torch.zeros(2, dtype=torch.long)} if conditional else {}
        condition |= {"condition": torch.zeros(2, len(names), *shape[1:])} if names else {}
    t = process.draw_times(torch.tensor([0.1, 0.9], dtype=torch.float64))
    loss = process.losses(network, x0, torch.zeros_like(x0), t, **condition).loss
    loss.sum().backward()
    assert loss.shape == (2,) and next(network.parameters()).grad is not None
    return None


def one_batch_of_a_classifier(cfg: Any) -> None:
    process = noise_process(cfg.noise)
    with torch.device("meta"):
        network = build_classifier(cfg.classifier, cfg.image, 27)
        x0 = torch.zeros(2, *cfg.image.shape)
    t = process.draw_times(torch.tensor([0.1, 0.9], dtype=torch.float64))
    logits = network(process.add_noise(x0, torch.zeros_like(x0), t), process.network_time(t).to("meta", torch.float32))
    logits.sum().backward()
    assert logits.shape == (2, 27) and next(network.parameters()).grad is not None


def one_stage_after_the_other(cfg: Any) -> None:
    """Each at its size: a reconstruction, its loss, and the discriminator's verdict."""
    stages = plan_stages(cfg, 1000, rank=0, world=1)
    assert [stage.config for stage in stages] == list(cfg.stages)
    with torch.device("meta"):
        network, discriminator = VAE(cfg.model, cfg.image.channels), Discriminator(cfg.discriminator, cfg.image.channels)
        for stage in stages:
            images = torch.zeros(1, *stage.image.shape)
            output = network(images, torch.zeros(1, *cfg.model.latent_shape(stage.image.size)))
            loss = losses.reconstruction_loss(stage.config.reconstruction, output.images, images)
            loss = (
                loss
                + losses.kl_divergence(output.mean, output.logvar)
                + losses.generator_loss("hinge", discriminator(output.images))
            )
            loss.sum().backward()
            assert output.images.shape == images.shape and discriminator(images).shape[2] >= 1


@pytest.mark.parametrize("script", TRAINING)
def test_the_schema_is_the_scripts(script: str) -> None:
    done = run_in_process(f"{script}.py", "--schema")
    assert done.status == 0 and done.out == (ROOT / "configs" / "schemas" / f"{script}.json").read_text()


def test_the_scripts_read_top_to_bottom_in_250_lines() -> None:
    for script in SCRIPTS:
        assert len((ROOT / f"{script}.py").read_text().splitlines()) <= 250, script
    lengths = {script: len((ROOT / f"{script}.py").read_text().splitlines()) for script in TRAINING}
    assert lengths["ddpm_accelerate"] == min(lengths.values()), "the smallest training script"


def test_any_config_turns_to_a_folder_of_ones_own() -> None:
    for path in CONFIGS:
        raw = json.loads(path.read_text())
        if isinstance(raw["data"], list) or "image" not in raw:
            continue
        cfg = load(path, script_of(path).Config, ["data.source=folder", "data.path=mine"])
        assert cfg.data.source == "folder" and cfg.data.path == "mine"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("cifar10_ddpm", None, 35_746_307),  # Sec. 4, arXiv:2006.11239: 35.7 M
        ("cifar10_improved_ddpm", None, 52_546_438),  # improved-diffusion's README: 50 M
        ("imagenet64_ddpm", 1000, 295_904_454 + 768),  # Table 10, arXiv:2105.05233: 296 M; and our null class
        ("imagenet128_ddpm", 1000, 421_529_606 + 1024),  # 422 M
        ("imagenet256_uncond_ddpm", None, 552_814_086),  # guided-diffusion's: 552.8 M
        ("celeba64_iadb", None, 113_673_219),  # the paper's UNet2DModel
    ],
)
def test_the_published_configs_are_the_published_networks(name: str, classes: int | None, parameters: int) -> None:
    path = ROOT / "configs" / f"{name}.json"
    cfg = load(path, script_of(path).Config)
    with torch.device("meta"):
        shape = (3, cfg.image.size, cfg.image.size)
        network = build_model(cfg.model, shape, classes, learned=cfg.process.variance == "learned")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
