"""diffusers' AutoencoderDC, AutoencoderTiny and VQModel behind the interface of ours: whole, halved, and in shards."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.config import UserError
from src.interop.diffusers_import import read_whole
from src.runs.autoencoder import LatentCodec, kept_autoencoder, open_autoencoder, start_from
from src.runs.diffusers_autoencoder import autoencoder_from_config
from tests.conftest import randomise
from tests.interop.foreign_weights import CPU, message, unet_folder

TWO_LEVELS = {f"num_{part}_blocks": (1, 2) for part in ("encoder", "decoder")}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
DEEP = {
    f"{part}_{key}": value
    for part in ("encoder", "decoder")
    for key, value in {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 16),
        "layers_per_block": (1, 1),
        "qkv_multiscales": ((), (5,)),
    }.items()
}
CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderTiny": {
        **TWO_LEVELS,
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "latent_channels": 4,
    },
    "AutoencoderDC": {**DEEP, "latent_channels": 4, "attention_head_dim": 8, "scaling_factor": 0.5},
    "VQModel": {
        **BLOCKS,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "latent_channels": 3,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 16,
    },
}
SCALING = {"AutoencoderTiny": (0.0, 1.0), "AutoencoderDC": (0.0, 2.0), "VQModel": (0.0, 1 / 0.18215)}


def network_of(class_name: str) -> Any:
    network = autoencoder_from_config(CONFIGS[class_name], class_name).network
    randomise(network)
    return network.eval()


@torch.no_grad()
def theirs(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What diffusers itself encodes and decodes."""
    latents = network.encode(images, return_dict=False)[0]
    return latents, network.decode(latents, return_dict=False)[0]


