"""Folders of diffusers: written, read, and sampled from by diffusers and by us alike."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from src.config import UserError, validate
from src.diffusion import Process, ProcessConfig, ancestral, build_process, clip, ddim, times
from src.interop.diffusers_export import export
from src.interop.diffusers_folder import read
from src.interop.schedulers import process_config, scheduler_config
from src.interop.unet_2d import unet2d_config, unet_config
from src.models import UNet, UNetConfig
from src.models.pretrained import import_torchvision
from tests.conftest import randomise

SMALL = {"base_channels": 16, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "full"], "norm_groups": 8}
PLAIN = {"embedding": "add", "head_channels": 8}
LINEAR = {"schedule": {"kind": "linear", "steps": 1000}, "target": "eps"}
LEARNED = {**LINEAR, "variance": "learned", "loss": {"kind": "hybrid"}}
COSINE_V = {"schedule": {"kind": "cosine", "steps": 1000}, "target": "v", "clip": False}


def unet(classes: int | None = None, learned: bool = False, channels: int = 3, scale: float = 0.15, **options: Any) -> UNet:
    config = validate(UNetConfig, {**SMALL, **PLAIN, **options})
    network = UNet(config, in_channels=channels, out_channels=channels * (1 + learned), num_classes=classes)
    randomise(network, scale)
    return network.eval()


def process_of(raw: dict[str, Any]) -> ProcessConfig:
    return validate(ProcessConfig, raw)


def exported(out: Path, network: UNet, raw: dict[str, Any] = LINEAR, **options: Any) -> Path:
    export(network, process_of(raw), image_size=8, out=out, name="small", **options)
    return out


@pytest.fixture(autouse=True)
def importable() -> None:
    import_torchvision()


NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddpm": {
        "head_channels": None,
        "downsample": "conv_right",
        "norm_eps": 1e-6,
        "time_embedding": {"order": "sin_cos", "frequency_shift": 1.0},
        "channel_mult": [1, 1, 2],
        "attention": ["none", "full", "none"],
        "blocks": 2,
    },
    "adm": {
        "embedding": "scale_shift",
        "downsample": "residual",
        "upsample": "residual",
        "split_qkv_first": False,
        "channel_mult": [1, 1.5, 2],
        "attention": ["none", "full", "full"],
        "classes": 5,
    },
    "legacy_heads": {"head_channels": None, "num_heads": 4, "split_qkv_first": False, "mid_attention": "none"},
    "one_resolution": {"channel_mult": [1], "attention": ["full"], "upsample": "residual", "channels": 1},
    "no_attention": {
        "embedding": "scale_shift",
        "mid_attention": "none",
        "attention": ["none", "none"],
        "head_channels": None,
    },
    "down_residual": {"downsample": "residual", "classes": 2},
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_an_exported_network_gives_the_same_output_in_diffusers_and_read_back(tmp_path: Path, name: str) -> None:
    from diffusers import UNet2DModel

    network = unet(**NETWORKS[name])
    out = exported(tmp_path / "out", network)
    theirs = UNet2DModel.from_pretrained(out, subfolder="unet")
    x, t = torch.randn(3, network.stem.in_channels, 8, 8), torch.tensor([0, 17, 999])
    labels = torch.tensor([0, 1, network.num_classes]) if network.num_classes else None  # the last row is the null class
    with torch.no_grad():
        ours = network(x, t.float(), labels)
        reference = theirs(x, t, class_labels=labels).sample
        back = read(out)
        restored = back.network(x, t.float(), labels)
    assert ours.std() > 0.1
    torch.testing.assert_close(reference, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(restored, ours, rtol=0, atol=1e-6)
    assert (back.num_classes, back.null_class) == (network.num_classes, network.num_classes is not None)
    assert (back.image_size, back.channels) == (8, network.stem.in_channels)
    assert back.process == process_of(LINEAR)
    if network.config.split_qkv_first and network.config.num_heads is None:  # which diffusers writes in another way
        assert back.model == network.config
        for key, value in network.state_dict().items():
            assert torch.equal(back.network.state_dict()[key], value), key


PROCESSES: dict[str, dict[str, Any]] = {
    "linear": {**LINEAR, "variance": "small"},
    "rescaled": {"schedule": {"kind": "linear", "steps": 250, "rescale_betas": True}, "target": "x0", "clip": False},
    "quadratic": {"schedule": {"kind": "quadratic", "steps": 500, "beta_start": 8.5e-4, "beta_end": 0.012}, "target": "eps"},
    "sigmoid": {"schedule": {"kind": "sigmoid", "steps": 100}, "target": "v"},
    "cosine": {"schedule": {"kind": "cosine", "steps": 4000}, "target": "eps", "time_input": {"kind": "index"}},
    "no_signal": {"schedule": {"kind": "linear", "steps": 1000, "zero_terminal_snr": True}, "target": "v", "clip": False},
    "learned": LEARNED,
}


@pytest.mark.parametrize("name", list(PROCESSES))
def test_a_process_survives_and_has_the_schedulers_levels(tmp_path: Path, name: str) -> None:
    from diffusers import DDPMScheduler

    spec = process_of(PROCESSES[name])
    out = exported(tmp_path / "out", unet(learned=name == "learned"), PROCESSES[name])
    back = read(out).process
    assert (back.target, back.variance, back.clip, back.loss) == (spec.target, spec.variance, spec.clip, spec.loss)
    ours, restored = build_process(spec).schedule, build_process(back).schedule
    table = torch.arange(restored.num_steps, dtype=torch.float64)  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(restored.level(table).alpha, ours.level(table).alpha, rtol=1e-12, atol=0)
    theirs: Any = DDPMScheduler.from_pretrained(out, subfolder="scheduler")
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.level(table).alpha ** 2, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- sampling

# With eps and much noise a network that has learned nothing draws black and white alone.
LITTLE_NOISE = {"schedule": {"kind": "linear", "steps": 1000, "beta_end": 0.002}, "target": "eps"}


def images_by_us(
    network: UNet, raw: dict[str, Any], seed: int, draw: Callable[..., Tensor], steps: int, **options: Any
) -> np.ndarray:
    """Images (B, H, W, C) in [0, 1], every noise from one generator, as the pipelines take it."""
    process: Process = build_process(process_of(raw))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    denoiser = process.denoiser(network)
    if process_of(raw).clip:
        denoiser = clip(denoiser, process.schedule, -1, 1)
    with torch.no_grad():
        x = draw(
            denoiser,
            x,
            times(process.schedule, steps, "strided"),
            process.schedule,
            noise=lambda _, like: torch.randn(like.shape, generator=generator),
            **options,
        )
    assert float(x.std()) > 0.1 and float((x.abs() < 0.99).float().mean()) > 0.3, "not all black or white"
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("steps", [25, 10])
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("raw", [LITTLE_NOISE, COSINE_V], ids=["linear_eps", "cosine_v"])
def test_their_ddpm_pipeline_draws_our_images(tmp_path: Path, raw: dict[str, Any], variance: str, steps: int) -> None:
    from diffusers import DDPMPipeline

    learned = variance == "learned"
    raw = {**raw, "variance": variance, "loss": {"kind": "hybrid" if learned else "simple"}}
    if steps == 25:
        raw = {**raw, "schedule": {**raw["schedule"], "steps": 25}}  # every level of a short table
    network = unet(learned=learned, scale=0.05)
    pipeline: Any = DDPMPipeline.from_pretrained(exported(tmp_path / "out", network, raw))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=steps, output_type="np"
    ).images
    ours = images_by_us(network, raw, 3, ancestral, steps, variance=variance)
    np.testing.assert_allclose(images, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("raw", [LITTLE_NOISE, COSINE_V], ids=["linear_eps", "cosine_v"])
def test_their_ddim_pipeline_draws_our_images(tmp_path: Path, raw: dict[str, Any], eta: float) -> None:
    from diffusers import DDIMPipeline

    network = unet(scale=0.05)
    pipeline: Any = DDIMPipeline.from_pretrained(exported(tmp_path / "out", network, raw))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=20,
        eta=eta,
        use_clipped_model_output=True,
        output_type="np",
    ).images
    np.testing.assert_allclose(images, images_by_us(network, raw, 3, ddim, 20, eta=eta), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------- the card


def front_matter(text: str) -> list[str]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    assert match is not None
    return match[1].splitlines()


def run_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's Python defines, run beside the folder."""
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    monkeypatch.chdir(out.parent)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    return names


