"""The noisy classifier: its pools by their formulas, and the half of the U-Net that it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.config import UserError, validate
from src.models import Classifier, ClassifierConfig, UNet, UNetConfig
from src.models.classifier import AttentionPool
from src.models.unet import Block
from tests.conftest import randomise

SHARED = {"base_channels": 16, "channel_mult": [1, 2], "blocks": 2, "attention": ["none", "full"], "norm_groups": 8}
SMALL = {**SHARED, "head_channels": 8}
POOLS = ("attention", "adaptive", "spatial")


def classifier(scale: float = 0.1, **options: object) -> Classifier:
    network = Classifier(validate(ClassifierConfig, {**SMALL, **options}), image_size=8, num_classes=5)
    randomise(network, scale)
    return network.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def t() -> Tensor:
    return torch.tensor([3.0, 800.0])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"downsample": "conv", "embedding": "add"},
        {"head_channels": None, "num_heads": 2, "attention": ["full", "none"]},
        {"mid_attention": "none", "channel_mult": [0.5, 1]},
    ],
    ids=str,
)
def test_every_option_trains_every_parameter(pool: str, options: dict, x: Tensor, t: Tensor) -> None:
    network = classifier(pool=pool, **options)
    logits = network(x, t)
    assert logits.shape == (2, 5) and not torch.allclose(logits[0], logits[1])
    F.cross_entropy(logits, torch.tensor([0, 3])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_the_attention_pool_by_its_formula() -> None:
    channels, heads, d = 8, 2, 4
    pool = AttentionPool(channels, 9, 5, heads=heads)
    randomise(pool, 0.5)
    x = torch.randn(1, channels, 3, 3)
    pixels = x[0].flatten(1)  # (8, 9)
    tokens = torch.cat([pixels.mean(1, keepdim=True), pixels], dim=1) + pool.positional_embedding  # (8, 10)
    q, k, v = (pool.qkv.weight @ tokens + pool.qkv.bias[:, None]).split(channels)
    mixed = []
    for head in range(heads):
        rows = slice(head * d, (head + 1) * d)
        weight = (q[rows, :1].T @ k[rows] / d**0.5).softmax(1)  # (1, 10)
        mixed.append(v[rows] @ weight.T)  # (4, 1)
    torch.testing.assert_close(pool(x), pool.out(torch.cat(mixed).T), rtol=1e-4, atol=1e-5)


def test_the_spatial_pool_sees_all_that_the_encoder_computes(x: Tensor, t: Tensor) -> None:
    network, features = classifier(pool="spatial", scale=0.3), []
    down = [f"down.{part}" for part in ("0.blocks.0", "0.blocks.1", "0.resample", "1.blocks.0", "1.blocks.1")]
    for name in ["stem", *down, "mid.1"]:
        network.get_submodule(name).register_forward_hook(lambda module, inputs, output: features.append(output))
    logits = network(x, t)
    assert [h.shape[1] for h in features] == [16, 16, 16, 16, 32, 32, 32] == [*network.config.skips, 32]
    features = torch.cat([h.mean(dim=(2, 3)) for h in features], dim=1)
    hidden, last = network.get_submodule("head.0"), network.get_submodule("head.2")
    assert hidden.weight.shape == (2048, 160)
    torch.testing.assert_close(logits, last(hidden(features).relu()))


def test_the_adaptive_pool_is_linear_in_the_mean_and_starts_at_zero(x: Tensor, t: Tensor) -> None:
    fresh = Classifier(validate(ClassifierConfig, {**SMALL, "pool": "adaptive"}), image_size=8, num_classes=5)
    assert bool((fresh(x, t) == 0).all())
    network, features = classifier(pool="adaptive"), []
    assert network.head_norm is not None
    network.head_norm.register_forward_hook(lambda module, inputs, output: features.append(output))
    logits = network(x, t)
    torch.testing.assert_close(logits, network.head(F.silu(features[0]).mean(dim=(2, 3))))


def test_it_is_the_encoder_of_the_unet(x: Tensor, t: Tensor) -> None:
    """Same names and shapes, the same numbers, and nothing of the way up."""
    network = classifier(num_heads=2, head_channels=None, split_qkv_first=True, downsample="conv")
    unet = UNet(validate(UNetConfig, {**SHARED, "num_heads": 2}))
    shared = ("time_in.", "time_out.", "stem.", "down.", "mid.")
    wanted = {name: value for name, value in network.state_dict().items() if name.startswith(shared)}
    assert wanted.keys() == {name for name in unet.state_dict() if name.startswith(shared)}
    assert {name.split(".")[0] for name in network.state_dict()} == {*(name[:-1] for name in shared), "head_norm", "head"}
    assert unet.load_state_dict(wanted, strict=False).unexpected_keys == []
    middles = []
    for each in (network, unet.eval()):
        each.mid[1].register_forward_hook(lambda module, inputs, output: middles.append(output))
        each(x, t)
    assert torch.equal(*middles) and middles[0].std() > 0.1
    assert sum(isinstance(module, Block) for module in network.modules()) == 6


def test_each_option_changes_the_output(x: Tensor, t: Tensor) -> None:
    base = classifier(scale=0.3)(x, t)
    for options in (
        {"head_channels": 16},
        {"head_channels": None, "num_heads": 2},
        {"split_qkv_first": True},
        {"norm_eps": 1e-2},
        {"time_embedding": {"order": "sin_cos"}},
    ):
        assert not torch.allclose(classifier(scale=0.3, **options)(x, t), base, atol=1e-3), options


def test_gradient_checkpointing_changes_nothing(x: Tensor, t: Tensor) -> None:
    gradients = []
    for on in (False, True):
        network = classifier(gradient_checkpointing=on, dropout=0.5).train()
        image = x.clone().requires_grad_()
        torch.manual_seed(7)
        network(image, t).log_softmax(1)[:, 2].sum().backward()
        gradients.append([image.grad, *(p.grad for p in network.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_guided_diffusions_choices_are_the_defaults() -> None:
    config = validate(ClassifierConfig, {})
    assert (config.head_channels, config.split_qkv_first, config.pool) == (64, False, "attention")
    assert (config.downsample, config.embedding, config.mid_attention) == ("residual", "scale_shift", "full")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": ["none"]}, "entries"),
        ({"num_heads": 2}, "not both"),
        ({"norm_groups": 7}, "norm_groups 7"),
        ({"head_channels": 12}, "head_channels 12"),
        (
            {"head_channels": None, "num_heads": 3, "attention": ["none", "none"], "mid_attention": "none"},
            "32 channels that are pooled",
        ),
        ({"pool": "mean"}, "attention"),
        ({"upsample": "conv"}, "unknown key"),
    ],
)
def test_architectures_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(ClassifierConfig, {**SMALL, **change})


def test_images_that_do_not_fit(t: Tensor) -> None:
    with pytest.raises(UserError, match="image_size 9 is not divisible by 2"):
        Classifier(validate(ClassifierConfig, SMALL), image_size=9, num_classes=5)
    with pytest.raises(ValueError, match="images of 8 x 8 px, not 16 x 16"):
        classifier()(torch.randn(2, 3, 16, 16), t)
    for pool in ("adaptive", "spatial"):
        assert classifier(pool=pool)(torch.randn(2, 3, 16, 16), t).shape == (2, 5), "only attention learns positions"
