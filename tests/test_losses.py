"""The losses by closed forms, and the perceptual distance against lpips."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl

from src.config import UserError, validate
from src.losses import (
    Perceptual,
    PerceptualConfig,
    commitment_loss,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
    kl_divergence,
    reconstruction_loss,
)
from src.models.pretrained import import_torchvision


def random_images(size: int = 32, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.rand(batch, channels, size, size) * 2 - 1


# ---------------------------------------------------------------------------------------------- closed forms


def test_reconstruction_loss_is_the_mean_of_the_difference_or_its_square() -> None:
    reconstruction, images = torch.tensor([[1.0, -1.0], [0.5, 3.0]]), torch.tensor([[0.0, 1.0], [0.5, 1.0]])
    reconstruction, images = reconstruction[:, None, None, :], images[:, None, None, :]
    assert reconstruction_loss("l1", reconstruction, images).tolist() == [1.5, 1.0]
    assert reconstruction_loss("mse", reconstruction, images).tolist() == [2.5, 2.0]


def test_reconstruction_loss_is_in_the_images_precision() -> None:
    images = random_images(8)
    reconstruction = (images + 0.1).bfloat16()
    values = reconstruction_loss("l1", reconstruction, images)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, (reconstruction.float() - images).abs().mean((1, 2, 3)))


def test_kl_divergence_is_that_of_torch_distributions() -> None:
    mean, logvar = torch.randn(3, 4, 5, 6).double(), torch.randn(3, 4, 5, 6).double() * 2
    wanted = reference_kl(Normal(mean, (logvar / 2).exp()), Normal(torch.zeros_like(mean), 1.0)).mean((1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, logvar), wanted)


def test_kl_divergence_of_the_standard_normal_is_zero_and_the_gradient_too() -> None:
    mean, logvar = (torch.zeros(2, 4, 3, 3, requires_grad=True) for _ in range(2))
    values = kl_divergence(mean, logvar)
    assert values.tolist() == [0, 0]
    values.sum().backward()
    assert mean.grad is not None and logvar.grad is not None
    assert bool((mean.grad == 0).all()) and bool((logvar.grad == 0).all())


def test_kl_divergence_is_counted_in_at_least_float32() -> None:
    mean, logvar = torch.full((1, 4, 2, 2), 300.0).half(), torch.full((1, 4, 2, 2), 12.0).half()
    values = kl_divergence(mean, logvar)
    assert values.dtype == torch.float32
    assert math.isclose(float(values), 0.5 * (300**2 + math.exp(12) - 13), rel_tol=1e-6)


def test_commitment_loss_pulls_the_encoder_alone() -> None:
    mean, vectors = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    values = commitment_loss(mean, vectors)
    torch.testing.assert_close(values, ((mean - vectors) ** 2).mean((1, 2, 3)))
    values.sum().backward()
    assert mean.grad is not None and vectors.grad is None
    torch.testing.assert_close(mean.grad, 2 * (mean - vectors).detach() / 48)


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).double()[:, None, None, :]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_generator_loss_hinge_by_its_closed_form() -> None:
    assert generator_loss("hinge", logits([1, -3], [0.5, 0])).tolist() == [1.0, -0.25]


def test_generator_loss_vanilla_by_its_closed_form() -> None:
    wanted = [-(math.log(sigmoid(1)) + math.log(sigmoid(-3))) / 2, -math.log(0.5)]
    assert generator_loss("vanilla", logits([1, -3], [0, 0])).tolist() == pytest.approx(wanted)


def test_discriminator_loss_hinge_by_its_closed_form() -> None:
    values = discriminator_loss("hinge", logits([2, 0], [1, 5]), logits([-2, 1], [-1, -7]))
    assert values.tolist() == [0.5 * (0 + 1 + 0 + 2) / 2, 0.0]


def test_discriminator_loss_vanilla_by_its_closed_form() -> None:
    values = discriminator_loss("vanilla", logits([2, -1], [0, 0]), logits([-3, 0.5], [0, 0]))
    real = -(math.log(sigmoid(2)) + math.log(sigmoid(-1))) / 2
    fake = -(math.log(1 - sigmoid(-3)) + math.log(1 - sigmoid(0.5))) / 2
    assert values.tolist() == pytest.approx([0.5 * (real + fake), math.log(2)])


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_the_adversaries_pull_in_opposite_directions(kind: Any) -> None:
    real, fake = (torch.zeros(1, 1, 2, 2, requires_grad=True) for _ in range(2))
    discriminator_loss(kind, real, fake).sum().backward()
    assert real.grad is not None and fake.grad is not None
    assert bool((real.grad < 0).all()) and bool((fake.grad > 0).all()), "real ones up, drawn ones down"
    fake.grad = None
    generator_loss(kind, fake).sum().backward()
    assert bool((fake.grad < 0).all()), "drawn ones up"


def test_discriminator_accuracy_is_the_share_judged_rightly() -> None:
    values = discriminator_accuracy(logits([1, 2], [-1, 1], [-1, -1]), logits([-1, -2], [-3, 2], [1, 1]))
    assert values.tolist() == [1.0, 0.5, 0.0]
    assert discriminator_accuracy(logits([0, 0]), logits([0, 0])).tolist() == [0.0], "undecided is not right"


# ---------------------------------------------------------------------------------------------- perceptual


@pytest.fixture(scope="module")
def lite() -> Perceptual:
    return Perceptual(PerceptualConfig(network="efficientnet_lite0"), sizes=[16, 32])


def test_equal_images_are_at_distance_zero(lite: Perceptual) -> None:
    images = random_images()
    assert lite(images, images).tolist() == [0, 0]


def test_the_distance_grows_with_noise(lite: Perceptual) -> None:
    images, noise = random_images(), torch.randn(2, 3, 32, 32)
    distances = torch.stack([lite((images + scale * noise).clamp(-1, 1), images) for scale in (0.03, 0.1, 0.3, 1.0)])
    assert distances.shape == (4, 2) and float(distances[0].min()) > 0
    assert bool((distances.diff(dim=0) > 0).all()), distances


def test_the_distance_is_the_mean_over_seven_widths_of_that_between_features_of_unit_length(lite: Perceptual) -> None:
    reconstruction, images = random_images(), random_images()
    ours, theirs = lite.network(reconstruction), lite.network(images)
    assert [part.shape[1] for part in ours] == [16, 24, 40, 80, 112, 192, 320]
    layers = [
        (nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)).square().sum(1).mean((1, 2))
        for a, b in zip(ours, theirs, strict=True)
    ]
    torch.testing.assert_close(lite(reconstruction, images), sum(layers) / 7)


def test_it_is_frozen_and_stays_in_eval(lite: Perceptual) -> None:
    nn.ModuleList([lite]).train()
    lite.train()
    assert not any(part.training for part in lite.modules())
    assert not any(parameter.requires_grad for parameter in lite.parameters())
    before = {name: value.clone() for name, value in lite.state_dict().items()}
    reconstruction = random_images().requires_grad_()
    lite(reconstruction, random_images()).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in lite.state_dict().items()), "no running statistics"


def test_gradients_reach_what_is_drawn_alone(lite: Perceptual) -> None:
    reconstruction, images = random_images().requires_grad_(), random_images().requires_grad_()
    lite(reconstruction, images).sum().backward()
    assert reconstruction.grad is not None and float(reconstruction.grad.abs().min(0).values.max()) > 0
    assert images.grad is None and all(parameter.grad is None for parameter in lite.parameters())


def test_grey_images_are_seen_in_three_equal_channels(lite: Perceptual) -> None:
    reconstruction, images = random_images(channels=1), random_images(channels=1)
    torch.testing.assert_close(lite(reconstruction, images), lite(reconstruction.repeat(1, 3, 1, 1), images.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("size", [1, 8, 16, 17])
def test_small_images_are_taken(lite: Perceptual, size: int) -> None:
    reconstruction, images = random_images(size), random_images(size)
    values = lite(reconstruction, images)
    assert values.shape == (2,) and bool(torch.isfinite(values).all()) and float(values.min()) > 0


def test_a_distance_does_not_depend_on_batch_mates(lite: Perceptual) -> None:
    reconstruction, images = random_images(batch=3), random_images(batch=3)
    together = lite(reconstruction, images)
    torch.testing.assert_close(lite(reconstruction[1:2], images[1:2]), together[1:2])


def test_random_features_are_the_same_in_every_run() -> None:
    reconstruction, images = random_images(), random_images()
    one = Perceptual(PerceptualConfig(network="random"))
    torch.manual_seed(123)
    other = Perceptual(PerceptualConfig(network="random"))
    assert (
        torch.equal(one(reconstruction, images), other(reconstruction, images)) and float(one(reconstruction, images).min()) > 0
    )


def test_efficientnet_weights_that_are_damaged_are_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="damaged.pth is damaged, or holds no weights; get it again"):
        Perceptual(PerceptualConfig(network="efficientnet_lite0", weights=str(path)))


# ---------------------------------------------------------------------------------------------- lpips

FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}


@pytest.mark.parametrize("network", ["alex", "vgg", "squeeze"])
def test_missing_weights_are_a_user_error_that_says_where_they_go_and_where_to_get_them(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        Perceptual(PerceptualConfig(network=network))
    message = str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints" / FILES[network]) in message
    assert f"https://download.pytorch.org/models/{FILES[network]}" in message
    assert "perceptual.weights" in message and "\n" not in message
    named = tmp_path / "mine.pth"
    with pytest.raises(UserError, match="mine.pth"):
        Perceptual(PerceptualConfig(network=network, weights=str(named)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet as torchvision would save it, drawn at random; of the classifier, which is large and unused, one bias."""
    torch.manual_seed(5)
    network = import_torchvision().models.alexnet(weights=None)
    expected = {
        name: value for name, value in network.state_dict().items() if name[:8] == "features" or name == "classifier.6.bias"
    }
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(expected, path)
    return path