SHORT = {"schedule": {"kind": "linear", "steps": 10, "rescale_betas": False, "beta_end": 0.2}, "target": "eps"}


def test_the_card_of_a_network_without_classes_says_how_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path / "out", unet(), SHORT, data={"images": 7})
    text = (out / "README.md").read_text()
    assert front_matter(text) == ["library_name: diffusers", "tags:", "- unconditional-image-generation"]
    assert "# small\n" in text and "RGB images of 8 x 8 pixels" in text
    assert text.endswith("Data: the run learned from 7 images.\n")
    assert not (out / "classes.json").exists()
    images = run_card(out, monkeypatch)["images"]
    assert len(images) == 4 and images[0].size == (8, 8)


def test_the_card_of_a_folder_with_quotes_in_its_name_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path / 'my "best" \\ one', unet(), SHORT)
    assert run_card(out, monkeypatch)["images"]


def test_the_card_of_a_network_with_classes_says_how_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path / "out", unet(classes=3), SHORT, class_names=("cat", "dog", "emu"))
    text = (out / "README.md").read_text()
    assert front_matter(text) == ["library_name: diffusers", "tags:", "- class-conditional"]
    assert "Classes: 0 cat, 1 dog, 2 emu." in text and "Class 3 is no class" in text
    assert json.loads((out / "classes.json").read_text()) == {"class_names": ["cat", "dog", "emu"], "null_class": True}
    images = run_card(out, monkeypatch)["images"]
    assert images.shape == (4, 3, 8, 8) and float(images.std()) > 0.01


