"""The two training scripts of the latent pipeline, launched: on one process and on two, killed, moved, misused."""

import json
import random
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_vae as train_vae_module
from src.config import load, read_json
from src.runs.autoencoder import open_autoencoder
from src.runs.opened import open_trained
from src.sampling import SamplerConfig, build_sampler
from src.training.entry import train_here
from tests import kills
from tests.conftest import ROOT, Finished, launch, metrics, one_line, refused, run_in_process
from tests.in_turn import launch_in_turn
from tests.kills import settings

VAE, LDM = "configs/smoke/vae.json", "configs/smoke/ldm.json"


def train(*words: str | Path, processes: int) -> Finished:
    return run_in_process(*words) if processes == 1 else launch(*words, processes=processes)


def vae_words(run: Path, *arguments: str, **sets: object) -> tuple[str | Path, ...]:
    return ("train_vae.py", "-cfg", VAE, "--run-dir", run, *arguments, *settings(**sets))


def train_vae(run: Path, *arguments: str, processes: int = 1, **sets: object) -> Finished:
    return train(*vae_words(run, *arguments, **sets), processes=processes)


def ldm_words(run: Path, autoencoder: Path | str, *arguments: str, **sets: object) -> tuple[str | Path, ...]:
    return ("train_ldm.py", "-cfg", LDM, "--run-dir", run, *settings(autoencoder=str(autoencoder), **sets), *arguments)


def train_ldm(run: Path, autoencoder: Path | str, *arguments: str, **sets: object) -> Finished:
    return run_in_process(*ldm_words(run, autoencoder, *arguments, **sets))


def refuse_ldm(run: Path, **sets: object) -> str:
    return refused("train_ldm", "-cfg", LDM, "--run-dir", run, *settings(**sets))


def ended(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


ADVERSARIAL = {"weight": 0.2}
STAGES = [
    {"steps": 3, "adversarial": ADVERSARIAL},
    {"steps": 3, "adversarial": ADVERSARIAL | {"adaptive": True}, "perceptual": {"weight": 0.5}, "tanh": True}
    | {"equivariance": {"probability": 0.9}, "alignment": {"adaptive": True}},
]
EXACT = {"dtype": "float64", "stages": STAGES, "checkpoint__every": 1, "checkpoint__keep": 9, "preview__num_measured": 4}
EXACT |= {"teacher__network": "random"}


@pytest.fixture(scope="module")
def on_two(vae_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Finished]]:
    """What these tests run on two processes, in one launch: the folder that it is in, and how each ended."""
    folder = tmp_path_factory.mktemp("on_two")
    shutil.copytree(vae_run, folder / "copy", ignore=shutil.ignore_patterns("latents"))
    words = {
        "vae": vae_words(folder / "vae"),
        "2": vae_words(folder / "2", micro_batch_size=4, **EXACT),
        "parts of two": vae_words(folder / "parts of two", micro_batch_size=8, **EXACT),
        "ldm": ldm_words(folder / "ldm", vae_run, latents=str(folder / "cache")),
        "latents": ("prepare_data.py", "latents", folder / "copy"),
    }
    return folder, dict(zip(words, launch_in_turn(folder / "words", *words.values()), strict=True))


# ---------------------------------------------------------------------------------------------- the autoencoder


