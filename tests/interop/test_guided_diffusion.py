"""guided-diffusion's networks: their numbers, and reading checkpoints with flags, by their shapes, and as published files."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from src.config import UserError, validate
from src.diffusion import Process, ancestral, bits_per_dimension, build_process, clip, euler, log_variance, times, transitions
from src.interop.guided_diffusion import read, read_weights
from src.interop.guided_flags import PUBLISHED, find_published, model_config, process_config, read_flags
from src.interop.guided_shapes import module_names, read_shapes
from src.interop.names import rename_state
from src.models import Classifier, ClassifierConfig, UNet, UNetConfig
from tests.conftest import randomise

NAMES = ("adm_64_class_conditional", "adm_32_legacy_attention")


def load(path: Path, flags: Any) -> tuple[Any, Process]:
    """The network and the process of a checkpoint."""
    imported = read(path, flags)
    return imported.network, build_process(imported.process)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_loops_of_the_reference(vectors: Path, name: str) -> None:
    network, process = load(vectors / f"{name}.pt", vectors / f"{name}.json")
    io = load_file(vectors / f"{name}.io.safetensors")
    condition = {"labels": io["y"]} if "y" in io else {}
    schedule = process.schedule
    torch.testing.assert_close(process.add_noise(io["x0"], io["noise"], io["t"]), io["x_t"], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(network(io["x"], io["t"].float(), **condition), io["out"], rtol=0, atol=1e-4)

        denoiser = clip(process.denoiser(network, **condition), schedule, -1, 1)
        prediction = denoiser(io["x"], io["t"])
        torch.testing.assert_close(prediction.x0, io["pred_xstart"], rtol=0, atol=1e-4)
        chain = times(schedule, 1000)
        steps = transitions(schedule, chain)
        assert prediction.variance_fraction is not None
        for b, t in enumerate(io["t"].tolist()):
            i = 999 - t
            log_var = log_variance(steps, i, process.variance, prediction.variance_fraction[b])
            mean = float(steps.from_x_t[i]) * io["x"][b] + float(steps.from_x0[i]) * prediction.x0[b]
            torch.testing.assert_close(log_var, io["p_log_variance"][b], rtol=0, atol=1e-4)
            torch.testing.assert_close(log_var.exp(), io["p_variance"][b], rtol=0, atol=1e-4)
            torch.testing.assert_close(mean, io["p_mean"][b], rtol=0, atol=1e-4)

        sample = euler(denoiser, io["x"], times(schedule, 10, "strided"), schedule)
        torch.testing.assert_close(sample, io["ddim10_sample"], rtol=0, atol=1e-3)

        def noise(step: int, like: Tensor) -> Tensor:
            return io["ancestral8_noises"][step]

        sample = ancestral(denoiser, io["x"], times(schedule, 8), schedule, noise=noise, variance=process.variance)
        torch.testing.assert_close(sample, io["ancestral8_sample"], rtol=0, atol=1e-3)

        losses = process.losses(network, io["x0"], io["noise"], io["t"], **condition)
        assert losses.mse is not None and losses.vb is not None
        flags = json.loads((vectors / f"{name}.json").read_text())["flags"]
        assert process.loss.variational_weight == 1.0 and flags["diffusion_steps"] == 1000
        for value, wanted in zip(losses, (io["loss_loss"], io["loss_mse"], io["loss_vb"]), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)

        bits = bits_per_dimension(
            denoiser, io["x0"], times(schedule, 8), schedule, noise=lambda i, _: io["bpd8_noises"][i], variance="learned"
        )
        torch.testing.assert_close(bits.terms, io["bpd8_vb"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bits.prior, io["bpd8_prior"], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(bits.total, io["bpd8_total"], rtol=1e-4, atol=0)


def flags_as(kind: str, path: Path, folder: Path) -> Any:
    """The flags of a reference network as a dict, as a file, or as a file of them as a command line has them."""
    flags = json.loads(path.read_text())["flags"]
    if kind == "dict":
        return flags
    file = folder / "flags.json"
    file.write_text(json.dumps(flags if kind == "file" else {"flags": {name: str(value) for name, value in flags.items()}}))
    return file


@pytest.mark.parametrize("kind", ["dict", "file", "strings"])
@pytest.mark.parametrize("name", NAMES)
def test_flags_come_in_three_ways(vectors: Path, tmp_path: Path, name: str, kind: str) -> None:
    imported = read(vectors / f"{name}.pt", flags_as(kind, vectors / f"{name}.json", tmp_path))
    io = load_file(vectors / f"{name}.io.safetensors")
    with torch.no_grad():
        out = imported.network(io["x"], io["t"].float(), **({"labels": io["y"]} if "y" in io else {}))
    torch.testing.assert_close(out, io["out"], rtol=0, atol=1e-4)
    assert not imported.network.training and imported.process.clip
    assert (imported.image_size, imported.channels, imported.low_resolution) == (int(name.split("_")[1]), 3, None)
    assert imported.num_classes == (1000 if "y" in io else None) and not imported.null_class
    assert isinstance(imported.model, UNetConfig) and imported.model.dropout == 0


@pytest.mark.parametrize("kind", ["dict", "file", "strings"])
def test_logits_and_gradients_of_the_reference(vectors: Path, tmp_path: Path, kind: str) -> None:
    path = vectors / "adm_64_classifier.pt"
    flags = flags_as(kind, vectors / "adm_64_classifier.json", tmp_path)
    network, io = read(path, flags).network, load_file(vectors / "adm_64_classifier.io.safetensors")
    x = io["x"].requires_grad_()
    logits = network(x, io["t"])
    torch.testing.assert_close(logits, io["logits"], rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[torch.arange(2), io["y"]].sum(), x)
    assert io["grad"].abs().max() > 1e-3
    torch.testing.assert_close(gradient, io["grad"], rtol=0, atol=1e-7)
    imported = read(path, flags)
    assert (imported.image_size, imported.channels, imported.num_classes) == (64, 3, 1000) and not imported.network.training
    assert isinstance(imported.model, ClassifierConfig) and imported.model.blocks == 1, "the shapes alone say how many"


# ------------------------------------------------------------------------------------------------------ flags


FLAGS = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 2,
    "num_heads": 2,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "1,1,2",
    "learn_sigma": False,
    "diffusion_steps": 500,
    "noise_schedule": "linear",
    "predict_xstart": True,
    "rescale_timesteps": True,
    "sigma_small": True,
}


def test_flags_become_a_process() -> None:
    process = build_process(process_config(FLAGS))
    assert (process.target, process.variance) == ("x0", "small")
    assert float(process.network_time(torch.tensor(10.0))) == 20.0
    assert float(process.schedule.level(torch.tensor(499.0)).alpha) < 0.01, "betas are rescaled by 1000 / T"
    assert build_process(process_config({})).schedule.num_steps == 1000, "guided-diffusion's defaults"  # pyright: ignore
    with pytest.raises(UserError, match="noise_schedule"):
        build_process(process_config({**FLAGS, "noise_schedule": "wavy"}))
    with pytest.raises(UserError, match="betas"):
        build_process(process_config({**FLAGS, "diffusion_steps": 10}))


@pytest.mark.parametrize(
    ("flags", "kind", "weight", "variance"),
    [
        ({}, "simple", 1.0, "large"),
        ({"learn_sigma": True}, "hybrid", 1.0, "learned"),
        ({"learn_sigma": "True", "rescale_learned_sigmas": "True", "diffusion_steps": "4000"}, "hybrid", 4.0, "learned"),
        ({"learn_sigma": True, "use_kl": True}, "rescaled_kl", 1.0, "learned"),
    ],
)
def test_flags_become_a_loss(flags: dict, kind: str, weight: float, variance: str) -> None:
    config = process_config(flags)
    assert (config.loss.kind, config.loss.variational_weight, config.variance, config.clip) == (kind, weight, variance, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_chanels": 64}, "'num_chanels' is no flag of guided-diffusion; did you mean 'num_channels'?"),
        ({"qqq": 1}, "known: .*image_size"),
        ({"learn_sigma": "maybe"}, "learn_sigma is 'maybe'; write True or False"),
        ({"num_heads": "four"}, "num_heads is 'four'; write a whole number"),
        ({"num_heads": 4.5}, "num_heads is 4.5"),
        ({"num_heads": True}, "num_heads is True"),
        ({"dropout": [1]}, r"dropout is \[1\]; write a number"),
        ({"image_size": 0}, "image_size is 0; it must be at least 1"),
        ({"flags": [1]}, "object"),
    ],
)
def test_flags_that_are_none(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_flags(flags)


def test_flags_have_types_and_what_sampled_is_ignored(tmp_path: Path) -> None:
    given = {"num_heads": "4", "learn_sigma": "y", "dropout": "0.1", "channel_mult": [1, 0.5], "image_size": 64.0}
    wanted = {"num_heads": 4, "learn_sigma": True, "dropout": 0.1, "channel_mult": "1,0.5", "image_size": 64}
    assert read_flags({**given, "lr": 1e-4, "timestep_respacing": "250", "num_heads_upsample": None}) == wanted
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match=r"list.json: flags are a JSON object"):
        read_flags(tmp_path / "list.json")


# ------------------------------------------------------------------------------------------------------ round trips


def foreign_state(network: nn.Module, config: UNetConfig | ClassifierConfig) -> dict[str, Tensor]:
    """A state dict with guided-diffusion's names and shapes, made from a network of ours."""
    names, state = module_names(config), {}
    for key, value in network.state_dict().items():
        module, _, kind = key.rpartition(".")
        theirs = names[module]
        if kind == "weight" and theirs.endswith(("qkv", "proj_out", "qkv_proj", "c_proj")):
            value = value[..., None]  # convolutions of one pixel
        if kind == "weight" and theirs == "out.3":
            value = value[..., None, None]
        state[f"{theirs}.{kind}"] = value
    return state


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