@pytest.fixture(scope="module")
def alex(weights: Path) -> Perceptual:
    return Perceptual(PerceptualConfig(network="alex", weights=str(weights)), sizes=[64, 32])


def test_lpips_is_that_of_the_package_on_the_same_weights(alex: Perceptual, weights: Path) -> None:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    in_file = [value for name, value in torch.load(weights).items() if name.startswith("features")]
    in_network = list(reference.net.parameters())
    assert len(in_network) == len(in_file) == 10
    with torch.no_grad():
        for parameter, value in zip(in_network, in_file, strict=True):
            parameter.copy_(value)
    reconstruction, images = random_images(64, batch=3), random_images(64, batch=3)
    wanted = reference(reconstruction, images).flatten().detach()
    assert float(wanted.min()) > 1e-3
    torch.testing.assert_close(alex(reconstruction, images), wanted)


def test_lpips_is_zero_for_equal_images_frozen_and_takes_grey_ones(alex: Perceptual) -> None:
    images = random_images(64, channels=1)
    assert alex(images, images).tolist() == [0, 0]
    reconstruction = random_images(64, channels=1).requires_grad_()
    images.requires_grad_()
    alex.train()(reconstruction, images).sum().backward()
    assert reconstruction.grad is not None and images.grad is None
    assert not any(part.training for part in alex.modules())
    assert not any(parameter.requires_grad for parameter in alex.parameters())


