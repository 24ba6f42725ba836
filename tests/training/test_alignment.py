"""Latents aligned to the features of a frozen network: the loss by closed forms, the teacher, the features that are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import train_vae
from src.config import UserError, load, validate
from src.doctor import needs
from src.doctor.own_script import shrink
from src.losses import Teacher, TeacherConfig, alignment_loss
from src.models.vae import VAE, VAEConfig
from src.runtime.launch import MachineConfig
from src.training.alignment import BLOCK, Aligner
from src.training.ema import EMA, EMAConfig
from src.training.latent_terms import AlignmentTerm
from src.training.optimizer import OptimizerConfig, build_optimizer
from src.training.state import TrainState
from tests.conftest import ROOT, randomise

CPU = torch.device("cpu")
RANDOM = TeacherConfig(network="random")


def pixels(count: int, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------- the loss


def test_aligned_latents_cost_nothing() -> None:
    features = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    scale = torch.rand(2, 1, 4, 6, dtype=torch.float64) + 0.5
    assert float(alignment_loss(features * scale, features * scale, features, 0.0, 0.0).max()) < 1e-8
    opposite = alignment_loss(features, -features, features, 0.0, 0.0)
    torch.testing.assert_close(opposite, torch.full((2,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(alignment_loss(features, -features, features, 0.5, 0.0), opposite - 0.5)


def test_the_loss_is_the_papers() -> None:
    """By loops over positions and pairs of them."""
    torch.manual_seed(0)
    z, projected, f = (torch.randn(1, channels, 2, 3, dtype=torch.float64) for channels in (4, 5, 5))
    a, b, c = (each[0].flatten(1).T for each in (z, projected, f))  # (6, channels)

    def cosine(x: Tensor, y: Tensor) -> float:
        return float(x @ y / x.norm() / y.norm())

    points = [max(0.0, 1 - 0.3 - cosine(b[i], c[i])) for i in range(6)]
    pairs = [max(0.0, abs(cosine(a[i], a[j]) - cosine(c[i], c[j])) - 0.2) for i in range(6) for j in range(6)]
    wanted = sum(points) / 6 + sum(pairs) / 36
    assert float(alignment_loss(z, projected, f, 0.3, 0.2)) == pytest.approx(wanted, rel=1e-9)


def test_features_of_another_grid_are_resized_and_pairs_are_of_few_areas() -> None:
    z, features = torch.randn(1, 4, 32, 8, requires_grad=True), torch.randn(1, 5, 7, 7, requires_grad=True)
    projected = torch.randn(1, 5, 32, 8, requires_grad=True)
    resized = F.interpolate(features.detach(), (32, 8), mode="bilinear", align_corners=False, antialias=True)
    value = alignment_loss(z, projected, features, 0.0, 0.0)
    small = [F.interpolate(each, (16, 8), mode="area") for each in (z.detach(), resized)]
    ours, theirs = (torch.einsum("bfi,bfj->bij", *[F.normalize(each.flatten(2), dim=1)] * 2) for each in small)
    wanted = 1 - F.cosine_similarity(projected.detach(), resized, dim=1).mean() + (ours - theirs).abs().mean()
    torch.testing.assert_close(value[0].detach(), wanted)
    value.sum().backward()
    assert z.grad is not None and projected.grad is not None and features.grad is None, "no gradient into the teacher"


# ---------------------------------------------------------------------------------------------- the teacher


def test_the_teacher_is_frozen_and_sees_places() -> None:
    teacher = Teacher(TeacherConfig())
    images = (torch.rand(2, 1, 32, 48) * 2 - 1).requires_grad_()
    teacher.train()
    features = teacher(images)
    assert features.shape == (2, teacher.channels, 14, 14) and teacher.channels == 112
    assert not features.requires_grad and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(teacher(images.expand(-1, 3, -1, -1)), features)


def test_a_network_of_timm_with_a_file_of_its_weights(tmp_path: Path) -> None:
    import timm

    for name, side in (("test_resnet", 5), ("test_vit", 10)):
        theirs = randomise(timm.create_model(name, num_classes=0), 0.05).eval()
        save_file(theirs.state_dict(), tmp_path / f"{name}.safetensors")
        teacher = Teacher(TeacherConfig(network=f"timm:{name}", weights=str(tmp_path / f"{name}.safetensors")))
        images = torch.rand(1, 3, 160, 160) * 2 - 1
        mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
        with torch.no_grad():
            values = theirs.forward_features(((images + 1) / 2 - mean) / std)
        wanted = values[:, 1:].transpose(1, 2).unflatten(2, (10, 10)) if name == "test_vit" else values
        assert wanted.shape[2:] == (side, side) and teacher.channels == theirs.num_features
        torch.testing.assert_close(teacher(images), wanted, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_cannot_be_had_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="network: 'dino' is not known; allowed: efficientnet_lite0, timm:NAME"):
        validate(TeacherConfig, {"network": "dino"})
    for spec, message in (
        (TeacherConfig(weights=str(tmp_path / "none.pth")), "teacher.network 'efficientnet_lite0'.*none.pth"),
        (TeacherConfig(network="timm:test_resnett"), "teacher.network 'timm:test_resnett': timm has no network"),
        (TeacherConfig(network="timm:test_vit", weights=str(tmp_path / "no.pth")), "teacher.weights.*no.pth"),
    ):
        with pytest.raises(UserError, match=message):
            Teacher(spec)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("timm.create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no way\nto the hub")))
    with pytest.raises(UserError, match="brought here .*file of them with teacher.weights; efficientnet_lite0 needs none"):
        Teacher(TeacherConfig(network="timm:test_vit"))
    raw = ['name="mine"', 'teacher.network="random"', 'perceptual.network="efficientnet_lite0"']
    with pytest.raises(UserError, match="teacher.network: 'random' is for smoke tests"):
        load(ROOT / "configs/smoke/vae.json", train_vae.Config, raw)
    for key, value in (("weight", 0), ("margin", 2), ("distance_margin", -1)):
        with pytest.raises(UserError, match=key):
            validate(AlignmentTerm, {key: value})


def test_the_doctor_looks_for_the_teacher() -> None:
    stages = 'stages=[{"steps": 1, "alignment": {}}]'
    cfg: Any = load(ROOT / "configs/smoke/vae.json", train_vae.Config, [stages])
    assert needs.teacher(cfg).status == "pass"
    cfg = load(ROOT / "configs/smoke/vae.json", train_vae.Config, [stages, "teacher.network=timm:test_resnett"])
    verdict = needs.teacher(cfg)
    assert verdict.status == "fail" and "timm has no network" in verdict.found
    cfg = load(ROOT / "configs/smoke/vae.json", train_vae.Config, [])
    assert "no stage asks" in needs.teacher(cfg).found


def test_the_doctor_trains_turned_latents_without_a_teacher(tmp_path: Path) -> None:
    stage = '{"steps": 1, "alignment": {}, "adversarial": {}, "equivariance": {"turns": false}}'
    cfg = load(ROOT / "configs/smoke/vae.json", train_vae.Config, [f"stages=[{stage}]", "image.size=64"])
    small: Any = shrink(cfg, tmp_path, MachineConfig(), 4, 2)
    (stage_cfg,) = small.stages
    assert stage_cfg.alignment is None and stage_cfg.equivariance.turns and small.image.size == 32


# ---------------------------------------------------------------------------------------------- features that are kept


def test_each_image_is_seen_once_and_features_are_the_same_however_they_are_asked_for() -> None:
    images, whole = pixels(BLOCK + 3), Aligner(RANDOM, 4, CPU, torch.float32)
    calls = list[int]()
    whole.teacher.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    features = whole.features(images)
    assert features.shape == (BLOCK + 3, whole.teacher.channels, 4, 4) and calls == [BLOCK, BLOCK]
    assert torch.equal(whole.features(images.flip(0)), features.flip(0)) and len(calls) == 2
    whole.features(images.flip(2)[:2])
    assert len(calls) == 3, "a mirrored image is another one"
    room = 2.5 * features[0].half().nbytes / 2**30
    for spec in (RANDOM, TeacherConfig(network="random", cache_gib=0), TeacherConfig(network="random", cache_gib=room)):
        parts = Aligner(spec, 4, CPU, torch.float32)
        one_by_one = torch.cat([parts.features(images[i : i + 1]) for i in [*range(BLOCK + 3)] * 2])
        assert torch.equal(one_by_one, features.repeat(2, 1, 1, 1)), "to the bit"
        assert len(parts._known) == {1.0: BLOCK + 3, 0: 0, room: 2}[spec.cache_gib]


def test_the_term_trains_the_encoder_and_the_projection() -> None:
    aligner, term = Aligner(RANDOM, 4, CPU, torch.float32), AlignmentTerm(margin=0.0, distance_margin=0.0)
    features, latents = aligner.features(pixels(3)), torch.randn(3, 4, 8, 8, requires_grad=True)
    loss = aligner.loss(term, latents, features)
    assert loss.shape == (3,)
    loss.sum().backward()
    assert latents.grad is not None and aligner.projection.weight.grad is not None
    assert all(parameter.grad is None for parameter in aligner.teacher.parameters())
    torch.testing.assert_close(loss, alignment_loss(latents, aligner.projection(latents), features, 0.0, 0.0))


def test_a_checkpoint_holds_the_projection_and_its_moments(tmp_path: Path) -> None:
    from src.runtime.checkpoint import write_folder

    def build(*, aligned: bool = True) -> tuple[TrainState, Any, VAE]:
        network = VAE(VAEConfig(widths=(8, 16), blocks=1), 3)
        projection = Aligner(RANDOM, 4, CPU, torch.float32).projection if aligned else None
        networks = torch.nn.ModuleList([network, *([projection] if projection is not None else [])])
        optimizer = build_optimizer(networks, OptimizerConfig(lr=0.1))
        ema = EMA(network, EMAConfig())
        for parameter in networks.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return TrainState(network, optimizer, ema, projection=projection), projection, network

    state, projection, _ = build()
    tensors = state.tensors()
    assert tensors["projection"].keys() == {"weight"} and "weight/exp_avg" in tensors["projection_optimizer"]
    assert not any("projection" in key for name in ("model", "ema", "optimizer") for key in tensors[name])
    write_folder(tmp_path / "with", tensors, {})
    other, loaded, _ = build()
    other.load(tmp_path / "with")
    assert torch.equal(loaded.weight, projection.weight)
    for name, saved in other.tensors().items():
        assert all(torch.equal(value, tensors[name][key]) for key, value in saved.items()), name

    plain, _, network = build(aligned=False)
    assert "projection" not in plain.tensors()
    write_folder(tmp_path / "without", plain.tensors(), {})
    before = loaded.weight.detach().clone()
    other.load(tmp_path / "without")
    assert torch.equal(loaded.weight, before), "a run that went on from one without begins with its own"
    assert torch.equal(other.tensors()["model"]["last.weight"], network.last.weight)
    plain.load(tmp_path / "with")