SMALL = {
    "base_channels": 32,
    "channel_mult": [1, 1, 2],
    "blocks": 2,
    "attention": ["none", "full", "full"],
    "num_heads": 2,
    "split_qkv_first": False,
    "downsample": "conv",
}
SMALL_FLAGS = {"image_size": 16, "num_heads": 2}


@pytest.mark.parametrize(
    ("change", "options", "flags"),
    [
        ({}, {}, {}),
        ({"downsample": "residual", "upsample": "residual"}, {}, {"resblock_updown": True}),
        ({"downsample": "residual", "upsample": "residual", "attention": ["none"] * 3, "channel_mult": [1, 1, 1]}, {}, {}),
        ({"embedding": "add", "blocks": 1}, {"out_channels": 6}, {"use_scale_shift_norm": "False", "learn_sigma": "True"}),
        ({"channel_mult": [0.5, 1, 1.5], "base_channels": 64}, {}, {"channel_mult": "0.5,1,1.5", "num_channels": 64}),
        ({}, {"in_channels": 1, "out_channels": 1}, {"learn_sigma": False}),
        ({}, {"in_channels": 1, "out_channels": 2}, {"learn_sigma": True}),
        ({}, {"num_classes": 7}, {"class_cond": True}),
        ({"num_heads": None, "head_channels": 16}, {"num_classes": 7}, {"num_head_channels": 16}),
        ({"split_qkv_first": True}, {}, {"use_new_attention_order": True}),
        ({"mid_attention": "none"}, {}, {}),
        ({"channel_mult": [1], "attention": ["full"]}, {}, {"attention_resolutions": "16,4", "resblock_updown": True}),
        ({}, {"low_channels": 3, "num_classes": 7}, {"image_size": None, "large_size": 16, "small_size": 4}),
        ({}, {"in_channels": 1, "out_channels": 2, "low_channels": 1}, {"large_size": 16, "small_size": 8}),
    ],
    ids=str,
)
def test_a_unet_goes_there_and_back(tmp_path: Path, change: dict, options: dict, flags: dict) -> None:
    config = validate(UNetConfig, {**SMALL, **change})
    network = UNet(config, null_class=False, **options)
    randomise(network)
    torch.save(foreign_state(network, config), tmp_path / "model.pt")
    imported = read(tmp_path / "model.pt", {**SMALL_FLAGS, **flags})
    if len(config.channel_mult) > 1:
        assert imported.model == config
    assert isinstance(imported.network, UNet)
    assert (imported.image_size, imported.channels) == (16, options.get("in_channels", 3))
    assert (imported.num_classes, imported.low_resolution) == (options.get("num_classes"), flags.get("small_size"))
    assert (imported.process.variance == "learned") == (options.get("out_channels") in (2, 6))
    x, t = torch.randn(2, imported.channels, 16, 16), torch.tensor([3.0, 800.0])
    condition = {"labels": torch.tensor([0, 6])} if imported.num_classes else {}
    if imported.low_resolution:
        condition["low"] = torch.randn(2, imported.channels, imported.low_resolution, imported.low_resolution)
    with torch.no_grad():
        out = network.eval()(x, t, **condition)
        assert out.std() > 0.01 and torch.equal(imported.network(x, t, **condition), out)


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial"])
@pytest.mark.parametrize(
    ("change", "channels"),
    [
        ({}, 3),
        ({"downsample": "conv"}, 3),
        ({"embedding": "add", "downsample": "conv", "channel_mult": [0.5, 1, 1]}, 3),
        ({"channel_mult": [0.5, 1, 2]}, 1),
    ],
    ids=str,
)
def test_a_classifier_goes_there_and_back(tmp_path: Path, pool: str, change: dict, channels: int) -> None:
    spec = {**SMALL, "base_channels": 64, "num_heads": None, "head_channels": 64, "downsample": "residual"}
    spec |= {"attention": ["none", "none", "full"]}
    config = validate(ClassifierConfig, {**spec, **change, "pool": pool})
    network = Classifier(config, in_channels=channels, image_size=16, num_classes=7)
    randomise(network)
    torch.save(foreign_state(network, config), tmp_path / "model.pt")
    imported = read(tmp_path / "model.pt", {} if pool == "attention" else {"image_size": 16})
    assert imported.model == config and (imported.image_size, imported.channels, imported.num_classes) == (16, channels, 7)
    x, t = torch.randn(2, channels, 16, 16), torch.tensor([3.0, 800.0])
    with torch.no_grad():
        out = network.eval()(x, t)
        assert out.std() > 0.01 and torch.equal(imported.network(x, t), out)