def test_an_autoencoder_goes_through_its_stages(vae_run: Path) -> None:
    inside = {path.name for path in (vae_run / "checkpoints" / "step_00000030").iterdir()}
    tensors = {f"{name}.safetensors" for name in ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer")}
    assert inside == tensors | {"progress.json", "config.json", "data.json", "MANIFEST.json"}
    assert {path.name for path in (vae_run / "samples").iterdir()} == {
        f"step_{step:08d}.png" for step in (5, 10, 15, 18, 20, 25, 26, 30)
    }, "every five steps and at the end of each stage"
    lines = metrics(vae_run)
    by_step = {line["step"]: line for line in lines}
    assert "adversarial" not in by_step[6] and by_step[8]["discriminator"] > 0, "the adversary starts late"
    assert "adaptive_weight" not in by_step[8] and by_step[14]["adaptive_weight"] > 0
    assert "perceptual" not in by_step[18] and by_step[20]["perceptual"] > 0 and "mse" in by_step[30]
    assert (
        by_step[30]["held_out_psnr"] > by_step[5]["held_out_psnr"] + 2
        and by_step[30]["held_out_l1"] < by_step[5]["held_out_l1"]
    )
    for name in ("ssim", "lpips", "colour_drift", "latent_mean_3", "latent_std_0"):
        assert f"held_out_{name}" in by_step[30]
    assert by_step[10]["lr"] < 1e-6 < by_step[12]["lr"], "the schedule starts anew in each stage"
    log = (vae_run / "log.txt").read_text()
    assert "stage 4 of 4: steps 26 to 30, 24 px, mse + 0.0001 KL + 0.5 perceptual + 0.1 adversarial from step 26, tanh" in log
    assert read_json(vae_run / "final" / "progress.json") == {"step": 30, "tanh": True}
    assert read_json(vae_run / "checkpoints" / "step_00000025" / "progress.json")["guard"]["stage"] == 3


def test_an_autoencoder_on_one_process_and_two_is_equal_to_the_bit(
    vae_run: Path, on_two: tuple[Path, dict[str, Finished]]
) -> None:
    folder, finished = on_two
    assert finished["vae"].status == 0 and "= 2 x cpu x 1 x 8\n" in finished["vae"].out, finished["vae"].all
    kills.same_end(vae_run, folder / "vae")


def test_gradients_of_both_networks_are_those_of_the_whole_batch(on_two: tuple[Path, dict[str, Finished]]) -> None:
    """Adam's moments after the first steps are the gradients, with a fixed weight and with an adaptive one, with transformed
    latents and aligned ones."""
    folder, finished = on_two
    splits = {"1": (1, 16), "2": (2, 4), "parts of one": (1, 8), "parts of two": (2, 8)}
    for name, (processes, micro) in splits.items():
        done = finished[name] if processes == 2 else train_vae(folder / name, micro_batch_size=micro, **EXACT)
        assert done.status == 0 and f"= {processes} x cpu x {16 // processes // micro} x {micro}\n" in done.out, done.all
    kills.same_end(folder / "parts of one", folder / "parts of two")
    last = metrics(folder / "1")[-1]
    assert last["equivariance"] > 0 and 0 < last["alignment"] < 3 and last["alignment_weight"] > 0
    assert "projection.safetensors" not in {path.name for path in (folder / "1" / "final").iterdir()}
    for step in range(1, 7):
        names = ["optimizer", "discriminator_optimizer", "model", "discriminator", "projection"]
        for name in names + ["projection_optimizer"] * (step > 3):
            one, two = (ended(folder / processes, step, name) for processes in "12")
            assert one.keys() == two.keys() and (len(one) > 10 or name.startswith("projection"))
            for key, value in one.items():
                assert value.dtype == torch.float64 or key.endswith("/step")
                torch.testing.assert_close(two[key], value, rtol=0, atol=1e-9, msg=f"{step} {name} {key}")
    weights = [read_json(folder / run / "checkpoints/step_00000006/progress.json")["adaptive_weight"] for run in "12"]
    assert weights[0] > 0 and weights[1] == pytest.approx(weights[0], rel=1e-9)


@pytest.mark.soak
def test_a_codebook_in_bf16_is_killed_and_resumed_on_two(tmp_path: Path) -> None:
    sets = {"model__bottleneck": {"kind": "vq", "codes": 24}, "mixed_precision": "bf16", "checkpoint__every": 4}
    stages = [{"steps": 8}, {"steps": 6, "adversarial": {"weight": 0.1, "adaptive": True}, "tanh": True}]
    whole = train_vae(tmp_path / "whole", stages=stages, **sets)
    assert whole.status == 0, whole.all
    last = metrics(tmp_path / "whole")[-1]
    assert 1 < last["code_perplexity"] <= 24 and 0 < last["codes_used"] <= 1 and last["commitment"] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in ("step_00000012", "step_00000014"):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / path)
    shutil.rmtree(tmp_path / "again" / "final")
    done = train_vae(tmp_path / "again", stages=stages, processes=2, **sets)
    assert done.status == 0 and "going on at step 8 of 14" in done.out and "= 2 x cpu x 1 x 8" in done.out, done.all
    kills.same_end(tmp_path / "whole", tmp_path / "again")
    assert (ended(tmp_path / "whole", 14)["codebook.size"] > 0).all(), "dead codes were revived"


@pytest.mark.soak
def test_an_autoencoder_is_killed_and_resumed_on_two(tmp_path: Path) -> None:
    rng, whole, run = random.Random(0), tmp_path / "whole", tmp_path / "run"
    done = launch(*kills.AUTOENCODER.arguments(whole))
    assert done.status == 0, done.all
    assert kills.start_and_kill(run, 2, rng, inside_save=False, job=kills.AUTOENCODER) != "ended"
    done = launch(*kills.AUTOENCODER.arguments(run), processes=2)
    assert done.status == 0, done.all
    kills.same_end(whole, run)


