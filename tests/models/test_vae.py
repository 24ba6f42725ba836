"""The autoencoder, its codebook, the tiles it draws large images in, and the discriminator."""

import itertools
import math

import pydantic
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.config import UserError, validate
from src.models import VAE, Discriminator, DiscriminatorConfig, VAEConfig
from src.models import vae as module
from src.models.vae import Codebook, VQBottleneck
from tests.conftest import randomise

SMALL = {"widths": [8, 16], "latent_channels": 3, "blocks": 1, "norm_groups": 4}
VQ = {"kind": "vq", "codes": 12}
STRAY = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def vae(scale: float = 0.2, channels: int = 3, **options: object) -> VAE:
    network = VAE(validate(VAEConfig, {**SMALL, **options}), channels)
    randomise(network, scale)
    return network.eval()


def codebook(codes: int = 6, channels: int = 3, **options: object) -> Codebook:
    return Codebook(validate(VQBottleneck, {"kind": "vq", "codes": codes, **options}), channels).double()


def latents(network: VAE, images: Tensor) -> tuple[int, ...]:
    return len(images), *network.spec.latent_shape(images.shape[-1])


# ---------------------------------------------------------------------------------------------- the network

OPTIONS = [
    {"upsample": "bilinear"},
    {"upsample": "nearest", "downsample": "max"},
    {"bottleneck": VQ},
    {"bottleneck": VQ, "upsample": "bilinear", "downsample": "max"},
    {"attention": ["linear", "full"], "head_channels": 4},
    {"attention": ["none", "linear"], "mid_attention": "full", "blocks": 2},
    {"bottleneck": VQ, "attention": ["full", "none"], "mid_attention": "none"},
    {"widths": [8, 8, 12], "attention": ["none", "none", "linear"]},
    {"widths": [8]},
    {"downsample": "conv", "upsample": "transposed"},
    {"downsample": "conv"},
    {"bottleneck": VQ, "upsample": "transposed"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_gives_images_of_the_size_that_came_in_and_latents_of_the_shape_that_the_config_says(
    options: dict,
) -> None:
    network = vae(**options)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    shape = latents(network, images)
    reconstruction = network(images, torch.randn(shape))
    assert reconstruction.images.shape == images.shape and bool(torch.isfinite(reconstruction.images).all())
    assert reconstruction.mean.shape == shape == (2, 3, 16 // network.spec.factor, 16 // network.spec.factor)
    if network.vq:
        assert reconstruction.logvar is None and reconstruction.codes is not None
        assert reconstruction.codes.shape == (2, *shape[2:]) and reconstruction.codes.dtype == torch.int64
        assert int(reconstruction.codes.min()) >= 0 and int(reconstruction.codes.max()) < 12
    else:
        assert reconstruction.codes is None and reconstruction.logvar is not None and reconstruction.logvar.shape == shape
    assert network.decode(reconstruction.mean).shape == images.shape


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_every_parameter(options: dict) -> None:
    network = vae(**options).train()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    network(images, torch.randn(latents(network, images))).images.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_each_option_changes_the_image() -> None:
    base_options = {"widths": [8, 16], "attention": ["none", "linear"], "mid_attention": "linear"}
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    noise = torch.randn(1, 3, 8, 8)
    base = vae(**base_options)(images, noise).images
    for change in (
        {"upsample": "bilinear"},
        {"downsample": "max"},
        {"downsample": "conv"},
        {"upsample": "transposed"},
        {"head_channels": 4},
        {"attention": ["none", "full"]},
        {"mid_attention": "full"},
        {"norm_groups": 2},
    ):
        images_of_option = vae(**{**base_options, **change})(images, noise).images
        assert not torch.allclose(images_of_option, base, atol=1e-4), change


def test_the_factor_is_a_halving_for_each_resolution_after_the_first() -> None:
    for n in range(1, 5):
        spec = validate(VAEConfig, {"widths": [8] * n, "latent_channels": 5})
        assert spec.factor == 2 ** (n - 1)
        assert spec.latent_shape(64) == (5, 64 // 2 ** (n - 1), 64 // 2 ** (n - 1))


def test_the_legacy_pair_halves_and_doubles_exactly_on_the_meta_device() -> None:
    for widths in ([8], [8, 16], [8, 16, 16], [8, 16, 16, 24]):
        options = {"widths": widths, "downsample": "conv", "upsample": "transposed", "latent_channels": 3}
        spec = validate(VAEConfig, options)
        with torch.device("meta"):
            network = VAE(spec, 3)
            for height, width in ((1, 1), (3, 5), (7, 2)):  # of the latents: odd ones, too
                images = torch.zeros(2, 3, height * spec.factor, width * spec.factor)
                reconstruction = network(images, torch.zeros(2, 3, height, width))
                assert reconstruction.images.shape == images.shape and reconstruction.mean.shape == (2, 3, height, width)
        layers = [type(module).__name__ for module in network.modules()]
        strided = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2)]
        assert layers.count("ConvTranspose2d") == len(strided) == len(widths) - 1


def test_the_defaults_are_what_they_were() -> None:
    spec = validate(VAEConfig, {})
    assert (spec.downsample, spec.upsample) == ("average", "nearest")
    assert not any(isinstance(module, torch.nn.ConvTranspose2d) for module in VAE(spec, 3).modules())


def test_images_may_be_wide_or_grey() -> None:
    network = vae(channels=1)
    images = torch.rand(2, 1, 8, 20)
    mean, _ = network.moments(images)
    assert mean.shape == (2, 3, 4, 10)
    assert network.decode(mean).shape == images.shape


def test_logvar_is_held_between_minus_30_and_20() -> None:
    network = vae()
    last = network.encoder.layers[-1]
    assert isinstance(last, nn.Conv2d)
    for bias, wanted in ((1e4, 20.0), (-1e4, -30.0)):
        with torch.no_grad():
            last.bias.fill_(bias)
        with torch.no_grad():
            mean, logvar = network.moments(torch.randn(1, 3, 8, 8))
        assert logvar is not None and bool((logvar == wanted).all())
        assert float(mean.abs().min()) > 9000, "the mean is not held"


def test_with_zero_noise_forward_is_the_decoded_mean() -> None:
    for options in ({}, {"bottleneck": VQ}):
        network = vae(**options)
        images = torch.randn(2, 3, 16, 16)
        reconstruction = network(images, torch.zeros(2, 3, 8, 8))
        torch.testing.assert_close(reconstruction.images, network.decode(network.moments(images)[0]), rtol=1e-5, atol=1e-6)


def test_the_noise_is_scaled_by_the_standard_deviation() -> None:
    network = vae().double()
    images, noise = torch.randn(2, 3, 16, 16).double(), torch.randn(2, 3, 8, 8).double()
    mean, logvar = network.moments(images)
    assert logvar is not None
    torch.testing.assert_close(network(images, noise).images, network.decode(mean + logvar.exp().sqrt() * noise))


def test_a_codebook_takes_no_notice_of_the_noise() -> None:
    network = vae(bottleneck=VQ)
    images = torch.randn(1, 3, 16, 16)
    one, other = (network(images, torch.randn(1, 3, 8, 8)).images for _ in range(2))
    assert torch.equal(one, other)


@torch.no_grad()
def test_tanh_bounds_what_is_drawn_and_is_no_part_of_the_weights() -> None:
    network = vae(scale=0.3)
    names = set(network.state_dict())
    z = torch.randn(1, 3, 8, 8)
    unbounded, tiled = network.decode(z), network.decode(z, tile=4)
    network.tanh = True
    assert float(unbounded.abs().max()) > 1, "this network draws outside of (-1, 1)"
    torch.testing.assert_close(network.decode(z), unbounded.tanh())
    assert float(network.decode(z, tile=4).abs().max()) < 1 < float(tiled.abs().max())
    assert set(network.state_dict()) == names


@pytest.mark.parametrize("bottleneck", [{"kind": "kl"}, VQ], ids=["kl", "vq"])
def test_gradient_checkpointing_gives_the_same_gradients(bottleneck: dict) -> None:
    images, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
    gradients = []
    for on in (False, True):
        network = vae(bottleneck=bottleneck, attention=["none", "linear"], gradient_checkpointing=on).train()
        if network.codebook is not None:
            network.codebook.codebook.copy_(torch.linspace(-1, 1, 36).reshape(12, 3))
        network(images, noise).images.square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_image_does_not_depend_on_the_others_of_its_batch(options: dict) -> None:
    network = vae(**options).double().train()
    assert not any(isinstance(part, STRAY) for part in network.modules())
    images = torch.randn(3, 3, 16, 16).double()
    noise = torch.randn(latents(network, images)).double()
    together = network(images, noise)
    for i in range(3):
        single = network(images[i : i + 1], noise[i : i + 1])
        for ours, theirs in zip(single, together, strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, theirs[i : i + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": ["none"]}, "attention has 1 entries and widths 2"),
        ({"norm_groups": 3}, "norm_groups 3 does not divide a width of 8"),
        ({"widths": [8, 18]}, "norm_groups 4 does not divide a width of 18"),
        ({"head_channels": 3}, "head_channels 3 does not divide 16"),
        ({"head_channels": 16, "attention": ["linear", "none"]}, "head_channels 16 does not divide 8"),
        ({"widths": []}, "widths"),
        ({"attention": ["some", "none"]}, "'some' is not known"),
        ({"bottleneck": {"kind": "vq", "codes": 1}}, "codes"),
        ({"bottleneck": {"kind": "kl", "codes": 9}}, "codes"),
    ],
)
def test_architectures_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(VAEConfig, {**SMALL, **change})


def test_a_config_built_by_hand_is_checked_too() -> None:
    with pytest.raises(pydantic.ValidationError, match="norm_groups 8"):
        VAEConfig(widths=(12,))
    with pytest.raises(pydantic.ValidationError, match="norm_groups 8"):
        DiscriminatorConfig(base_channels=12)


def test_head_channels_matter_only_where_there_is_attention() -> None:
    assert validate(VAEConfig, {**SMALL, "head_channels": 16}).head_channels == 16  # 8 channels are without
    assert validate(VAEConfig, {**SMALL, "head_channels": 3, "mid_attention": "none"}).head_channels == 3


# ---------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("bottleneck", [{"kind": "kl"}, VQ], ids=["kl", "vq"])
def test_a_tile_as_large_as_the_image_is_the_whole(bottleneck: dict) -> None:
    network = vae(bottleneck=bottleneck)
    z = torch.randn(1, 3, 6, 9)
    whole = network.decode(z, tile=None)
    assert torch.equal(network.decode(z, tile=9), whole) and torch.equal(network.decode(z), whole)
    assert not torch.equal(network.decode(z, tile=8), whole), "a smaller one is not"


@pytest.mark.parametrize("tile", [2, 3, 4, 5, 7, 8, 12])
def test_tiles_cover_every_pixel_with_weights_that_add_up_to_one(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = vae()
    monkeypatch.setattr(network, "_draw", lambda h: F.interpolate(h, scale_factor=2.0))  # tiles that agree where they meet
    network.last.out_channels = 16  # of the middle
    for height, width in ((13, 17), (4, 13), (13, 3), (8, 9)):
        z = torch.randn(2, 3, height, width)
        with torch.no_grad():
            wanted = F.interpolate(network.middle(z), scale_factor=2.0)
            torch.testing.assert_close(network.decode(z, tile=tile), wanted, rtol=1e-5, atol=1e-5)


def test_no_tile_is_larger_than_asked() -> None:
    network = vae()
    shapes: list[tuple[int, ...]] = []
    network.up.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[2:])))
    with torch.no_grad():
        network.decode(torch.randn(1, 3, 21, 5), tile=8)
    assert shapes == [(8, 5)] * 4, "rows start at 0, 6, 12 and 13"


