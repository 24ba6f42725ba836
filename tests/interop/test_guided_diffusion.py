"""guided-diffusion's networks: their numbers, flags in three ways, and round trips."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from src.config import UserError, validate
from src.diffusion import Process, ancestral, bits_per_dimension, build_process, clip, euler, log_variance, times, transitions
from src.interop.guided_diffusion import read, read_weights
from src.interop.guided_flags import process_config, read_flags
from src.models import Classifier, ClassifierConfig, UNet, UNetConfig
from tests.conftest import randomise
from tests.interop.guided_networks import FLAGS, SMALL, SMALL_FLAGS, foreign_state

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
        for value, wanted in zip(losses[:3], (io["loss_loss"], io["loss_mse"], io["loss_vb"]), strict=True):
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
    assert imported.network.num_classes == (1000 if "y" in io else None) and not imported.network.null_class
    assert isinstance(imported.network.config, UNetConfig) and imported.network.config.dropout == 0


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
    network, config = imported.network, imported.network.config
    assert (imported.image_size, imported.channels, network.num_classes) == (64, 3, 1000) and not network.training
    assert isinstance(config, ClassifierConfig) and config.blocks == 1, "the shapes alone say how many"


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
        ({}, {"condition_channels": 3, "num_classes": 7}, {"image_size": None, "large_size": 16, "small_size": 4}),
        ({}, {"in_channels": 1, "out_channels": 2, "condition_channels": 1}, {"large_size": 16, "small_size": 8}),
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
        assert imported.network.config == config
    assert isinstance(imported.network, UNet)
    assert (imported.image_size, imported.channels) == (16, options.get("in_channels", 3))
    assert (imported.network.num_classes, imported.low_resolution) == (options.get("num_classes"), flags.get("small_size"))
    assert (imported.process.variance == "learned") == (options.get("out_channels") in (2, 6))
    x, t = torch.randn(2, imported.channels, 16, 16), torch.tensor([3.0, 800.0])
    condition = {"labels": torch.tensor([0, 6])} if imported.network.num_classes else {}
    if imported.low_resolution:
        condition["condition"] = torch.randn(2, imported.channels, imported.low_resolution, imported.low_resolution)
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
    assert imported.network.config == config
    assert (imported.image_size, imported.channels, imported.network.num_classes) == (16, channels, 7)
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
    network, plain = UNet(config, in_channels=3, condition_channels=3), UNet(config, in_channels=6, out_channels=3)
    randomise(network)
    plain.load_state_dict(network.state_dict())
    x, low, t = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 8), torch.tensor([3.0, 800.0])
    raised = F.interpolate(low, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(x, t, condition=low), plain(torch.cat([x, raised], dim=1), t))
    with pytest.raises(ValueError, match="from a condition: it must be given one"):
        network(x, t)
    with pytest.raises(ValueError, match="condition must be None"):
        plain(x, t, condition=low)