def test_the_order_of_the_heads_matters(vectors: Path) -> None:
    for name in NAMES:
        flags = json.loads((vectors / f"{name}.json").read_text())["flags"]
        io = load_file(vectors / f"{name}.io.safetensors")
        for change in (
            {"use_new_attention_order": not flags["use_new_attention_order"]},
            {"num_head_channels": -1, "num_heads": 2},
        ):
            network, _ = load(vectors / f"{name}.pt", {**flags, **change})
            assert network.config.split_qkv_first == {**flags, **change}["use_new_attention_order"]
            with torch.no_grad():
                out = network(io["x"], io["t"].float(), **({"labels": io["y"]} if "y" in io else {}))
            assert not torch.allclose(out, io["out"], atol=1e-4)


def test_half_precision_becomes_single(vectors: Path, tmp_path: Path) -> None:
    state = read_weights(vectors / "adm_32_legacy_attention.pt")[0]
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pt")
    network, _ = load(tmp_path / "half.pt", vectors / "adm_32_legacy_attention.json")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_small_images_lie_beside_the_large() -> None:
    config = validate(UNetConfig, {**SMALL, "attention": ["none"] * 3, "mid_attention": "none"})
    network, plain = UNet(config, in_channels=3, low_channels=3), UNet(config, in_channels=6, out_channels=3)
    randomise(network)
    plain.load_state_dict(network.state_dict())
    x, low, t = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 8), torch.tensor([3.0, 800.0])
    raised = F.interpolate(low, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(x, t, low=low), plain(torch.cat([x, raised], dim=1), t))
    with pytest.raises(ValueError, match="must be given low"):
        network(x, t)
    with pytest.raises(ValueError, match="low must be None"):
        plain(x, t, low=low)