def test_an_image_too_small_for_the_network_is_a_user_error(weights: Path) -> None:
    spec = PerceptualConfig(network="alex", weights=str(weights))
    with pytest.raises(UserError, match="'alex' cannot take images of 8 px.*efficientnet_lite0"):
        Perceptual(spec, sizes=[64, 8])


def damaged(path: Path, weights: Path, how: str) -> None:
    weights_in_file = torch.load(weights)
    if how == "cut short":
        path.write_bytes(weights.read_bytes()[:5000])
    elif how == "another network's":
        torch.save({f"other.{name}": value for name, value in weights_in_file.items()}, path)
    elif how == "another shape":
        torch.save({name: value[:1] for name, value in weights_in_file.items()}, path)
    else:
        torch.save([1, 2], path)


@pytest.mark.parametrize("how", ["cut short", "another network's", "another shape", "a list"])
def test_weights_that_are_damaged_or_of_something_else_are_a_user_error(how: str, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    damaged(path, weights, how)
    with pytest.raises(
        UserError, match="damaged.pth (is damaged, or holds no weights|holds the weights of another network)"
    ) as caught:
        Perceptual(PerceptualConfig(network="alex", weights=str(path)))
    assert "\n" not in str(caught.value)


def test_a_perceptual_network_that_is_not_known_is_a_user_error() -> None:
    with pytest.raises(UserError, match="did you mean 'alex'"):
        validate(PerceptualConfig, {"network": "alexx"})
