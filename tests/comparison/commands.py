"""What the comparison runs of a commit: every shrunk config, samples and evaluations of its run, and more."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
# Python for a checkout: it prints the shrunk configs of its tests.
READ_JOBS = "import json; from tests.resumes import jobs; print(json.dumps([[j.name, j.script, j.raw] for j in jobs()]))"
HUB_JOBS = ("cats512_latent_iadb", "plain_ldm")  # their autoencoder is a folder of diffusers


class Job(NamedTuple):
    """A config to train: what it is called, the script's name without .py, and the JSON."""

    name: str
    script: str
    raw: dict[str, Any]


# More commands, on the runs of the configs; each is one line of the result. They run on one process.
SOLVERS = ("euler", "midpoint", "heun", "rk4", "dpmpp_2m", "ddim --eta 0.5", "ancestral", "redraw")
EXTRAS = {
    "solvers": [
        f"sample smoke_ddpm/run --num-samples 2 --steps 4 --guidance 2 --out solvers/{words.split()[0]} --solver {words}"
        for words in SOLVERS
    ],
    "classifier_guidance": [
        "sample smoke_ddpm/run --guidance-method classifier --classifier smoke_classifier/run --guidance 2 --num-samples 2"
        " --steps 3 --out classifier_guidance/samples"
    ],
    "editing": [
        "sample smoke_ddpm/run --image images/class_0/00.png --start-at 1 --num-samples 2 --steps 3 --out editing/start",
        "sample smoke_ddpm/run --invert images/class_0/00.png --steps 3 --solver euler --out editing/inversion",
        "sample shirts_to_dresses_iadb/run --source images/class_1 --steps 2 --out editing/source",
    ],
    "interpolation": [
        "interpolate smoke_ddpm/run --seeds 1/2 --frames-between 3 --steps 3 --out interpolation/seeds",
        "interpolate smoke_ldm/run --seeds 1/2 --frames-between 2 --steps 2 --out interpolation/latents",
    ],
    "evaluation": [
        "evaluate smoke_ddpm/run/final --likelihood --steps 4 --num-images 4 --json --out evaluation/likelihood",
        "evaluate smoke_ddpm/run/final --sweep steps=2,3 --num-samples 10 --features random --json --out evaluation/sweep",
    ],
    "post_hoc_ema": [
        "posthoc_ema ddpm_1/run 0.1",
        "sample ddpm_1/run/ema/width_0.1 --num-samples 2 --steps 2 --out post_hoc_ema/s",
    ],
    "exports": [
        "convert safetensors smoke_ddpm/run --out exports/ddpm.safetensors",
        "convert safetensors smoke_vae/run --out exports/vae",
        "convert safetensors smoke_ldm/run --out exports/ldm",
        "convert to-diffusers smoke_ddpm/run --out exports/diffusers_ddpm",
        "convert to-diffusers autoencoders/smoke_plain --out exports/diffusers_vae",
        "convert to-diffusers plain_ldm/run --out exports/diffusers_ldm",
        "convert diffusers exports/diffusers_ddpm --out exports/ddpm_again",
        "sample exports/ddpm_again --num-samples 2 --steps 2 --out exports/samples_ddpm",
        "convert diffusers exports/diffusers_ldm --out exports/ldm_again",
        "sample exports/ldm_again --num-samples 2 --steps 2 --out exports/samples_ldm",
    ],
    "imports": [
        "convert guided-diffusion shared/vectors/adm_64_class_conditional.pt --out imports/network"
        " --flags shared/vectors/adm_64_class_conditional.json",
        "convert guided-diffusion shared/vectors/adm_64_classifier.pt --out imports/classifier"
        " --flags shared/vectors/adm_64_classifier.json",
        "sample imports/network --guidance-method classifier --classifier imports/classifier --classes 7/900 --num-samples 2"
        " --steps 2 --solver ancestral --out imports/samples",
    ],
    "latents": [
        "prepare_data latents autoencoders/smoke_3 --out latents/cache",  # the autoencoder of smoke_ldm
        "sample smoke_ldm/run --num-samples 1 --steps 2 --out latents/samples",
    ],
}