def jumps(network: VAE, z: Tensor, tile: int) -> tuple[float, float, float]:
    """Between columns of the tiled image: the largest mean jump where a tile begins or ends; elsewhere the largest and the
    mean."""
    factor, stride = network.spec.factor, tile - max(1, tile // 4)
    with torch.no_grad():
        images = network.decode(z, tile=tile)
    starts = module._starts(z.shape[3], tile, stride)
    borders = sorted({x * factor for start in starts for x in (start, start + tile)} - {0, z.shape[3] * factor})
    assert len(borders) >= 4
    steps = (images[..., 1:] - images[..., :-1]).abs().mean((0, 1, 2))  # steps[x - 1] is between the columns x - 1 and x
    at = torch.zeros(len(steps), dtype=torch.bool)
    at[[x - 1 for x in borders]] = True
    rim = torch.ones(len(steps), dtype=torch.bool)
    rim[2 * factor : -2 * factor] = False  # the image's own, padded with zeros
    others = steps[~at & ~rim]
    return float(steps[at].max()), float(others.max()), float(others.mean())


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_there_are_no_seams(upsample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = vae(widths=[8, 8, 8], upsample=upsample, attention=["none", "none", "linear"])
    coarse = torch.randn(8, 3, 2, 4)
    z = F.interpolate(coarse, (16, 56), mode="bilinear", align_corners=True)  # smooth: a seam would stand out
    border, largest, _ = jumps(network, z, tile=16)
    assert border < largest, "what jumps where tiles meet is less than what jumps within an image"
    monkeypatch.setattr(module, "_ramp", lambda length, fade: torch.ones(length, dtype=torch.float64))
    seam, largest, mean = jumps(network, z, tile=16)
    assert seam > max(largest, 5 * mean), "tiles that do not fade leave seams, and this test sees them"
    assert border < seam / 3


@pytest.mark.parametrize(("length", "tile", "stride"), [(10, 4, 3), (11, 4, 3), (4, 4, 3), (3, 4, 3), (5, 4, 3), (100, 64, 48)])
def test_tiles_overlap_and_the_last_ends_with_the_image(length: int, tile: int, stride: int) -> None:
    starts = module._starts(length, tile, stride)
    assert starts[0] == 0 and starts[-1] + tile == max(length, tile)
    steps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(0 < step <= stride for step in steps), starts
    assert {x for start in starts for x in range(start, start + tile)} >= set(range(length))


def test_the_ramp_is_one_in_the_middle_and_near_zero_at_a_tiles_border() -> None:
    ramp = module._ramp(10, 4)
    assert ramp[4:6].tolist() == [1, 1] and torch.equal(ramp, ramp.flip(0)) and 0 < ramp[0] < 0.04
    assert (ramp[:5].diff() > 0).all()
    torch.testing.assert_close(ramp[:4] + ramp[:4].flip(0), torch.ones(4, dtype=torch.float64))  # two that meet add up to 1
    assert module._ramp(3, 1).min() > 0.4


# ---------------------------------------------------------------------------------------------- the codebook


def test_the_nearest_code_by_brute_force() -> None:
    book = codebook(codes=20)
    z = torch.randn(2, 3, 4, 5).double()
    codes = book.nearest(z)
    assert codes.shape == (2, 4, 5)
    for b in range(2):
        for y in range(4):
            for x in range(5):
                distances = [float((z[b, :, y, x] - vector).square().sum()) for vector in book.codebook]
                assert codes[b, y, x] == min(range(20), key=lambda k, all=distances: all[k])


def test_a_code_is_nearest_to_itself() -> None:
    book = codebook(codes=24)
    z = book.codebook.T.reshape(1, 3, 4, 6)
    assert book.nearest(z).flatten().tolist() == list(range(24))
    assert torch.equal(book.look_up(book.nearest(z)), z)


def test_low_precision_latents_are_compared_in_the_codebooks() -> None:
    book = codebook(codes=64).float()
    z = torch.randn(1, 3, 8, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(book.nearest(z), book.double().nearest(z.double()))


def spoken(book: Codebook, z: Tensor, image: Tensor, place: Tensor) -> Tensor:
    return book.statistics(z, book.nearest(z), image, place)


def test_statistics_count_uses_and_add_up_vectors() -> None:
    book = codebook(codes=6)
    z = torch.randn(2, 3, 2, 4).double()
    image, place = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 7, 3, 4, 0, 5])
    statistics, codes = spoken(book, z, image, place), book.nearest(z)
    assert statistics.shape == (6, 7) and statistics[:, 0].sum() == 16
    for k in range(6):
        vectors = [z[b, :, y, x] for b in range(2) for y in range(2) for x in range(4) if codes[b, y, x] == k]
        assert statistics[k, 0] == len(vectors)
        torch.testing.assert_close(statistics[k, 1:4], sum(vectors, torch.zeros(3).double()))
        torch.testing.assert_close(statistics[k, 4:], z[image[k], :, place[k] // 4, place[k] % 4])


def test_statistics_of_the_parts_of_a_batch_add_up_to_those_of_the_whole() -> None:
    book = codebook(codes=9)
    z = torch.randn(5, 3, 3, 3).double()
    image, place = torch.randint(5, (9,)), torch.randint(9, (9,))
    assert bool((image < 2).any()) and bool((image >= 2).any()), "there are candidates in both parts"
    parts = spoken(book, z[:2], image, place) + spoken(book, z[2:], image - 2, place)
    torch.testing.assert_close(parts, spoken(book, z, image, place), rtol=1e-12, atol=1e-12)


def test_live_codes_follow_the_encoder_by_the_papers_equations() -> None:
    book = codebook(codes=4, decay=0.9, revive_below=0.0)
    uses = torch.tensor([[3.0, 1, 4, 2], [2, 2, 5, 1], [1, 7, 1, 1]]).double()
    sums, nothing = torch.randn(3, 4, 3).double(), torch.zeros(4, 3).double()
    size, total = [0.0] * 4, [[0.0] * 3 for _ in range(4)]
    for n, m in zip(uses, sums, strict=True):
        book.update(torch.cat([n[:, None], m, nothing], dim=1), torch.tensor(True))
        for k in range(4):
            size[k] = 0.9 * size[k] + 0.1 * float(n[k])  # Eq. 6
            total[k] = [0.9 * total[k][d] + 0.1 * float(m[k, d]) for d in range(3)]  # Eq. 7
        wanted = [[value / size[k] for value in total[k]] for k in range(4)]  # Eq. 8
        torch.testing.assert_close(book.codebook, torch.tensor(wanted).double())
        torch.testing.assert_close(book.size, torch.tensor(size).double())


def test_the_first_batch_puts_used_codes_at_the_mean_of_their_vectors_and_the_others_at_their_candidates() -> None:
    book = codebook(codes=3)
    uses, sums = torch.tensor([4.0, 0, 8]).double(), torch.randn(3, 3).double()
    sums[1] = 0
    candidates = torch.randn(3, 3).double()
    book.update(torch.cat([uses[:, None], sums, candidates], dim=1), torch.tensor(True))
    torch.testing.assert_close(book.codebook, torch.stack([sums[0] / 4, candidates[1], sums[2] / 8]))


def test_dead_codes_take_their_candidates_and_the_average_size() -> None:
    book = codebook(codes=4, decay=0.5, revive_below=0.1)
    book.size.copy_(torch.tensor([8.0, 8, 0.5, 8]))
    book.total.copy_(book.size[:, None] * book.codebook)
    before, candidates = book.codebook.clone(), torch.randn(4, 3).double()
    uses = torch.tensor([8.0, 8, 0, 8]).double()
    sums = uses[:, None] * before
    book.update(torch.cat([uses[:, None], sums, candidates], dim=1), torch.tensor(True))
    average = (8 + 8 + 0.25 + 8) / 4
    torch.testing.assert_close(book.codebook[2], candidates[2])
    torch.testing.assert_close(book.codebook[[0, 1, 3]], before[[0, 1, 3]])
    assert book.size.tolist() == [8, 8, average, 8]
    torch.testing.assert_close(book.total, book.size[:, None] * book.codebook)


def test_a_code_is_dead_up_to_the_share_of_the_average_that_the_config_says() -> None:
    for share, dead in ((0.49, False), (0.51, True)):
        book = codebook(codes=2, decay=0.5, revive_below=share)
        uses = torch.tensor([[1.0], [3.0]]).double()  # the average is 2
        candidates = torch.full((2, 3), 9.0).double()
        book.update(torch.cat([uses, torch.ones(2, 3).double(), candidates], dim=1), torch.tensor(True))
        assert bool((book.codebook[0] == 9).all()) is dead and bool((book.codebook[1] != 9).all())


def test_a_step_that_does_not_count_changes_nothing() -> None:
    book = codebook()
    book.update(torch.rand(6, 7).double(), torch.tensor(True))
    before = {name: value.clone() for name, value in book.state_dict().items()}
    book.update(torch.full((6, 7), torch.nan).double(), torch.tensor(False))
    assert set(before) == {"codebook", "size", "total"}
    for name, value in book.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_gradient_goes_straight_through_the_codebook() -> None:
    network = vae(bottleneck=VQ, mid_attention="none").double()
    assert network.codebook is not None
    images = torch.randn(2, 3, 16, 16).double()
    reconstruction = network(images, torch.zeros(2, 3, 8, 8))
    reconstruction.mean.retain_grad()
    reconstruction.images.square().sum().backward()
    z = network.codebook.look_up(network.codebook.nearest(reconstruction.mean.detach())).requires_grad_()
    network._draw(network.middle(z)).square().sum().backward()
    assert reconstruction.mean.grad is not None and z.grad is not None and float(z.grad.abs().max()) > 0
    torch.testing.assert_close(reconstruction.mean.grad, z.grad)


def test_the_codebook_is_no_parameter() -> None:
    network = vae(bottleneck=VQ)
    assert network.codebook is not None and not list(network.codebook.parameters())
    assert {name for name, _ in network.named_buffers()} == {"codebook.codebook", "codebook.size", "codebook.total"}


@pytest.mark.parametrize(
    ("sizes", "perplexity", "used"),
    [
        ([5.0] * 8, 8.0, 1.0),
        ([3.0, 0, 0, 0, 0, 0, 0, 0], 1.0, 1 / 8),
        ([2.0, 2, 2, 2, 0, 0, 0, 0], 4.0, 0.5),
        ([0.5, 0.25, 0.25, 0, 0, 0, 0, 0], 2**1.5, 3 / 8),
        ([1000.0, 1000, 1, 0, 0, 0, 0, 0], None, 2 / 8),
        ([0.0] * 8, 1.0, 0.0),
    ],
    ids=["even", "one", "half", "entropy", "rarely", "fresh"],
)
def test_usage_by_closed_forms(sizes: list[float], perplexity: float | None, used: float) -> None:
    book = codebook(codes=8)
    book.size.copy_(torch.tensor(sizes))
    usage = book.usage()
    if perplexity is not None:
        assert math.isclose(usage["code_perplexity"], perplexity, rel_tol=1e-9)
    assert usage["codes_used"] == used


# ---------------------------------------------------------------------------------------------- the discriminator


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_is_the_smallest_that_leaves_a_patch(layers: int) -> None:
    spec = validate(DiscriminatorConfig, {"base_channels": 4, "norm_groups": 2, "layers": layers})
    network = randomise(Discriminator(spec, 1))
    assert network(torch.randn(1, 1, spec.smallest_image, spec.smallest_image)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.randn(1, 1, spec.smallest_image - 1, spec.smallest_image - 1))


@pytest.mark.parametrize(("layers", "shape"), [(1, (14, 22)), (2, (6, 10)), (3, (2, 4))])
def test_there_is_one_logit_for_each_patch(layers: int, shape: tuple[int, int]) -> None:
    spec = validate(DiscriminatorConfig, {"base_channels": 4, "norm_groups": 2, "layers": layers})
    assert Discriminator(spec, 3)(torch.randn(2, 3, 32, 48)).shape == (2, 1, *shape)


def test_widths_double_up_to_eight_times_the_first() -> None:
    network = Discriminator(validate(DiscriminatorConfig, {"base_channels": 4, "norm_groups": 2, "layers": 5}), 3)
    widths = [layer.out_channels for layer in network.layers if isinstance(layer, nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


def test_a_patch_of_the_default_network_sees_70_pixels() -> None:
    spec = validate(DiscriminatorConfig, {"base_channels": 4, "norm_groups": 2})
    network = Discriminator(spec, 1).double()
    for layer in network.layers:  # without the norms, which look at the whole image
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda x: x
    images = torch.randn(1, 1, 160, 160).double().requires_grad_()
    logits = network(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    has_gradient = images.grad[0, 0].abs().sum(0) > 0
    assert int(has_gradient.sum()) == 70


def test_every_parameter_of_the_discriminator_gets_a_gradient() -> None:
    network = randomise(Discriminator(validate(DiscriminatorConfig, {"base_channels": 8}), 3))
    network(torch.randn(2, 3, 32, 32)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_the_discriminator_judges_each_image_by_itself() -> None:
    network = randomise(Discriminator(validate(DiscriminatorConfig, {"base_channels": 8}), 3)).double().train()
    assert not any(isinstance(part, STRAY) for part in network.modules())
    images = torch.randn(3, 3, 32, 32).double()
    together = network(images)
    for i in range(3):
        torch.testing.assert_close(network(images[i : i + 1]), together[i : i + 1], rtol=1e-12, atol=1e-12)


def test_a_discriminator_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="norm_groups 8 does not divide base_channels 12"):
        validate(DiscriminatorConfig, {"base_channels": 12})