@pytest.mark.parametrize(
    "raw", [{**SHORT, "variance": "learned", "loss": {"kind": "hybrid"}}, {"schedule": {"kind": "sigmoid"}, "target": "eps"}]
)
def test_the_card_leaves_ddim_out_where_it_cannot_be(tmp_path: Path, raw: dict[str, Any]) -> None:
    text = (exported(tmp_path / "out", unet(learned="variance" in raw), raw) / "README.md").read_text()
    assert "DDPMPipeline" in text and "DDIMPipeline" not in text


# ---------------------------------------------------------------------------------------------- what cannot be exported


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": ["none", "linear"]}, "no model.attention linear; what can be exported has none or full"),
        ({"mid_attention": "linear"}, "no model.mid_attention linear"),
        ({"downsample": "average"}, "no model.downsample average; what can be exported has conv or conv_right or residual"),
        ({"downsample": "max"}, "no model.downsample max"),
        ({"upsample": "nearest"}, "no model.upsample nearest; what can be exported has conv or residual"),
        ({"time_embedding": {"scale": 2.0}}, "no model.time_embedding.scale 2.0"),
        ({"channel_mult": [2, 4], "head_channels": 8}, r"no model.channel_mult\[0\] 2.0; what can be exported has 1"),
        ({"patch": 2}, "no model.patch 2; what can be exported has 1"),
        (
            {"attention": ["full", "full"], "head_channels": None, "num_heads": 4},
            "model.num_heads 4 makes heads of 4, 8 channels, .* has model.head_channels",
        ),
    ],
    ids=["linear", "mid_linear", "average", "max", "nearest", "time_scale", "first_width", "patch", "heads"],
)
def test_networks_that_unet2dmodel_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        exported(tmp_path / "out", unet(**options))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"schedule": {"kind": "blend"}, "target": "v"}, "no process.schedule blend"),
        ({**LINEAR, "target": "blend"}, "no process.target blend; what can be exported has eps, x0, v"),
        ({**LINEAR, "time_input": {"kind": "index", "scale": 0.25}}, "no process.time_input index times 0.25"),
        ({**LINEAR, "time_input": {"kind": "alpha"}}, "no process.time_input alpha times 1"),
        ({**LINEAR, "time_input": {"kind": "t", "scale": 1000.0}}, "no process.time_input t times 1000"),
        (LEARNED, "3 channels in and 3 out does not go with process.variance learned"),
    ],
    ids=["blend", "target", "scale", "alpha", "t", "learned"],
)
def test_processes_that_ddpm_scheduler_cannot_be(tmp_path: Path, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        exported(tmp_path / "out", unet(), raw)
    assert list(tmp_path.iterdir()) == []


def test_latents_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the network sees 4 channels; .* decodes no latents"):
        exported(tmp_path / "out", unet(channels=4))


def test_a_folder_is_whole_or_absent_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match="exists and is not empty"):
            exported(tmp_path / name, unet())
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.partial").mkdir()
    (tmp_path / ".empty.partial" / "of a run that was killed").write_text("half")
    exported(tmp_path / "empty", unet())
    inside = sorted(path.relative_to(tmp_path / "empty").as_posix() for path in (tmp_path / "empty").rglob("*.*"))
    assert inside == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]

    def no_room(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("src.interop.diffusers_export.write_flushed", no_room)
    with pytest.raises(OSError, match="No space left"):
        exported(tmp_path / "more", unet())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


# ---------------------------------------------------------------------------------------------- reading theirs


def pipeline_folder(folder: Path, **scheduler: Any) -> Path:
    """What DDPMPipeline.save_pretrained writes of a network like google's."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    theirs = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        norm_eps=1e-6,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
    )
    randomise(theirs, scale=0.15)
    DDPMPipeline(theirs, DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def same_output(folder: Path, theirs_at: Path) -> None:
    from diffusers import UNet2DModel

    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        reference = UNet2DModel.from_pretrained(theirs_at).eval()(x, t).sample
        output = read(folder).network(x, t.float())
    assert reference.std() > 0.1
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-5)


def test_a_folder_that_diffusers_wrote(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path / "theirs", variance_type="fixed_large", timestep_spacing="trailing")
    same_output(folder, folder / "unet")
    imported = read(folder)
    assert imported.process == process_of({**LINEAR, "variance": "large"})
    assert imported.model.downsample == "conv_right" and imported.model.time_embedding.frequency_shift == 1
    assert (imported.image_size, imported.channels, imported.num_classes, imported.null_class) == (8, 3, None, False)
    assert any("timestep_spacing trailing" in line for line in imported.notes)


def test_a_bare_folder_with_weights_in_bin_and_their_old_names(tmp_path: Path) -> None:
    whole = pipeline_folder(tmp_path / "whole") / "unet"
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((whole / "config.json").read_text())
    state = safetensors.torch.load_file(whole / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    torch.save(state, bare / "diffusion_pytorch_model.bin")
    same_output(bare, whole)
    imported = read(bare)
    assert imported.process == process_of({**LINEAR, "variance": "small"})
    assert any("DDPMScheduler's defaults" in line for line in imported.notes)
    # as google/ddpm-cifar10-32 lies on the hub: the scheduler beside the network, of diffusers 0.1
    (bare / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "DDPMScheduler",
                "_diffusers_version": "0.1.1",
                "beta_end": 0.02,
                "beta_schedule": "linear",
                "beta_start": 0.0001,
                "clip_sample": True,
                "num_train_timesteps": 1000,
                "trained_betas": None,
                "variance_type": "fixed_large",
            }
        )
    )
    assert read(bare).process == process_of({**LINEAR, "variance": "large"})


def test_a_bin_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", unet())
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Path("x")}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="diffusion_pytorch_model.bin"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "laplace"}, "beta_schedule='laplace'.*allowed: linear, scaled_linear, sigmoid, squaredcos_cap_v2"),
        ({"prediction_type": "flow"}, "prediction_type='flow'.*allowed: epsilon, sample, v_prediction"),
        ({"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range'.*twice as many channels out as in"),
        ({"thresholding": True}, "thresholding=True"),
        ({"clip_sample_range": 2.0}, "clip_sample_range=2.0.*allowed: 1.0"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas=\[0.1, 0.2\]"),
        ({"skip_prk_steps": True}, "skip_prk_steps=True"),
        ({"_class_name": "PNDMScheduler"}, "_class_name='PNDMScheduler'"),
        ({"rescale_betas_zero_snr": True}, "cannot be read at one end"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps|steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_schedulers_that_we_have_nothing_for(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = exported(tmp_path / "out", unet())
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_ddim_scheduler_is_read_too() -> None:
    config = process_config(
        {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "set_alpha_to_one": False}, learned=False
    )
    assert config == process_of({"schedule": {"kind": "cosine"}, "target": "eps", "variance": "small"})
    assert process_config(scheduler_config(process_of(LEARNED)), learned=True) == process_of(LEARNED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "of a UNet2DConditionModel; a UNet2DModel is what can be read"),
        ({"sample_size": None}, "lacks sample_size"),
        ({"sample_size": [8, 16]}, "is no square"),
        ({"out_channels": 4}, "3 channels in and 4 out"),
        ({"out_channels": 6}, "twice as many channels out as in"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"time_embedding_dim": 100}, "time_embedding_dim=100"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups=4"),
        ({"resnet_time_scale_shift": "scale_shift"}, "an attention without norm"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D.* is not supported"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "attention differs down and up"),
        ({"norm_num_groups": 7}, "norm_groups 7 does not divide"),
        ({"layers_per_block": 2}, "of another architecture"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_networks_that_we_have_no_option_for(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = exported(tmp_path / "out", unet())
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_blocks_that_resample_in_different_ways_are_refused() -> None:
    options = {"channel_mult": [1, 1, 2], "attention": ["none", "full", "none"], "downsample": "residual"}
    theirs = unet2d_config(unet(**options), image_size=8)
    assert unet_config(theirs).downsample == "residual"
    for change in ({"downsample_type": "conv"}, {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}):
        with pytest.raises(UserError, match="they resample in different ways"):
            unet_config({**theirs, **change})


def test_widths_that_are_no_multiples_of_the_first_come_out_whole() -> None:
    theirs = unet2d_config(unet(), image_size=8)
    for widths in ([56, 488], [48, 72], [96, 224]):
        assert unet_config({**theirs, "block_out_channels": widths}).widths == widths


def test_folders_that_hold_no_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither unet/config.json nor config.json"):
        read(tmp_path)
    folder = exported(tmp_path / "out", unet())
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged"):
        read(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="no diffusion_pytorch_model.safetensors and no diffusion_pytorch_model.bin"):
        read(folder)
    (folder / "unet" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not the JSON object"):
        read(folder)


# ---------------------------------------------------------------------------------------------- the hub


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, requests = exported(tmp_path / "out", unet()), []
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(weights)
    weights.unlink()

    def download(name: str, allow_patterns: list[str]) -> str:
        """A hub whose weights are a .bin alone."""
        requests.append((name, allow_patterns))
        if "unet/diffusion_pytorch_model.bin" in allow_patterns:
            torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read("somebody/small").process == process_of(LINEAR)
    assert [name for name, _ in requests] == ["somebody/small"] * 2


def test_a_name_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="small is no folder, and the hub does not give it: the Hugging Face hub was not re"):
        read("somebody/small")
    monkeypatch.undo()
    with pytest.raises(UserError, match="absent is no folder, and the hub does not give it") as error:
        read(tmp_path / "absent")
    assert "\n" not in str(error.value)