@pytest.mark.soak
def test_the_guard_goes_back_and_recovers_from_a_destroying_discriminator(tmp_path: Path) -> None:
    late = {"weight": 3000.0, "start_step": 9}  # the previews before it are what it is held against
    stages = [{"steps": 20}, {"steps": 32, "adversarial": late, "tanh": True, "lr": 5e-3}]
    guard = {"worse_factor": 1.3, "rollback": True, "shrink": 1e-6, "max_rollbacks": 2}
    sets = {"stages": stages, "preview__every": 4, "checkpoint__every": 50, "optimizer__schedule": {"kind": "constant"}}
    without_rollback = train_vae(tmp_path / "alone", guard={**guard, "rollback": False}, **sets)
    assert (
        without_rollback.status == 0
        and "the adversary is too strong; lower its weight, or set guard.rollback" in without_rollback.out
    ), without_rollback.all
    done = train_vae(tmp_path / "run", guard=guard, **sets)
    assert done.status == 0 and "going back to step 28, with 1e-06 times the adversary's weight" in done.out, done.all
    assert "going on at step 28 of 52" in done.out
    progress = read_json(tmp_path / "run" / "checkpoints" / "step_00000052" / "progress.json")
    assert progress["guard"]["rollbacks"] == 1
    before, spoilt, recovered = (
        next(line["held_out_l1"] for line in metrics(tmp_path / run) if line["step"] == step)
        for run, step in (("run", 28), ("alone", 52), ("run", 52))
    )
    assert spoilt > 1.3 * before and recovered < 1.1 * before
    assert [line["step"] for line in metrics(tmp_path / "run")] == sorted({line["step"] for line in metrics(tmp_path / "run")})


