"""The U-Net against diffusers, and each of its options."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from src.config import UserError, validate
from src.interop.unet_2d import unet_from_diffusers
from src.models import UNet, UNetConfig
from src.models.layers import Attention, sinusoidal_embedding
from src.models.pretrained import import_torchvision
from tests.conftest import randomise

SMALL = {"base_channels": 16, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "full"], "norm_groups": 8}

NORM = partial(nn.GroupNorm, 4)


def unet(num_classes: int | None = None, scale: float = 0.1, **options: object) -> UNet:
    network = UNet(validate(UNetConfig, {**SMALL, **options}), in_channels=3, num_classes=num_classes)
    randomise(network, scale)
    return network.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "attention_head_dim": None,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
            "norm_eps": 1e-6,
        },
        {
            "resnet_time_scale_shift": "scale_shift",
            "num_class_embeds": 5,
            "attention_head_dim": 4,
            "add_attention": False,
        },
        {"num_class_embeds": 5, "layers_per_block": 1, "norm_num_groups": 4},
    ],
    ids=["plain", "ddpm", "scale_shift_classes", "classes"],
)
def test_a_diffusers_unet_gives_the_same_output(options: dict) -> None:
    import_torchvision()
    from diffusers import UNet2DModel

    theirs = UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32, 32),
            "layers_per_block": 2,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    )
    randomise(theirs)
    ours = unet_from_diffusers(theirs.config, theirs.state_dict())
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 17, 999])
    labels = torch.tensor([0, 2, 4]) if "num_class_embeds" in options else None
    with torch.no_grad():
        reference = theirs.eval()(x, t, class_labels=labels).sample
        output = ours(x, t.float(), labels)
    assert reference.std() > 0.1
    torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-4)


def test_a_diffusers_unet_that_we_have_no_option_for_is_refused() -> None:
    with pytest.raises(UserError, match="time_embedding_type"):
        unet_from_diffusers({"time_embedding_type": "fourier", "block_out_channels": [8]}, {})


@pytest.mark.parametrize(
    "options",
    [
        {"downsample": down, "upsample": up}
        for down, up in [
            ("conv", "conv"),
            ("conv_right", "nearest"),
            ("average", "nearest"),
            ("max", "conv"),
            ("residual", "residual"),
        ]
    ]
    + [
        {"attention": ["linear", "full"], "num_heads": 2},
        {"head_channels": 8, "split_qkv_first": False},
        {"embedding": "add", "mid_attention": "none"},
        {"mid_attention": "linear", "blocks": 2},
    ],
    ids=str,
)
def test_every_option_trains_every_parameter(options: dict) -> None:
    network = unet(**options)
    x = torch.randn(2, 3, 8, 8)
    network(x, torch.tensor([3.0, 800.0])).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_each_option_changes_the_output() -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 800.0])
    base = unet(num_heads=2, scale=0.3)(x, t)
    for options in (
        {"num_heads": 4},
        {"num_heads": 2, "split_qkv_first": False},
        {"num_heads": 2, "norm_eps": 1e-2},
        {"num_heads": 2, "time_embedding": {"order": "sin_cos"}},
        {"num_heads": 2, "time_embedding": {"frequency_shift": 1.0}},
        {"num_heads": 2, "time_embedding": {"scale": 2.0}},
    ):
        assert not torch.allclose(unet(scale=0.3, **options)(x, t), base, atol=1e-3), options


def test_gradient_checkpointing_changes_nothing() -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 800.0])
    gradients = []
    for on in (False, True):
        network = unet(gradient_checkpointing=on, dropout=0.5).train()
        torch.manual_seed(7)
        network(x, t).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_no_labels_means_the_null_class() -> None:
    network = unet(num_classes=4)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 800.0])
    torch.testing.assert_close(network(x, t), network(x, t, torch.tensor([4, 4])))
    assert not torch.allclose(network(x, t), network(x, t, torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="no classes"):
        unet()(x, t, torch.tensor([0, 1]))
    bare = UNet(validate(UNetConfig, SMALL), num_classes=4, null_class=False)
    with pytest.raises(ValueError, match="null class"):
        bare(x, t)


def test_a_fresh_network_gives_zero() -> None:
    network = UNet(validate(UNetConfig, SMALL), in_channels=1, out_channels=2)
    out = network(torch.randn(1, 1, 8, 8), torch.tensor([5.0]))
    assert out.shape == (1, 2, 8, 8) and bool((out == 0).all())


def test_dropout_acts_while_training_alone() -> None:
    network = unet(dropout=0.5)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([5.0])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


@pytest.mark.parametrize("split_qkv_first", [True, False])
def test_attention_by_its_formula(split_qkv_first: bool) -> None:
    heads, channels = 2, 8
    layer = randomise(Attention(channels, kind="full", heads=heads, split_qkv_first=split_qkv_first, norm=NORM), scale=0.5)
    x = torch.randn(1, channels, 3, 3)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)[0]  # (9, 8)
    projected = layer.qkv(tokens)
    d = channels // heads
    mixed = []
    for head in range(heads):
        if split_qkv_first:
            q, k, v = (projected[:, part * channels + head * d : part * channels + (head + 1) * d] for part in range(3))
        else:
            q, k, v = (projected[:, (head * 3 + part) * d : (head * 3 + part + 1) * d] for part in range(3))
        mixed.append((q @ k.T / d**0.5).softmax(1) @ v)
    wanted = x + layer.out(torch.cat(mixed, dim=1)).T.reshape(1, channels, 3, 3)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_linear_attention_by_its_formula() -> None:
    layer = randomise(Attention(8, kind="linear", heads=1, split_qkv_first=True, norm=NORM), scale=0.5)
    x = torch.randn(1, 8, 3, 3)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)[0]
    q, k, v = layer.qkv(tokens).chunk(3, dim=1)
    mixed = q.softmax(1) @ (k.softmax(0).T @ v)
    torch.testing.assert_close(layer(x), x + layer.out(mixed).T.reshape(1, 8, 3, 3), rtol=1e-4, atol=1e-5)


def test_sinusoidal_embedding_by_its_formula() -> None:
    time = torch.tensor([0.0, 1.0, 250.0])
    embedding = sinusoidal_embedding(time, 6, order="cos_sin", frequency_shift=1.0)
    frequencies: Tensor = torch.tensor([1.0, 1e4 ** (-1 / 2), 1e-4])
    torch.testing.assert_close(embedding[:, :3], torch.cos(time[:, None] * frequencies))
    torch.testing.assert_close(embedding[:, 3:], torch.sin(time[:, None] * frequencies))
    assert sinusoidal_embedding(time, 7, order="sin_cos", frequency_shift=0).shape == (3, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": ["none"]}, "entries"),
        ({"num_heads": 2, "head_channels": 8}, "not both"),
        ({"norm_groups": 7}, "norm_groups 7"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"head_channels": 12}, "head_channels 12"),
    ],
)
def test_architectures_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(UNetConfig, {**SMALL, **change})


def test_patches_are_channels_of_a_smaller_image() -> None:
    """The same weights on the same numbers: a network of patches is a plain one of p^2 times the channels in between."""
    patched = unet(patch=2)
    plain = UNet(validate(UNetConfig, SMALL), in_channels=12)
    plain.load_state_dict(patched.state_dict())
    assert patched.config.factor == 4 and plain.config.factor == 2
    x, time = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    squares = torch.stack([x[:, :, i::2, j::2] for i in range(2) for j in range(2)], dim=2).flatten(1, 2)
    wanted = plain.eval()(squares, time).unflatten(1, (3, 2, 2))
    output = patched(x, time)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(output[:, :, i::2, j::2], wanted[:, :, i, j])


def test_patches_with_a_learned_variance_and_beside_a_smaller_image() -> None:
    network = UNet(validate(UNetConfig, {**SMALL, "patch": 2}), in_channels=3, out_channels=6, condition_channels=3)
    randomise(network)
    x, low = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 8, 8)
    assert network(x, torch.ones(1), condition=low).shape == (1, 6, 16, 16)
    assert not torch.equal(network(x, torch.ones(1), condition=low), network(x, torch.ones(1), condition=-low))