def write_random_vgg(path: Path) -> None:
    """Write random weights of VGG16's convolutions, named as torchvision's file has them."""
    generator, channels, position, weights = torch.Generator().manual_seed(0), 3, 0, {}
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):  # 0 is a pooling
        if width:
            spread = (2 / (9 * channels)) ** 0.5
            weights[f"features.{position}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * spread
            weights[f"features.{position}.bias"] = torch.zeros(width)
            channels = width
        position += 2 if width else 1
    torch.save(weights, path)


def draw_images(folder: Path) -> None:
    """Write 24 small images of several sizes, grey ones too, into a folder for each of three classes."""
    numbers = np.random.default_rng(0)
    for i in range(24):
        place = folder / f"class_{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(numbers.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((20 + i, 28 - i % 5))
        (pixels.convert("L") if i % 4 == 3 else pixels).save(place / f"{i:02d}.{'jpg' if i % 2 else 'png'}")


def read_jobs(output: str) -> dict[str, Job]:
    """What READ_JOBS printed, and four configs more: of a folder of images, and of an autoencoder of diffusers."""
    jobs = {name: Job(name, script, raw) for name, script, raw in json.loads(output)}
    for name, like, source in (
        ("folder_ddpm", "smoke_ddpm", {"source": "folder", "path": "images"}),
        ("packed_ddpm", "smoke_ddpm", {"source": "packed", "path": "packed_ddpm/images"}),
        ("folder_ldm", "smoke_ldm", {"source": "folder", "path": "images"}),
    ):
        jobs[name] = Job(name, jobs[like].script, jobs[like].raw | {"data": source, "name": name})
    script, raw = jobs["smoke_ldm"][1:]
    changed = {"image": jobs[HUB_JOBS[0]].raw["image"], "model": jobs["smoke_ddpm"].raw["model"]}  # without linear attention
    jobs["plain_ldm"] = Job("plain_ldm", script, raw | changed | {"name": "plain_ldm"})
    return jobs


def write_files(folder: Path, jobs: list[Job], small_vae: Job) -> list[list[str]]:
    """Write the configs, and the files that they name; return the commands that make the autoencoders."""
    (folder / "configs").mkdir(parents=True)
    if SHARED.is_dir():
        (folder / "shared").symlink_to(SHARED.resolve())
    draw_images(folder / "images")
    write_random_vgg(folder / "vgg16.pth")
    autoencoders: dict[str, list[list[str]]] = {}
    for job in jobs:
        raw = dict(job.raw)
        if raw.get("autoencoder") == "AUTOENCODER":
            image = small_vae.raw["image"] | {"channels": raw["image"].get("channels", 3)}
            name = f"smoke_{image['channels']}"
            raw["autoencoder"] = f"autoencoders/{name}"
            config = small_vae.raw | {"stages": [{"steps": 1, "adversarial": {"weight": 0.1}}], "image": image, "name": name}
            if job.name in HUB_JOBS:  # diffusers has no linear attention
                name = "smoke_plain"
                config["image"] = image | {"size": raw["image"]["size"]}
                config["model"] = config["model"] | {"attention": ["none", "none"], "mid_attention": "full"}
                raw["autoencoder"] = "autoencoders/diffusers"
            (folder / "configs" / f"{name}.json").write_text(json.dumps(config))
            run = f"autoencoders/{name}"
            autoencoders[name] = [["train_vae", "-cfg", f"configs/{name}.json", "--run-dir", run]]
            if job.name in HUB_JOBS:
                autoencoders[name].append(["convert", "to-diffusers", run, "--out", raw["autoencoder"]])
        if raw.get("perceptual", {}).get("weights") == "WEIGHTS":
            raw["perceptual"] = raw["perceptual"] | {"weights": "vgg16.pth"}
        if "export_every" in raw:
            raw["export_dir"] = f"{job.name}/exports"
        (folder / "configs" / f"{job.name}.json").write_text(json.dumps(raw))
    return [command for commands in autoencoders.values() for command in commands]


def commands_of(job: Job) -> Iterator[list[str]]:
    """What is run of a config: its training, then samples and an evaluation where it has them."""
    run = f"{job.name}/run"
    if job.name.startswith("packed"):
        yield ["prepare_data", "pack", "images", "--size", "16", "--out", job.raw["data"]["path"]]
    yield [job.script, "-cfg", f"configs/{job.name}.json", "--run-dir", run]
    evaluation = ["evaluate", run, "--features", "random", "--batch-size", "8", "--json", "--out", f"{job.name}/evaluation"]
    sampling = ["sample", run, "--steps", "2", "--frames", "--out", f"{job.name}/samples", "--num-samples"]
    if job.script == "train_vae":
        yield [*evaluation, "--part", "train"]
    elif "image" not in job.raw:  # 2-D points
        yield [*sampling, "50"]
    elif job.script != "train_classifier":
        yield [*sampling, "3", "--npz"]
        yield [*evaluation, "--num-samples", "16", "--steps", "2"]


def extra_commands(names: set[str]) -> dict[str, list[list[str]]]:
    """Those of EXTRAS that have what they need: the runs, and `shared` where they read it."""
    extras = {}
    for name, lines in EXTRAS.items():
        words = {word for line in lines for word in line.split()}
        runs = {word.partition("/")[0] for word in words if "/run" in word}
        if runs <= names and (SHARED.is_dir() or not any(word.startswith("shared/") for word in words)):
            extras[name] = [line.split() for line in lines]
    return extras