@pytest.mark.parametrize(
    ("stages", "previews", "dip", "back_to"),
    [
        # a dip of the second stage, before and while its adversary trains: back to the last checkpoint before that
        ([{"steps": 2}, {"steps": 8, "adversarial": {"weight": 0.1, "start_step": 4}}], 2, {0: 0.1, 4: 0.3, 6: 0.3, 8: 1.0}, 6),
        # a dip of the first stage that no preview sees before its adversary begins: of the checkpoints, which are rotated
        ([{"steps": 8, "adversarial": {"weight": 0.1, "start_step": 3}}], 6, {0: 0.05, 6: 0.5}, 3),
        # an adversary from the start of the second stage: back to where that began
        pytest.param(
            *([{"steps": 3}, {"steps": 6, "adversarial": {"weight": 0.1}}], 2, {0: 0.1, 4: 0.5}, 3), marks=pytest.mark.soak
        ),
    ],
)
def test_a_rollback_after_a_dip_at_the_start_of_a_stage(
    stages: list[dict], previews: int, dip: dict[int, float], back_to: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reconstruction is made up, good where it is not said: the dip is seen once, and the run goes on from before it."""
    made_up = dict(dip)

    def reconstruct(*_: object, sheet: Path | None = None, **__: object) -> dict[str, float]:
        step = int(sheet.stem.removeprefix("step_")) if sheet is not None else 0  # the start of an adversarial stage
        return {"l1": made_up.pop(step, 0.05), "colour_drift": 0.0}

    sys.path.insert(0, str(ROOT))
    monkeypatch.setattr("train_vae.reconstruct", reconstruct)
    sets = {"stages": stages, "preview__every": previews, "checkpoint__every": 1, "checkpoint__keep": 1}
    sets |= {"optimizer__muon": {}, "discriminator_optimizer__muon": {}}  # whose state goes back, too
    guard = {"worse_factor": 1.5, "rollback": True, "shrink": 0.1, "max_rollbacks": 2}
    done = train_vae(tmp_path / "run", guard=guard, log__trackers=[], **sets)
    assert done.status == 0 and done.out.count("going back to step") == 1, done.all
    assert f"going back to step {back_to}, with 0.1 times the adversary's weight" in done.out
    assert f"going on at step {back_to} of" in done.out and "no checkpoint of this stage" not in done.out
    assert (tmp_path / "run" / "final" / "ema.safetensors").exists()


def test_more_stages_and_another_runs_weights(vae_run: Path, tmp_path: Path) -> None:
    done = train_vae(tmp_path / "run", init_from=str(vae_run), stages=[{"steps": 2, "perceptual": {"weight": 0.1}}])
    assert done.status == 0 and "perceptual without tanh" in done.out, done.all
    assert read_json(tmp_path / "run" / "final" / "progress.json")["tanh"] is True, "it stays on"
    assert metrics(tmp_path / "run")[-1]["held_out_l1"] < 1.2 * metrics(vae_run)[-1]["held_out_l1"]
    stages = [{"steps": 2, "micro_batch_size": 4, "perceptual": {"weight": 0.1}}, {"steps": 3}]
    done = train_vae(tmp_path / "run", init_from=str(vae_run), stages=stages)
    assert done.status == 0 and "going on at step 2 of 5" in done.out
    assert "changed since the checkpoint: stages.0.micro_batch_size, stages\n" in done.out
    assert "/nowhere does not exist" in one_line(train_vae(tmp_path / "new", init_from="/nowhere"))
    message = one_line(train_vae(tmp_path / "run", init_from=str(vae_run), stages=[{"steps": 4}]))
    assert "was started with another stages.0.perceptual, stages.0.steps, stages;" in message


def test_the_legacy_pair_trains_goes_on_and_says_what_it_leaves(tmp_path: Path) -> None:
    model = {"widths": [8, 16], "downsample": "conv", "upsample": "transposed", "attention": ["none", "none"]}
    sets = settings(model=model, stages=[{"steps": 3}], init_from=None)
    done = run_in_process("train_vae.py", "-cfg", VAE, "--run-dir", tmp_path / "run", *sets)
    assert done.status == 0, done.all
    assert done.out.count("warning: ") == 1 and "checkerboards in images or gradients (Odena et al. 2016" in done.out
    network = open_autoencoder(str(tmp_path / "run"), torch.device("cpu")).network
    assert (network.spec.downsample, network.spec.upsample) == ("conv", "transposed")
    cfg = load(VAE, train_vae_module.Config, [f"model={json.dumps(model)}", 'stages=[{"steps": 3}]', "checkpoint.every=2"])
    assert train_here(train_vae_module.train, cfg, tmp_path / "cut", stop_at=2) == 0
    assert train_here(train_vae_module.train, cfg, tmp_path / "cut") == 0
    assert "going on at step 2 of 3" in (tmp_path / "cut" / "log.txt").read_text()
    one, other = ((tmp_path / name / "final" / "ema.safetensors").read_bytes() for name in ("run", "cut"))
    assert one == other, "it goes on to the bit"


def test_a_dry_run_measures_every_stage(tmp_path: Path) -> None:
    done = train_vae(tmp_path / "run", "--dry-run")
    assert done.status == 0, done.all
    for word in ("stage 1 of 4 10 of 16", "stage 4 of 4 4 of 8", "images/s", "time"):
        assert word in done.out, done.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"image__size": 15}, "stages.0: images of 15 px cannot be reduced 2 times; use 14 px or 16 px"),
        ({"discriminator__layers": 4}, "stages.0: images of 16 px leave the discriminator no patch; use 48 px"),
        (
            {"stages": [{"steps": 10, "adversarial": {"start_step": 10}}]},
            "stages.0.adversarial.start_step is 10 and the stage has 10 steps",
        ),
        ({"stages": []}, "stages: "),
        (
            {"model__bottleneck": {"kind": "vq", "codes": 9000}},
            "9000 codes are more than the 7296 latent vectors of 114 images",
        ),
        ({"perceptual__network": "vgg"}, "perceptual.network 'vgg' needs ImageNet weights that are not at"),
        ({"name": "mine"}, "perceptual.network: 'random' is for smoke tests"),
        ({"mixed_precision": "fp16"}, "mixed_precision fp16 (or bf16 on a GPU that has none) is not for two optimisers"),
        ({"stages": [{"steps": 4, "batch_size": 6, "micro_batch_size": 4}]}, "stages.0: batch_size 6 is not a multiple"),
        ({"model__norm_groups": 3}, "norm_groups 3 does not divide a width of 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_autoencoder_that_cannot_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: dict, message: str
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is fetched
    assert message in refused("train_vae", "-cfg", VAE, "--run-dir", tmp_path / "run", *settings(**sets))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_lpips_weights_and_a_size_that_lpips_cannot_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from src.models.pretrained import import_torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is fetched
    arguments = ["train_vae.py", "-cfg", VAE, "--run-dir", tmp_path / "run", *settings(perceptual__network="alex")]
    message = one_line(run_in_process(*arguments))
    assert (
        f"needs ImageNet weights that are not at {tmp_path}/hub/checkpoints/alexnet" in message
        and "or use efficientnet_lite0" in message
    )
    weights = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    weights.parent.mkdir(parents=True)
    with torch.device("meta"):
        shapes = import_torchvision().models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{name}": torch.randn(value.shape) for name, value in shapes.items()}, weights)
    message = one_line(run_in_process(*arguments))
    assert "perceptual.network 'alex' cannot take images of 16 px" in message and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- diffusion on its latents


def test_a_latent_run_leaves_all_that_sampling_needs(vae_run: Path, ldm_run: Path) -> None:
    final = {path.name for path in (ldm_run / "final").iterdir()}
    files_of_the_run = {"ema.safetensors", "config.json", "data.json", "progress.json", "MANIFEST.json"}
    assert final == files_of_the_run | {"autoencoder.safetensors", "autoencoder_config.json"}
    names = {path.name for path in (ldm_run / "samples" / "step_00000030").iterdir()}
    assert names == {f"sample_{name}_2x2.png" for name in ("circle", "cross", "square", "triangle")}
    assert {"contact_sheet.png", "original.png", "noised.png", "beta_alpha_hat.png", "loss.png"} <= {
        path.name for path in ldm_run.iterdir()
    }
    lines = metrics(ldm_run)
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"] and "held_out_loss" in lines[-1]
    latents = read_json(ldm_run / "data.json")["latents"]
    assert latents["shape"] == [4, 8, 8] and len(latents["mean"]) == 4
    digest = read_json(vae_run / "final" / "MANIFEST.json")["files"]["ema.safetensors"]["sha256"]
    assert latents["autoencoder"] == digest


def test_latents_are_normalised_over_the_training_set(vae_run: Path, ldm_run: Path) -> None:
    """Mean 0 and standard deviation 1 per channel over all images, their mirror images and the posterior's noise."""
    facts = read_json(ldm_run / "data.json")["latents"]
    cache = next(path for path in (vae_run / "latents").iterdir() if path.is_dir())
    moments = np.concatenate([np.load(path) for path in sorted((cache / "train").glob("*.npy"))])
    assert moments.shape == (114, 2, 2, 4, 8, 8), "image and mirror image, mean and log-variance"
    noise = np.random.default_rng(0).standard_normal((20, 114, 2, 4, 8, 8))
    z = moments[:, :, 0] + np.exp(moments[:, :, 1] / 2) * noise
    z = (z - np.reshape(facts["mean"], (4, 1, 1))) / np.reshape(facts["std"], (4, 1, 1))
    np.testing.assert_allclose(z.mean((0, 1, 2, 4, 5)), 0, atol=5e-3)
    np.testing.assert_allclose(z.std((0, 1, 2, 4, 5)), 1, atol=5e-3)


def test_latent_diffusion_on_one_process_and_two_is_equal_to_the_bit(
    vae_run: Path, ldm_run: Path, on_two: tuple[Path, dict[str, Finished]]
) -> None:
    folder, finished = on_two
    assert finished["ldm"].status == 0 and "= 2 x cpu x 1 x 8\n" in finished["ldm"].out, finished["ldm"].all
    kills.same_end(ldm_run, folder / "ldm")
    one = next(path for path in (vae_run / "latents").iterdir() if path.is_dir())
    for path in sorted(one.rglob("*.npy")):
        assert path.read_bytes() == (folder / "cache" / path.relative_to(one)).read_bytes(), path


def test_latent_diffusion_goes_on_to_the_bit(vae_run: Path, ldm_run: Path, tmp_path: Path) -> None:
    shutil.copytree(ldm_run, tmp_path / "run")
    for path in ("step_00000020", "step_00000030"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / path)
    shutil.rmtree(tmp_path / "run" / "final")
    done = train_ldm(tmp_path / "run", vae_run)
    assert done.status == 0 and "going on at step 10 of 30" in done.out, done.all
    kills.same_end(ldm_run, tmp_path / "run")
    assert "is finished (30 steps)" in train_ldm(tmp_path / "run", vae_run).out


def test_final_moves_without_the_autoencoders_run(ldm_run: Path, vae_run: Path, tmp_path: Path) -> None:
    arguments = ["--num-samples", "6", "--batch-size", "4", "--steps", "4", "--guidance", "2", "--eta", "0.8", "--frames"]
    stays = run_in_process("sample.py", ldm_run, *arguments, "--classes", "cross/circle", "--out", tmp_path / "here")
    assert stays.status == 0, stays.all
    shutil.copytree(ldm_run / "final", tmp_path / "elsewhere")
    moved = vae_run.rename(vae_run.with_name("gone"))
    try:
        done = run_in_process(
            "sample.py", tmp_path / "elsewhere", *arguments, "--classes", "cross/circle", "--out", tmp_path / "there"
        )
        early = run_in_process(
            "sample.py", ldm_run / "checkpoints" / "step_00000010", "--num-samples", "1", "--out", tmp_path / "early"
        )
    finally:
        moved.rename(vae_run)
    assert done.status == early.status == 0, done.all + early.all
    for i in range(6):
        assert (tmp_path / "here" / f"{i:05d}.png").read_bytes() == (tmp_path / "there" / f"{i:05d}.png").read_bytes()
    with Image.open(tmp_path / "there" / "denoising.gif") as gif, Image.open(tmp_path / "there" / "00000.png") as image:
        assert getattr(gif, "n_frames", 1) == 5 and image.size == (16, 16)


def test_latents_of_the_size_of_a_later_stage(vae_run: Path, tmp_path: Path) -> None:
    """As wikiart512_ldm on wikiart256_vae: the autoencoder's first stage is smaller than the diffusion's images."""
    sets = settings(autoencoder=str(vae_run), latents=str(tmp_path / "latents"), steps=2, image__size=24)
    done = run_in_process("train_ldm.py", "-cfg", LDM, "--run-dir", tmp_path / "run", *sets)
    assert done.status == 0, done.all
    assert read_json(tmp_path / "run" / "final" / "data.json")["latents"]["shape"] == [4, 12, 12]
    opened = open_trained(tmp_path / "run", torch.device("cpu"))
    images = build_sampler(opened, SamplerConfig(solver="ddim", steps=2)).draw(0, range(2), [0, 1], device=torch.device("cpu"))
    assert opened.image.size == 24 and images.shape == (2, 3, 24, 24)
    message = refused("train_ldm", "-cfg", LDM, "--run-dir", tmp_path / "no", *sets, "--set", "image.size=32")
    assert "was trained at 16 px and 24 px, and images are 32 px; set image.size" in message


def test_the_main_job_leaves_as_one_folder(vae_run: Path, ldm_run: Path, tmp_path: Path) -> None:
    """A run of train_ldm.py and of train_vae.py, and checkpoints of theirs; what has linear attention and tanh is no run that
    diffusers can have, and says where to go instead."""

    def draw_images(run: Path) -> torch.Tensor:
        opened = open_trained(run, torch.device("cpu"))
        return build_sampler(opened, SamplerConfig(solver="ddim", steps=4)).draw(
            1, range(3), [0, 1, 2], device=torch.device("cpu")
        )

    for name, run in (("run", ldm_run), ("checkpoint", ldm_run / "checkpoints" / "step_00000020")):
        done = run_in_process("convert.py", "safetensors", run, "--out", tmp_path / name)
        assert done.status == 0 and "README.md" in done.out, done.all
        assert torch.equal(draw_images(tmp_path / name), draw_images(run))
    card = (tmp_path / "run" / "README.md").read_text()
    for line in (
        "0 circle (",
        "| 3 |",
        "v on the cosine schedule",
        "python sample.py run --num-samples 16",
        "it ends with tanh",
    ):
        assert line in card, line
    message = refused("convert", "to-diffusers", ldm_run, "--out", tmp_path / "no")
    assert "model.attention linear" in message and "it ends with tanh" in message and "convert.py safetensors" in message
    for name, run in (("vae", vae_run), ("vae_checkpoint", vae_run / "checkpoints" / "step_00000025")):
        assert run_in_process("convert.py", "safetensors", run, "--out", tmp_path / name).status == 0
        one, other = (open_autoencoder(str(path), torch.device("cpu")) for path in (run, tmp_path / name))
        assert (one.digest, one.sizes, one.network.tanh) == (other.digest, other.sizes, other.network.tanh)
        z = torch.randn(2, 4, 8, 8)
        assert torch.equal(one.network.decode(z), other.network.decode(z))
    assert "it ends with tanh" in refused("convert", "to-diffusers", vae_run, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_latents_are_made_ahead_and_found(on_two: tuple[Path, dict[str, Finished]], tmp_path: Path) -> None:
    done, vae = on_two[1]["latents"], on_two[0] / "copy"
    assert done.status == 0 and "latents of 114 images, 4x8x8" in done.out, done.all
    (cache_folder,) = (path for path in (vae / "latents").iterdir() if path.is_dir())
    stamp = (cache_folder / "manifest.json").stat().st_mtime_ns
    done = train_ldm(tmp_path / "run", vae, steps=2)
    assert done.status == 0 and (cache_folder / "manifest.json").stat().st_mtime_ns == stamp, done.all
    large = ("prepare_data.py", "latents", vae, "--size", "24", "--out", tmp_path / "large")
    full = one_line(launch(*large, limit=(resource.RLIMIT_FSIZE, 60_000)))
    assert full.startswith("error: the disk is full (") and full.endswith("make room and run it again")
    done = run_in_process(*large)
    assert "4x12x12" in done.out, done.all
    assert "is neither a run" in refused("prepare_data", "latents", ROOT / "configs" / "smoke" / "ddpm.json")


def test_a_dry_run_of_latent_diffusion_writes_no_cache(vae_run: Path, tmp_path: Path) -> None:
    shutil.copytree(vae_run, tmp_path / "vae", ignore=shutil.ignore_patterns("latents"))
    done = train_ldm(tmp_path / "run", tmp_path / "vae", "--dry-run")
    assert done.status == 0 and "114 images" in done.out and "images/s" in done.out, done.all
    assert not (tmp_path / "run").exists() and not (tmp_path / "vae" / "latents").exists()


def test_classes_of_another_run(ldm_run: Path, vae_run: Path, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20, 20), (20 * i, 80, 120)).save(tmp_path / "data" / name / f"{i}.png")
    data = {"data": {"source": "folder", "path": str(tmp_path / "data")}, "steps": 2, "batch_size": 8}
    done = train_ldm(tmp_path / "run", vae_run, init_from=str(ldm_run), **data)
    assert done.status == 0 and "its classes are others, so the label embedding is new" in done.out, done.all
    assert ended(tmp_path / "run", 2)["label_embedding.weight"].shape[0] == 3
    start = ended(ldm_run, 30, "ema")["stem.weight"]
    assert (ended(tmp_path / "run", 2)["stem.weight"] - start).abs().max() < 0.02


def test_without_classes_and_eps_clipped_to_the_latents_range(vae_run: Path, ldm_run: Path, tmp_path: Path) -> None:
    """Its preview is guided by a run with classes, along another schedule."""
    process = {"schedule": {"kind": "linear", "steps": 100, "rescale_betas": True}, "target": "eps", "clip": True}
    sets = {"process": process, "class_conditional": False, "label_dropout": 0.0, "steps": 4, "mixed_precision": "bf16"}
    guided = {"preview__sampler__guidance": 2.0, "preview__sampler__guide_with": str(ldm_run)}
    done = train_ldm(tmp_path / "run", vae_run, **sets, **guided)
    assert done.status == 0 and (tmp_path / "run" / "samples" / "step_00000004.png").exists(), done.all
    assert "warning: the preview" not in done.all

    sampler = build_sampler(open_trained(tmp_path / "run", torch.device("cpu")), SamplerConfig(steps=10))
    facts = read_json(tmp_path / "run" / "data.json")["latents"]
    assert sampler.clip_x0 is not None
    for bound, key in zip(sampler.clip_x0, ("low", "high"), strict=True):
        assert isinstance(bound, torch.Tensor)
        torch.testing.assert_close(bound.flatten(), torch.tensor(facts[key]))
    predictions = []
    sampler.draw(
        0, range(2), None, device=torch.device("cpu"), callback=lambda _, __, ___, prediction: predictions.append(prediction.x0)
    )
    low, high = sampler.clip_x0
    for x0 in predictions[:-1]:
        assert (x0 >= low - 1e-5).all() and (x0 <= high + 1e-5).all(), "each channel by its own bounds"
    assert any((x0 == high).any() or (x0 == low).any() for x0 in predictions[:-1]), "and something was held"
    assert "trained without classes" in refused("sample", tmp_path / "run", "--classes", "cross", "--out", tmp_path / "s")
    assert "guidance needs" in refused("sample", tmp_path / "run", "--guidance", "2", "--out", tmp_path / "s")


def test_a_diffusers_autoencoder(tmp_path: Path) -> None:
    from src.runs.diffusers_autoencoder import autoencoder_from_config

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    wide = {"block_out_channels": [8, 16], "norm_num_groups": 4, "scaling_factor": 0.5, "shift_factor": 0.25}
    autoencoder_from_config({**blocks, **wide}).network.save_pretrained(tmp_path / "vae")
    done = train_ldm(tmp_path / "run", tmp_path / "vae", steps=2)
    assert done.status == 0, done.all
    facts = read_json(tmp_path / "run" / "data.json")["latents"]
    assert facts["mean"] == [0.25] * 4 and facts["std"] == [2.0] * 4, "its own scaling"
    assert (tmp_path / "run" / "latents").is_dir(), "beside the run, not in a folder that is somebody else's"
    shutil.copytree(tmp_path / "run" / "final", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "vae")
    done = run_in_process("sample.py", tmp_path / "elsewhere", "--num-samples", "2", "--steps", "2", "--out", tmp_path / "s")
    assert done.status == 0 and (tmp_path / "s" / "00001.png").exists(), done.all
    assert "does not exist; train one" in refuse_ldm(tmp_path / "other", autoencoder=str(tmp_path / "vae"))


def test_the_smallest_of_diffusers_autoencoders(tmp_path: Path) -> None:
    """Its latents are a function of the image: the cache holds them without a variance."""
    from src.runs.diffusers_autoencoder import autoencoder_from_config

    torch.manual_seed(0)
    levels = {f"num_{part}_blocks": [1, 1] for part in ("encoder", "decoder")}
    widths = {f"{part}_block_out_channels": [8, 8] for part in ("encoder", "decoder")}
    config = {**levels, **widths, "scaling_factor": 0.5}
    autoencoder_from_config(config, "AutoencoderTiny").network.save_pretrained(tmp_path / "vae")
    done = train_ldm(tmp_path / "run", tmp_path / "vae", steps=2)
    assert done.status == 0, done.all
    facts = read_json(tmp_path / "run" / "data.json")["latents"]
    assert facts["std"] == [2.0] * 4 and facts["shape"] == [4, 8, 8]
    shutil.rmtree(tmp_path / "vae")
    done = run_in_process("sample.py", tmp_path / "run", "--num-samples", "2", "--steps", "2", "--out", tmp_path / "s")
    assert done.status == 0 and (tmp_path / "s" / "00001.png").exists(), done.all
    fault = refused("convert", "to-diffusers", tmp_path / "run", "--out", tmp_path / "theirs")
    assert "its autoencoder is diffusers' AutoencoderTiny" in fault and "convert.py safetensors" in fault


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"image__channels": 1}, "has images of 3 channels; set image.channels, which is 1"),
        ({"image__size": 32}, "was trained at 16 px and 24 px, and images are 32 px; set image.size"),
        ({"image__size": 17}, "image.size 17 is not divisible by 2"),
        ({"image__crop": "random"}, "image.crop 'random' gives an image other latents each time; use center"),
        ({"autoencoder": "runs/nothing"}, "autoencoder runs/nothing does not exist; train one"),
        (
            {"model__channel_mult": [1, 1, 1, 1, 1], "model__attention": ["none"] * 5},
            "the network sees 8 px, not divisible by 16",
        ),
        ({"label_dropout": 0.0, "preview": {"sampler": {"guidance": 2.0}}}, "label_dropout above 0"),
        ({"process__variance": "learned"}, "the simple loss teaches no learned variance; use hybrid"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_latent_diffusion_that_cannot_be_trained(vae_run: Path, tmp_path: Path, sets: dict, message: str) -> None:
    assert message in refuse_ldm(tmp_path / "run", **{"autoencoder": str(vae_run), **sets})
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_latent_cache_of_something_else(vae_run: Path, tmp_path: Path) -> None:
    cache, early = tmp_path / "cache", vae_run / "checkpoints" / "step_00000025"
    assert train_ldm(tmp_path / "run", vae_run, latents=str(cache), steps=2).status == 0
    named = {"autoencoder": str(vae_run), "latents": str(cache)}
    message = one_line(train_ldm(tmp_path / "other", vae_run, latents=str(cache), data__count=100))
    assert "was made of other images and other held-out images; remove it" in message
    assert "was made of another image (size" in refuse_ldm(tmp_path / "other", image__flip=False, **named)
    assert "was made of another autoencoder" in refuse_ldm(tmp_path / "other", **named | {"autoencoder": str(early)})
    message = refuse_ldm(tmp_path / "run", autoencoder=str(early), latents=str(tmp_path / "new"), steps=2)
    assert "was trained on latents of another autoencoder" in message
    (cache / "train" / "block_00000.npy").write_bytes(b"")
    assert "is damaged" in refuse_ldm(tmp_path / "run", **named, steps=2)
    (tmp_path / "empty").mkdir()
    assert "is no latent cache" in refuse_ldm(tmp_path / "other", **named | {"latents": str(tmp_path / "empty")})


def test_an_autoencoder_that_never_finished(vae_run: Path, smoke_run: Path, tmp_path: Path) -> None:
    shutil.copytree(vae_run, tmp_path / "vae", ignore=shutil.ignore_patterns("final", "latents"))
    status = json.loads((tmp_path / "vae" / "status.json").read_text()) | {"step": 25, "state": "stopped"}
    (tmp_path / "vae" / "status.json").write_text(json.dumps(status))
    message = one_line(train_ldm(tmp_path / "run", tmp_path / "vae"))
    assert "has not finished (step 25 of 30); run its command again, or name one of its checkpoints" in message
    assert "is no autoencoder but a diffusion run" in refuse_ldm(tmp_path / "run", autoencoder=str(smoke_run))
    weights = tmp_path / "vae" / "checkpoints" / "step_00000025" / "ema.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert "is damaged" in refuse_ldm(tmp_path / "run", autoencoder=str(weights.parent))
    assert "is an autoencoder, which draws nothing" in refused("sample", vae_run, "--out", tmp_path / "s")


def test_an_unknown_class(ldm_run: Path, tmp_path: Path) -> None:
    message = refused("sample", ldm_run, "--classes", "hexagon", "--out", tmp_path / "s")
    assert "class 'hexagon' is not known; the classes are: circle, cross, square, triangle" in message


def test_a_latent_run_whose_looks_all_fail_is_the_run(vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_font(*_: object, **__: object) -> None:
        raise ValueError("no font")

    for name in ("save", "curves"):
        monkeypatch.setattr(f"src.figures.{name}", no_font)
    sets = {"steps": 2, "preview__every": 1, "checkpoint__every": 2, "log__every": 1, "preview__sampler__steps": 2}
    done = train_ldm(tmp_path / "run", vae_run, log__trackers=[], latents=str(tmp_path / "latents"), **sets)
    assert done.status == 0, done.all
    for what in ("the preview", "the first images", "loss.png"):
        assert done.out.count(f"warning: {what} failed (ValueError: no font)") == 1, done.all
    assert (tmp_path / "run" / "final" / "autoencoder.safetensors").exists() and not list((tmp_path / "run").rglob("*.png"))
    assert metrics(tmp_path / "run")[-1]["held_out_loss"] > 0