@pytest.mark.parametrize("class_name", list(CONFIGS))
def test_it_encodes_and_decodes_as_diffusers_does(class_name: str, tmp_path: Path) -> None:
    network = network_of(class_name)
    network.save_pretrained(tmp_path / "theirs")
    opened = open_autoencoder(str(tmp_path / "theirs"), CPU)
    assert (opened.channels, opened.latent_channels, opened.factor) == (3, 4, 2)
    assert opened.scaling == pytest.approx(SCALING[class_name]) and opened.document["class"] == class_name
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, decoded = theirs(network, images)
    with torch.no_grad():
        mean, logvar = opened.network.moments(images)
        torch.testing.assert_close(mean, latents, rtol=0, atol=1e-6)
        torch.testing.assert_close(opened.network.decode(mean), decoded, rtol=0, atol=1e-6)
        assert logvar is None and mean.shape == (2, 4, 8, 6), "its latents are not drawn"
        codec = LatentCodec(opened.network, [0.1] * 4, [2.0] * 4)
        torch.testing.assert_close(codec.encode(images, range(2)), (latents - 0.1) / 2, rtol=0, atol=1e-6)
        torch.testing.assert_close(codec.decode(codec.encode(images, range(2))), decoded, rtol=0, atol=1e-4)

    opened.keep(tmp_path / "run" / "autoencoder")  # as a latent run does
    shutil.rmtree(tmp_path / "theirs")
    from_run = kept_autoencoder(tmp_path / "run", CPU)
    assert from_run.digest == opened.digest and from_run.document["class"] == class_name
    with torch.no_grad():
        torch.testing.assert_close(from_run.network.decode(latents), decoded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("class_name", [*CONFIGS, "AutoencoderKL"])
def test_half_precision_and_shards(class_name: str, tmp_path: Path) -> None:
    """Shards hold the same weights; those of the variant fp16 are the weights in half precision, used in float32."""
    CONFIGS.setdefault("AutoencoderKL", {key: CONFIGS["VQModel"][key] for key in (*BLOCKS, "block_out_channels")})
    CONFIGS["AutoencoderKL"]["norm_num_groups"] = 4
    network = network_of(class_name)
    for name in ("theirs", "both"):
        network.save_pretrained(tmp_path / name)
    network.save_pretrained(tmp_path / "shards", max_shard_size="12KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = (open_autoencoder(str(tmp_path / name), CPU) for name in ("theirs", "shards"))
    assert shards.digest == whole.digest

    halved = network_of(class_name).half()
    for name in ("half", "both"):
        halved.save_pretrained(tmp_path / name, variant="fp16")
    halved.save_pretrained(tmp_path / "half_shards", variant="fp16", max_shard_size="6KB")
    assert len(list((tmp_path / "half_shards").glob("*fp16*.safetensors"))) > 1
    half, half_shards = (open_autoencoder(str(tmp_path / name), CPU) for name in ("half", "half_shards"))
    assert half.digest == half_shards.digest != whole.digest
    for name, value in half.network.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, whole.network.state_dict()[name].half().float()), name
    both = open_autoencoder(str(tmp_path / "both"), CPU)
    assert both.digest == whole.digest, "full precision comes first"

    next(iter(sorted((tmp_path / "shards").glob("*-00002-of-*.safetensors")))).unlink()
    assert "the weights are in shards, and diffusion_pytorch_model-00002-of-" in message(
        open_autoencoder, str(tmp_path / "shards"), CPU
    )


def test_a_pipeline_with_a_codebook_is_imported(tmp_path: Path) -> None:
    """diffusers' LDMPipeline has a UNet2DModel beside a VQModel in vqvae/."""
    unet_folder(tmp_path / "ldm" / "unet", in_channels=4, out_channels=4)
    network_of("VQModel").save_pretrained(tmp_path / "ldm" / "vqvae")
    imported = read_whole(tmp_path / "ldm")
    assert imported.autoencoder is not None and imported.autoencoder.document["class"] == "VQModel"
    assert imported.channels == 3 and imported.latents is not None
    assert imported.latents["std"] == pytest.approx([1 / 0.18215] * 4)
    opened = open_autoencoder(str(tmp_path / "ldm"), CPU)
    assert opened.digest == imported.autoencoder.digest and "a part of the pipeline" in opened.notes[0]
    assert "is a VQModel, which needs no conversion" in message(read_whole, tmp_path / "ldm" / "vqvae")


def test_what_cannot_be_used(tmp_path: Path) -> None:
    def saved(class_name: str, **options: Any) -> str:
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CONFIGS, class_name, {**CONFIGS[class_name], **options})
            from diffusers import AutoencoderDC, AutoencoderTiny, VQModel

            classes = {each.__name__: each for each in (AutoencoderDC, AutoencoderTiny, VQModel)}
            randomise(classes[class_name](**CONFIGS[class_name])).save_pretrained(tmp_path / "theirs")
        return message(open_autoencoder, str(tmp_path / "theirs"), CPU)

    assert "AutoencoderTiny, here with images of another size" in saved("AutoencoderTiny", upsampling_scaling_factor=4)
    assert "AutoencoderDC with scaling_factor 0" in saved("AutoencoderDC", scaling_factor=0)
    network_of("VQModel").save_pretrained(tmp_path / "vq")
    with pytest.raises(UserError, match=r"is diffusers' VQModel, and train_vae\.py starts from autoencoders of its own"):
        start_from(str(tmp_path / "vq"))
    weights = tmp_path / "vq" / "diffusion_pytorch_model.safetensors"
    network_of("AutoencoderTiny").save_pretrained(tmp_path / "tiny")
    shutil.copy(tmp_path / "tiny" / weights.name, weights)
    assert "it holds a network of diffusers' AutoencoderTiny" in message(open_autoencoder, str(tmp_path / "vq"), CPU)


def test_a_pipeline_with_a_transformer_says_that_it_is_none_with_a_unet(tmp_path: Path) -> None:
    for place, kind in {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}.items():
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps({"_class_name": kind}))
    fault = message(read_whole, tmp_path)
    assert "holds no diffusers U-Net" in fault and "it holds transformer (DiTTransformer2DModel), vae (AutoencoderKL)" in fault