# ------------------------------------------------------------------------------------------------------ published files


CLASSIFIER_128 = {"base_channels": 128, "downsample": "residual", "head_channels": 64, "split_qkv_first": False}
GUIDED_64 = {"head_channels": 64, "split_qkv_first": False, "downsample": "residual", "upsample": "residual"}
GUIDED_4 = {"num_heads": 4, "split_qkv_first": False, "downsample": "residual", "upsample": "residual"}
IMPROVED_4 = {"num_heads": 4, "split_qkv_first": False, "downsample": "conv", "upsample": "conv"}
LINEAR_1000, COSINE_1000 = ("linear", 1000, 1.0, 1.0), ("cosine", 1000, 1.0, 1.0)
COSINE_4000, RESCALED_4000 = ("cosine", 4000, 1.0, 1.0), ("cosine", 4000, 0.25, 4.0)


def levels(attended: str, **spec: Any) -> dict[str, Any]:
    """`attended` has a digit for each resolution: 1 where there is attention."""
    return {**spec, "attention": ["full" if digit == "1" else "none" for digit in attended]}


# name, (size, small size or None, classes), the architecture, (schedule, steps, time scale, weight of the bound), and the size
# in millions of parameters, where the paper says it (Tables 11 and 12, arXiv:2105.05233; improved-diffusion's README)
RUNS: list[tuple[str, tuple, dict, tuple, int | None]] = [
    (
        "64x64_diffusion.pt",
        (64, None, 1000),
        levels("0111", base_channels=192, channel_mult=[1, 2, 3, 4], blocks=3, dropout=0.1, **GUIDED_64)
        | {"split_qkv_first": True},
        COSINE_1000,
        296,
    ),
    (
        "128x128_diffusion.pt",
        (128, None, 1000),
        levels("00111", base_channels=256, channel_mult=[1, 1, 2, 3, 4], blocks=2, **GUIDED_4),
        LINEAR_1000,
        422,
    ),
    (
        "256x256_diffusion.pt",
        (256, None, 1000),
        levels("000111", base_channels=256, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_64),
        LINEAR_1000,
        554,
    ),
    (
        "256x256_diffusion_uncond.pt",
        (256, None, None),
        levels("000111", base_channels=256, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_64),
        LINEAR_1000,
        None,
    ),
    (
        "512x512_diffusion.pt",
        (512, None, 1000),
        levels("0000111", base_channels=256, channel_mult=[0.5, 1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_64),
        LINEAR_1000,
        559,
    ),
    (
        "64_256_upsampler.pt",
        (256, 64, 1000),
        levels("000111", base_channels=192, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_4),
        LINEAR_1000,
        312,
    ),
    (
        "128_512_upsampler.pt",
        (512, 128, 1000),
        levels("000011", base_channels=192, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_64),
        LINEAR_1000,
        309,
    ),
    (
        "64x64_classifier.pt",
        (64, None, 1000),
        levels("0111", channel_mult=[1, 2, 3, 4], blocks=4, pool="attention", **CLASSIFIER_128),
        COSINE_1000,
        None,
    ),
    (
        "128x128_classifier.pt",
        (128, None, 1000),
        levels("00111", channel_mult=[1, 1, 2, 3, 4], blocks=2, pool="attention", **CLASSIFIER_128),
        LINEAR_1000,
        None,
    ),
    (
        "256x256_classifier.pt",
        (256, None, 1000),
        levels("000111", channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, pool="attention", **CLASSIFIER_128),
        LINEAR_1000,
        None,
    ),
    (
        "512x512_classifier.pt",
        (512, None, 1000),
        levels("0000111", channel_mult=[0.5, 1, 1, 2, 2, 4, 4], blocks=2, pool="attention", **CLASSIFIER_128),
        LINEAR_1000,
        None,
    ),
    (
        "cifar10_uncond_50M_500K.pt",
        (32, None, None),
        levels("0110", base_channels=128, channel_mult=[1, 2, 2, 2], blocks=3, dropout=0.3, **IMPROVED_4),
        RESCALED_4000,
        None,
    ),
    (
        "imagenet64_uncond_100M_1500K.pt",
        (64, None, None),
        levels("0011", base_channels=128, channel_mult=[1, 2, 3, 4], blocks=3, **IMPROVED_4),
        RESCALED_4000,
        None,
    ),
    (
        "imagenet64_cond_270M_250K.pt",
        (64, None, 1000),
        levels("0011", base_channels=192, channel_mult=[1, 2, 3, 4], blocks=3, **IMPROVED_4),
        COSINE_4000,
        273,
    ),
    (
        "upsample_cond_500K.pt",
        (256, 64, 1000),
        levels("000011", base_channels=192, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **IMPROVED_4),
        ("linear", 4000, 1.0, 1.0),
        280,
    ),
    (
        "lsun_uncond_100M_1200K_bs128.pt",
        (256, None, None),
        levels("000010", base_channels=128, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **IMPROVED_4)
        | {"num_heads": 1, "embedding": "add"},
        LINEAR_1000,
        None,
    ),
]


@pytest.mark.parametrize(("name", "images", "spec", "diffusion", "millions"), RUNS, ids=[run[0] for run in RUNS])
def test_a_published_file_is_known_by_its_shapes(
    name: str, images: tuple, spec: dict, diffusion: tuple, millions: int | None
) -> None:
    size, small, classes = images
    with torch.device("meta"):
        if "pool" in spec:
            config = validate(ClassifierConfig, spec)
            network = Classifier(config, image_size=size, num_classes=classes)
        else:
            config = validate(UNetConfig, spec)
            network = UNet(config, out_channels=6, num_classes=classes, null_class=False, low_channels=3 if small else 0)
    if millions is not None:
        assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions
    architecture = read_shapes(shapes_of(foreign_state(network, config)))
    known = find_published(architecture)
    assert known is not None and name in known[0]
    flags = known[1]
    assert model_config(architecture, flags) == config
    assert (flags.get("large_size", flags.get("image_size")), flags.get("small_size"), architecture.num_classes) == images
    schedule, steps, scale, weight = diffusion
    process = process_config({**flags, "learn_sigma": architecture.learn_sigma})
    assert (process.schedule.kind, process.schedule.steps) == (schedule, steps)  # pyright: ignore
    assert process.time_input is not None and (process.time_input.kind, process.time_input.scale) == ("index", scale)
    assert process.target == "eps"
    if "pool" in spec:
        assert architecture.image_size == size
    else:
        assert architecture.learn_sigma and architecture.upsampler == (small is not None)
        assert (process.variance, process.loss.kind, process.loss.variational_weight) == ("learned", "hybrid", weight)


def test_every_published_file_is_tested() -> None:
    assert [key.split(",")[0] for key in PUBLISHED] == [run[0] for run in RUNS]


def test_a_published_file_is_read_without_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small stand-in for one of 200 MB."""
    config = validate(UNetConfig, {**SMALL, "num_heads": 4, "split_qkv_first": True})
    network = UNet(config, out_channels=6)
    randomise(network)
    torch.save(foreign_state(network, config), tmp_path / "model.pt")
    flags = PUBLISHED["cifar10_uncond_50M_500K.pt"] | {"num_channels": 32, "num_res_blocks": 2, "attention_resolutions": "16,8"}
    flags |= {"channel_mult": "1,1,2", "use_new_attention_order": True, "dropout": 0.0}
    with pytest.raises(UserError, match=r"model.pt: .*image_size, num_heads.*noise_schedule.*MODEL_FLAGS.*--flags FILE"):
        read(tmp_path / "model.pt")
    monkeypatch.setitem(PUBLISHED, "tiny.pt", flags)
    imported = read(tmp_path / "model.pt")
    assert imported.model == config and imported.image_size == 32
    assert imported.process.time_input is not None and imported.process.time_input.scale == 0.25
    weights, signature, defaults = imported.notes[-3:]
    assert weights.startswith("from the weights: ") and "num_channels 32" in weights and "channel_mult 1,1,2" in weights
    assert signature.startswith("from the published tiny.pt") and "noise_schedule cosine" in signature
    assert "num_heads 4" in signature and "num_channels" not in signature
    assert defaults == (
        "guided-diffusion's defaults: num_heads_upsample -1, num_head_channels -1, predict_xstart False, use_kl False, "
        "sigma_small False"
    )
    notes = read(tmp_path / "model.pt", {"image_size": 32, "noise_schedule": "cosine", "channel_mult": "1,1,2"}).notes[-3:]
    assert notes[1] == "from the flags: image_size 32, noise_schedule cosine" and "diffusion_steps 1000" in notes[2]


def test_shapes_that_leave_the_depth_open(tmp_path: Path) -> None:
    spec = {"base_channels": 64, "channel_mult": [1, 1], "blocks": 1, "attention": ["none", "none"], "pool": "adaptive"}
    config = validate(ClassifierConfig, spec)
    network = Classifier(config, image_size=16, num_classes=7)
    randomise(network)
    state = foreign_state(network, config)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="has 1 or 3 blocks: give classifier_depth"):
        read_shapes(shapes_of(state))
    imported = read(tmp_path / "model.pt", {"image_size": 16, "classifier_depth": 1})
    assert imported.model == config
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([3.0])
    assert torch.equal(imported.network(x, t), network.eval()(x, t))


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, path = validate(UNetConfig, SMALL), tmp_path_factory.mktemp("unet") / "unet.pt"
    torch.save(foreign_state(randomise(UNet(config)), config), path)
    return path


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = {**SMALL, "base_channels": 64, "num_heads": None, "head_channels": 64}
    config, path = validate(ClassifierConfig, spec), tmp_path_factory.mktemp("classifier") / "classifier.pt"
    torch.save(foreign_state(randomise(Classifier(config, image_size=16, num_classes=7)), config), path)
    return path


def test_flags_that_agree_with_the_weights(unet_file: Path) -> None:
    flags = {**FLAGS, "num_heads_upsample": 2, "sigma_small": "False", "use_scale_shift_norm": "True"}
    imported = read(unet_file, {**flags, "attention_resolutions": "8,16", "resblock_updown": "False", "class_cond": False})
    assert imported.process == process_config(flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_channels": 128}, "num_channels is 128 in the flags and 32 in the weights"),
        ({"num_res_blocks": 3}, "num_res_blocks is 3 in the flags and 2 in the weights"),
        ({"channel_mult": "1,2,2"}, "channel_mult is 1,2,2 in the flags, images of 16 px, and 1,1,2 in the weights"),
        ({"image_size": 64}, "channel_mult is 1,2,3,4 by default for 64 px, which the flags say, and 1,1,2 in the weights"),
        (
            {"attention_resolutions": "16,8"},
            "attention_resolutions is 16,8 in the flags, images of 16 px, and 8,4 in the weights",
        ),
        ({"attention_resolutions": "0"}, "write numbers above 0"),
        ({"resblock_updown": True}, "resblock_updown is True in the flags and False in the weights"),
        ({"use_scale_shift_norm": "False"}, "use_scale_shift_norm is False in the flags and True in the weights"),
        ({"class_cond": True}, "class_cond is True in the flags and False in the weights"),
        ({"learn_sigma": True}, "learn_sigma is True in the flags and False in the weights"),
        ({"num_heads": 3}, "num_heads 3 does not divide 32 channels"),
        ({"num_head_channels": 24}, "head_channels 24 does not divide 32 channels"),
        ({"num_heads_upsample": 4}, "num_heads_upsample"),
        ({"image_size": 18}, "the images have 18 px in the flags, and the weights halve them 2 times"),
        ({"image_size": None}, "the weights do not say image_size: give the MODEL_FLAGS"),
        ({"large_size": 16}, "not an upsampler's"),
        ({"noise_schedule": "wavy"}, "noise_schedule 'wavy'"),
    ],
)
def test_flags_that_contradict_the_weights(unet_file: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(unet_file, {**SMALL_FLAGS, **change})
    assert "\n" not in str(raised.value) and str(unet_file) in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_size": 64}, "image_size is 64 in the flags and 16 in the weights"),
        ({"classifier_width": 128}, "classifier_width is 128 in the flags and 64 in the weights"),
        ({"classifier_depth": 1}, "classifier_depth is 1 in the flags and 2 in the weights"),
        ({"classifier_pool": "spatial"}, "classifier_pool is spatial in the flags and attention in the weights"),
        (
            {"classifier_attention_resolutions": "4"},
            "attention_resolutions is 4 in the flags, images of 16 px, and 8,4 in the weights",
        ),
    ],
)
def test_flags_that_contradict_a_classifier(classifier_file: Path, flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(classifier_file, flags)


def test_an_upsampler_needs_both_sizes(tmp_path: Path) -> None:
    config = validate(UNetConfig, SMALL)
    torch.save(foreign_state(UNet(config, low_channels=3), config), tmp_path / "model.pt")
    with pytest.raises(UserError, match="an upsampler's and do not say large_size and small_size: give the MODEL_FLAGS"):
        read(tmp_path / "model.pt", SMALL_FLAGS)
    with pytest.raises(UserError, match="do not say small_size: give"):
        read(tmp_path / "model.pt", {**SMALL_FLAGS, "large_size": 16})


def test_the_kind_of_network_is_known_by_its_shapes(unet_file: Path, classifier_file: Path) -> None:
    assert isinstance(read(unet_file, SMALL_FLAGS).network, UNet)
    assert isinstance(read(classifier_file, {}).network, Classifier)


def test_another_architecture_says_which_keys_differ(unet_file: Path, tmp_path: Path) -> None:
    def message_of(change: dict[str, Tensor | None]) -> str:
        changed = {**read_weights(unet_file)[0], **change}
        torch.save({name: value for name, value in changed.items() if value is not None}, tmp_path / "changed.pt")
        with pytest.raises(UserError) as raised:
            read(tmp_path / "changed.pt", SMALL_FLAGS)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "lacks middle_block.2.out_layers.3.bias" in message_of({"middle_block.2.out_layers.3.bias": None})
    assert "lacks input_blocks.4.0.in_layers.2.weight" in message_of({"input_blocks.4.0.in_layers.2.weight": None})
    assert "has in excess alien" in message_of({"alien": torch.zeros(1)})
    assert "out.2.bias is (4,), this network wants (3,)" in message_of({"out.2.bias": torch.zeros(4)})
    assert "it sees 3 channels and gives 5" in message_of({"out.2.weight": torch.zeros(5, 32, 3, 3)})
    assert "do not divide into resolutions" in message_of({"input_blocks.9.0.in_layers.2.weight": torch.zeros(64, 64, 3, 3)})
    torch.save(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))).state_dict(), tmp_path / "other.pt")
    with pytest.raises(
        UserError, match="other.pt: .*lacks input_blocks.0.0.weight, .*has in excess 0.bias, 0.weight"
    ) as raised:
        read(tmp_path / "other.pt")
    assert str(raised.value).count(", ") == 8, "the first five of each"


def test_renaming_says_which_keys_differ() -> None:
    config = validate(UNetConfig, SMALL)
    network = UNet(config)
    state, names = foreign_state(network, config), module_names(config)
    assert len(state) == len(network.state_dict())
    broken = {key: value for key, value in state.items() if not key.startswith("middle_block.0")}
    with pytest.raises(UserError, match="lacks middle_block"):
        rename_state(network, broken, names)
    with pytest.raises(UserError, match="in excess alien"):
        rename_state(network, {**state, "alien": torch.zeros(1)}, names)
    with pytest.raises(UserError, match="out.2.weight is"):
        rename_state(network, {**state, "out.2.weight": torch.zeros(6, 32, 3, 3)}, names)


def test_a_pool_that_we_have_not(classifier_file: Path) -> None:
    shapes = shapes_of(read_weights(classifier_file)[0]) | {"out.0.weight": (2048, 700), "out.3.weight": (7, 2048)}
    with pytest.raises(UserError, match="spatial_v2"):
        read_shapes(shapes)


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("this must not run",))


def test_a_file_that_is_no_state_dict(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def message_of(name: str) -> str:
        with pytest.raises(UserError) as raised:
            read_weights(tmp_path / name)[0]
        assert "\n" not in str(raised.value) and name in str(raised.value)
        return str(raised.value)

    assert "no such" in message_of("missing.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "folder.pt").mkdir()
    with open(tmp_path / "pickle.pt", "wb") as file:
        pickle.dump({"a": Evil()}, file)
    for name in ("text.pt", "empty.pt", "cut.pt", "folder.pt", "pickle.pt"):
        assert "not a state dict that can be read safely" in message_of(name)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "state dict of tensors" in message_of("list.pt")
    torch.save({"step": 3}, tmp_path / "numbers.pt")
    assert "state dict of tensors" in message_of("numbers.pt")
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    assert "to load it is to run code" in message_of("evil.pt") and "print" in message_of("evil.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    assert "to load it is to run code (torch.nn" in message_of("module.pt")
    assert "must not run" not in capfd.readouterr().out
