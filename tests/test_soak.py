"""make soak: many kills, on one process and on two, and the ends are equal to the bit."""

import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src.config import read_json
from src.data import open_sources
from src.data.points import CheckerboardSource, draw_points
from src.data.sources import DigitsSource
from src.runs.opened import open_trained
from src.runtime.checkpoint import newest
from src.sampling.edit import encode_images, files_of
from tests import kills
from tests.conftest import ROOT, SMOKE, command, environment, launch, metrics
from tests.test_iadb_scripts import sliced_wasserstein

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("soak") / "whole"
    done = launch(*kills.arguments(run))
    assert done.status == 0, done.all
    return run


def kill_often(
    job: kills.Job, whole: Path, run: Path, processes: int, *, kills_wanted: int, inside: int, stages: int = 0
) -> None:
    """Kill a run until it was hit so often, so often inside a save and in so many stages; every end is that of `whole`."""
    rng, hits, stages_seen = random.Random(processes), list[str](), set[int]()
    while len(hits) < kills_wanted or hits.count("inside") < inside or len(stages_seen) < stages:
        hit = kills.start_and_kill(run, processes, rng, inside_save=len(hits) % 3 == 0, job=job)
        checkpoint, _ = newest(run / "checkpoints")
        if checkpoint is not None:
            stages_seen.add(read_json(checkpoint / "progress.json").get("guard", {}).get("stage", 0))
        if hit != "ended":
            hits.append(hit)
        else:  # it came to its end before it was hit: that end counts too, then anew
            kills.same_end(whole, run)
            shutil.rmtree(run)
    done = launch(*job.arguments(run), processes=processes)
    assert done.status == 0, done.all
    kills.same_end(whole, run)
    inside_saves = hits.count("inside")
    print(
        f"{job.script}, {processes} process(es): {len(hits)} kills, {inside_saves} inside a save, stages {sorted(stages_seen)}"
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills(whole: Path, tmp_path: Path, processes: int) -> None:
    kill_often(kills.PIXELS, whole, tmp_path / "run", processes, kills_wanted=20, inside=5)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("job", [kills.GUIDED, kills.CLASSIFIER], ids=["second_moment", "classifier"])
def test_kills_of_what_guides_and_is_guided(tmp_path: Path, job: kills.Job, processes: int) -> None:
    assert launch(*job.arguments(tmp_path / "whole")).status == 0
    kill_often(job, tmp_path / "whole", tmp_path / "run", processes, kills_wanted=8, inside=2)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("job", [kills.AUTOENCODER, kills.CODEBOOK], ids=["adversarial", "codebook"])
def test_kills_across_the_stages_of_an_autoencoder(tmp_path: Path, job: kills.Job, processes: int) -> None:
    """With discriminator, adaptive weight, perceptual loss, and a codebook in one of the two."""
    assert launch(*job.arguments(tmp_path / "whole")).status == 0
    kill_often(job, tmp_path / "whole", tmp_path / "run", processes, kills_wanted=10, inside=3, stages=3)


@pytest.mark.parametrize("processes", [1, 2])
def test_kills_while_latents_are_encoded(vae_run: Path, tmp_path: Path, processes: int) -> None:
    rng, runs = random.Random(processes), []
    for name in ("whole", "killed"):
        cache, run = tmp_path / name / "cache", tmp_path / name / "run"
        sets = kills.settings(autoencoder=str(vae_run), latents=str(cache), data__count=6000, steps=10, preview__every=10)
        job = kills.Job("train_ldm.py", "configs/smoke/ldm.json", sets)
        hits = 0
        while name == "killed" and hits < 6 and not cache.exists():
            process = subprocess.Popen(
                command(processes, *job.arguments(run)), cwd=ROOT, env=environment(processes), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            block_count = len(list(cache.with_name("cache.partial").rglob("*.json")))
            while process.poll() is None and len(list(cache.with_name("cache.partial").rglob("*.json"))) <= block_count:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            hits += process.poll() is None
            kills.kill_all(process)
        assert name == "whole" or hits >= 3
        done = launch(*job.arguments(run), processes=processes)
        assert done.status == 0, done.all
        runs.append(run)
    kills.same_end(*runs)
    blocks = sorted((tmp_path / "whole" / "cache").rglob("*.npy"))
    assert len(blocks) > 20
    for path in blocks:
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_one_two_and_three_processes_agree_in_float64(tmp_path: Path) -> None:
    exact = ["--set", "dtype=float64", "--set", "model.dropout=0.0", "--set", "batch_size=12", "--set", "steps=30"]
    exact += ["--set", "checkpoint.every=30"]
    weights = []
    for processes, micro in ((1, 12), (1, 4), (2, 6), (2, 3), (3, 4), (3, 2)):
        run = tmp_path / f"{processes}_{micro}"
        sizes = ["--set", f"micro_batch_size={micro}"]
        done = launch("ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", run, *exact, *sizes, processes=processes)
        assert done.status == 0 and f"= {processes} x cpu x {12 // processes // micro} x {micro}\n" in done.out, done.all
        weights.append(load_file(run / "checkpoints" / "step_00000030" / "model.safetensors"))
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9)


def test_three_processes_go_on_to_the_bit(tmp_path: Path) -> None:
    """From three on, DDP would order its sums anew after its first backward."""
    weights = []
    for stops in ([24], [12, 24]):
        run = tmp_path / str(len(stops))
        for steps in stops:
            done = launch(
                "ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", run, "--set", "batch_size=12", "--set", "micro_batch_size=4",
                "--set", f"steps={steps}", "--set", 'optimizer.schedule={"kind": "constant"}', processes=3,
            )  # fmt: skip
            assert done.status == 0 and "= 3 x cpu x 1 x 4" in done.out, done.all
        weights.append(load_file(run / "checkpoints" / "step_00000024" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("processes", [1, 2])
def test_kills_of_latent_diffusion(vae_run: Path, tmp_path: Path, processes: int) -> None:
    named = kills.settings(autoencoder=str(vae_run), latents=str(tmp_path / "cache"))
    job = kills.Job(kills.LATENTS.script, kills.LATENTS.config, (*kills.LATENTS.extra, *named))
    assert launch(*job.arguments(tmp_path / "whole")).status == 0
    kill_often(job, tmp_path / "whole", tmp_path / "run", processes, kills_wanted=8, inside=2)


def check_inversion(run: Path, tmp_path: Path) -> None:
    """Digits that the run has not seen go to their noise in 64 calls of rk4 and back within 1 %, and the noise is noise.

    Its correlation with the image is below what white noise can have with data of covariance C (Gelbrich 1990; the shortest
    way, C^(-1/2) x of a Gaussian, has it): tr C^(1/2) / sqrt(d tr C).
    """
    digits = open_sources(DigitsSource(source="digits", split="test"))
    (tmp_path / "digits").mkdir(exist_ok=True)
    for i in range(100):
        Image.fromarray(np.asarray(digits.parts[0].load(i, channels=1))[:, :, 0]).save(tmp_path / "digits" / f"{i:02d}.png")
    out = tmp_path / f"{run.name}_inverted"
    words = ("--invert", tmp_path / "digits", "--solver", "rk4", "--steps", "16", "--out", out)
    assert launch("sample.py", run, *words, timeout=600).status == 0
    averages = read_json(out / "inversion.json")["mean"]
    print(run.name, averages)
    assert read_json(out / "metadata.json")["network_calls"] <= 64 and averages["rms"] < 0.01 and 0.9 < averages["std"] < 1.1

    encoded = encode_images(open_trained(run, torch.device("cpu")), files_of(str(tmp_path / "digits"))).flatten(1).double()
    spectrum = torch.linalg.eigvalsh(torch.cov(encoded.T)).clamp(min=0)
    most = float(spectrum.sqrt().sum() / (len(spectrum) * spectrum.sum()).sqrt())
    assert averages["correlation"] < most < 0.6


def test_digits_of_the_pixel_demo_go_to_their_noise_and_back(tmp_path: Path) -> None:
    done = launch("ddpm_accelerate.py", "-cfg", "configs/digits_ddpm.json", "--run-dir", tmp_path / "pixels", timeout=1200)
    assert done.status == 0, done.all
    check_inversion(tmp_path / "pixels", tmp_path)


def test_the_demos_digits_are_read_by_a_classifier_and_go_to_their_noise_and_back(tmp_path: Path) -> None:
    """An SVC fitted on scikit-learn's digits reads at least 90 % of what the demo draws as its label."""
    quick = ["--set", "log.trackers=[]"]
    for script, config, run, arguments in (
        ("train_vae.py", "digits_vae", "vae", quick),
        ("train_ldm.py", "digits_ldm", "ldm", [*quick, "--set", f"autoencoder={tmp_path / 'vae'}"]),
    ):
        done = launch(script, "-cfg", f"configs/{config}.json", "--run-dir", tmp_path / run, *arguments, timeout=1200)
        assert done.status == 0, done.all
    assert metrics(tmp_path / "vae")[-1]["held_out_psnr"] > 26
    done = launch(
        "sample.py", tmp_path / "ldm", "--classes", "0/1/2/3/4/5/6/7/8/9", "--num-samples", "100", "--batch-size", "100",
        "--steps", "25", "--guidance", "2", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.status == 0, done.all
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits = load_digits()
    reader = SVC(gamma=0.001).fit(digits.data, digits.target)
    images = [Image.open(tmp_path / "out" / f"{i:05d}.png").resize((8, 8), Image.Resampling.BOX) for i in range(100)]
    read = reader.predict(np.stack([np.asarray(image).flatten() / 255 * 16 for image in images]))
    assert (read == np.repeat(np.arange(10), 10)).mean() >= 0.9
    check_inversion(tmp_path / "ldm", tmp_path)


def test_compiled_networks_train_as_plain_ones(tmp_path: Path) -> None:
    """Of diffusion and of a classifier, from the same start: the losses agree to rounding."""
    for script, config in (("ddpm_accelerate.py", SMOKE), ("train_classifier.py", "configs/smoke/classifier.json")):
        dropout = "model.dropout=0.0" if script.startswith("ddpm") else "classifier.dropout=0.0"
        losses = []
        for compiled in ("false", "true"):
            run = tmp_path / script / compiled
            words = ("--set", f"compile={compiled}", "--set", dropout, "--set", "steps=10")
            done = launch(script, "-cfg", config, "--run-dir", run, *words, timeout=1200)
            assert done.status == 0, done.all
            losses.append([line["loss"] for line in metrics(run)])
        assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("job", [kills.BLEND, kills.POINTS], ids=["images", "points"])
def test_kills_of_blending(tmp_path: Path, job: kills.Job, processes: int) -> None:
    assert launch(*job.arguments(tmp_path / "whole")).status == 0
    kill_often(job, tmp_path / "whole", tmp_path / "run", processes, kills_wanted=8, inside=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_kills_while_pairs_are_made_and_learned(tmp_path: Path, processes: int) -> None:
    """Blocks of pairs are whole or absent, and those that are there are kept."""
    assert launch(*kills.POINTS.arguments(tmp_path / "first")).status == 0
    rng, runs, pair_files = random.Random(processes), [], []
    for name in ("whole", "killed"):
        first = tmp_path / name / "first"
        shutil.copytree(tmp_path / "first", first)
        pairs = {"run": str(first), "count": 8000, "batch_size": 32, "sampler": {"solver": "rk4", "steps": 64}}
        job = kills.Job(kills.POINTS.script, kills.POINTS.config, (*kills.POINTS.extra, *kills.settings(pairs=pairs)))
        run, hits = tmp_path / name / "run", 0
        while name == "killed" and hits < 5 and not any(first.glob("pairs/*/manifest.json")):
            before = len(list(first.glob("pairs/*.partial/pairs/*.json")))
            process = subprocess.Popen(
                command(processes, *job.arguments(run)), cwd=ROOT, env=environment(processes), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            while process.poll() is None and len(list(first.glob("pairs/*.partial/pairs/*.json"))) <= before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            hits += process.poll() is None
            kills.kill_all(process)
        assert name == "whole" or hits >= 3
        if name == "killed":
            hit = [kills.start_and_kill(run, processes, rng, inside_save=i % 2 == 0, job=job) for i in range(4)]
            assert hit.count("ended") < 3
        done = launch(*job.arguments(run), processes=processes)
        assert done.status == 0, done.all
        runs.append(run)
        pair_files.append({path.name: path.read_bytes() for path in first.glob("pairs/*/pairs/*")})
    assert len(pair_files[0]) == 2 * 32 and pair_files[0] == pair_files[1]
    kills.same_end(*runs)


def test_points_of_the_demo_are_as_near_as_draws_of_the_density(tmp_path: Path) -> None:
    done = launch("train_iadb.py", "-cfg", "configs/points2d_iadb.json", "--run-dir", tmp_path / "run", timeout=1200)
    assert done.status == 0, done.all
    board, rng, count = draw_points(CheckerboardSource(source="checkerboard")).points, np.random.default_rng(0), 4000

    def density_sample() -> np.ndarray:
        return rng.choice(board, count, replace=False)

    with np.load(tmp_path / "run" / "points" / "points.npz") as archive:
        data = archive["data"][:count]
    assert sliced_wasserstein(data, density_sample()) <= max(
        sliced_wasserstein(density_sample(), density_sample()) for _ in range(20)
    )


def test_one_of_two_nodes_is_killed(tmp_path: Path) -> None:
    """Two agents with two processes each, on the loopback; the second is killed with all below it. The first ends within its
    limit and names the ranks that are gone; both started again go on to the end of a run that was never killed."""
    job = kills.PIXELS
    done = launch(*job.arguments(tmp_path / "whole", "--set", "micro_batch_size=4"), processes=4)
    assert done.status == 0, done.all

    def node(rank: int, port: int, run: Path) -> subprocess.Popen:
        words = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "2"]
        words += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        arguments = ("--set", "micro_batch_size=4", "--set", "timeout_minutes=0.5")
        return subprocess.Popen(
            [sys.executable, *words, *job.arguments(run, *arguments)], cwd=ROOT, env=environment(2), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def port() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    at, run = port(), tmp_path / "run"
    nodes = [node(rank, at, run) for rank in (0, 1)]
    while "step 20/" not in ((run / "log.txt").read_text() if (run / "log.txt").exists() else ""):
        assert nodes[0].poll() is None and nodes[1].poll() is None
        time.sleep(0.05)
    kills.kill_all(nodes[1])
    nodes[1].communicate()
    began = time.monotonic()
    _, output = nodes[0].communicate(timeout=120)
    assert nodes[0].returncode != 0 and time.monotonic() - began < 60
    assert re.search("error on rank [01]: ranks 2 and 3 of 4 no longer answer", output), output
    at = port()
    nodes = [node(rank, at, run) for rank in (0, 1)]
    for one in nodes:
        _, output = one.communicate(timeout=300)
        assert one.returncode == 0, output
    assert "going on at step" in (run / "log.txt").read_text()
    kills.same_end(tmp_path / "whole", run)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train_ldm.py", ["-cfg", "configs/smoke/ldm.json"]),
        ("train_iadb.py", ["-cfg", "configs/smoke/iadb.json"]),
        ("train_iadb.py", ["-cfg", "configs/points2d_iadb.json", "--set", "batch_size=64"]),
        ("train_classifier.py", ["-cfg", "configs/smoke/classifier.json"]),
    ],
    ids=["latents", "blending", "points", "classifier"],
)
def test_every_script_verifies_that_it_resumes_and_says_what_it_costs(
    script: str, words: list[str], vae_run: Path, tmp_path: Path
) -> None:
    arguments = ["--set", f"autoencoder={vae_run}"] if script == "train_ldm.py" else []
    for processes in (1, 2):
        done = launch(script, *words, *arguments, "--run-dir", tmp_path / "x", "--verify-resume", processes=processes)
        assert done.status == 0 and "step 2 both ways" in done.out and "bit-equal" in done.out, done.all
    done = launch(script, *words, *arguments, "--run-dir", tmp_path / "x", "--dry-run")
    assert done.status == 0 and "images/s" in done.out and "disk" in done.out, done.all
    assert not list(tmp_path.iterdir())
