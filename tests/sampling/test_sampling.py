"""Seeded noise, the sampler, opening what was trained, files written once."""

from typing import Any

import pytest
import torch

from src.config import UserError, validate
from src.diffusion import ProcessConfig, build_process, euler, transitions
from src.models import UNet, UNetConfig
from src.sampling import Sampler, SamplerConfig, noise_of
from src.sampling.edit import Edit
from src.sampling.files import columns_for
from src.sampling.sampler import Trajectory, describe, random_labels
from tests.conftest import randomise

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


def sampler(
    solver: str = "ddim", *, num_classes: int | None = 3, steps: Any = 4, classifier: Any = None, **options: Any
) -> Sampler:
    config = {"base_channels": 8, "channel_mult": [1, 2], "attention": ["none", "none"], "blocks": 1, "norm_groups": 4}
    network = randomise(UNet(validate(UNetConfig, config), in_channels=1, num_classes=num_classes)).eval()
    process = build_process(validate(ProcessConfig, {"schedule": {"kind": "cosine", "steps": 50}, "target": "v"}))
    spec = validate(SamplerConfig, {"solver": solver, "steps": steps, **options})
    return Sampler(network, process, spec, shape=SHAPE, num_classes=num_classes, clip_x0=(-1.0, 1.0), classifier=classifier)


def test_noise_is_a_function_of_seed_and_image_alone() -> None:
    many = noise_of(7, range(100), SHAPE)
    assert torch.equal(noise_of(7, [42, 3], SHAPE), many[[42, 3]])
    assert not torch.equal(noise_of(8, [42], SHAPE), many[[42]])
    assert not torch.equal(noise_of(7, [42], SHAPE, 1), many[[42]])
    assert not torch.equal(noise_of(7 + 2**32, [42], SHAPE), many[[42]]), "all 64 bits of the seed count"
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.03


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "dpmpp_2m", "ddim", "ancestral"])
def test_every_solver_draws_the_same_image_whichever_others_are_drawn(solver: str) -> None:
    options = {"eta": 0.5} if solver == "ddim" else {}
    draw = sampler(solver, **options).draw
    many = draw(0, range(5), [0, 1, 2, 0, 1], device=CPU, batch_size=5)
    one = draw(0, [3], [0], device=CPU, batch_size=5)
    torch.testing.assert_close(one[0], many[3], rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(0, range(5), [0, 1, 2, 0, 1], device=CPU, batch_size=5), many)
    assert many.shape == (5, *SHAPE) and many.abs().max() < 3


def test_calls_are_counted() -> None:
    for solver in ("euler", "midpoint", "heun", "rk4", "ddim"):
        for guidance in (1.0, 2.0):
            tested = sampler(solver, guidance=guidance)
            real, calls = tested.network, []
            tested.network = lambda *a, real=real, calls=calls, **k: (calls.append(1), real(*a, **k))[1]
            tested.draw(0, [0], [1], device=CPU)
            assert len(calls) == tested.calls(), (solver, guidance)
    assert describe(sampler(), 3)["seed"] == 3


def test_calls_of_shortened_repeated_and_partly_guided_ways() -> None:
    for options in (
        {"stop_at": 3}, {"double_sampling": 2}, {"guidance": 2.0, "guidance_interval": [0.1, 2.0]},
        {"solver": "heun", "double_sampling": 3}, {"guidance": 2.0, "guidance_interval": [0.0, 0.5], "stop_at": 5},
    ):  # fmt: skip
        tested = sampler(steps=6, **options)
        real, calls = tested.network, []
        tested.network = lambda *a, real=real, calls=calls, **k: (calls.append(1), real(*a, **k))[1]
        tested.draw(0, [0], [1], device=CPU)
        assert len(calls) == tested.calls(), options
    tested, calls = sampler(steps=6), []
    real = tested.network
    tested.network = lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    edit = Edit(torch.zeros(SHAPE), start_at=2, mask=torch.ones(1, 8, 8), resamplings=3)
    tested.draw(0, [0], [1], device=CPU, edit=edit)
    assert len(calls) == tested.calls(edit) == 12


def test_stopping_early_gives_the_estimate_of_x0_there() -> None:
    estimates, watched = {}, sampler("ancestral", steps=6)
    watched.draw(0, [0], [1], device=CPU, callback=lambda step, t, x_t, prediction: estimates.update({step: prediction.x0}))
    for step in (1, 4):
        assert torch.equal(sampler("ancestral", steps=6, stop_at=step).draw(0, [0], [1], device=CPU), estimates[step])


def test_double_sampling_noises_the_finished_image_and_goes_on() -> None:
    once, twice = sampler(steps=6), sampler(steps=6, double_sampling=4)
    visited = []
    result = twice.draw(0, [0], [1], device=CPU, callback=lambda step, t, x_t, prediction: visited.append((step, t, x_t)))
    assert [step for step, *_ in visited] == [0, 1, 2, 3, 4, 5, 4, 5]
    finished = once.draw(0, [0], [1], device=CPU)
    _, t, x_t = visited[6]
    alpha, sigma = twice.process.schedule.level(t)
    noise = (x_t - alpha.float() * finished) / sigma.float()
    assert abs(float(noise.std()) - 1) < 0.3 and not torch.equal(result, finished)
    assert not torch.allclose(noise, noise_of(0, [0], SHAPE), atol=1e-3), "new noise"


def test_a_given_image_is_started_from_and_kept_where_the_mask_is_black() -> None:
    image, tested = torch.linspace(-0.9, 0.9, 64).reshape(SHAPE), sampler("ddim", steps=10, eta=1.0)
    near = tested.draw(0, [0], [1], device=CPU, edit=Edit(image, start_at=9))
    far = tested.draw(0, [0], [1], device=CPU, edit=Edit(image, start_at=2))
    assert (near[0] - image).norm() < (far[0] - image).norm()
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 5:] = 1
    for resamplings in (1, 3):
        filled = tested.draw(0, [0, 1], [1, 2], device=CPU, edit=Edit(image, mask=mask, resamplings=resamplings))
        torch.testing.assert_close(filled[:, :, :, :5], image[:, :, :5].expand(2, -1, -1, -1))
        assert (filled[:, :, :, 5:] - image[:, :, 5:]).abs().max() > 0.1 and not torch.equal(filled[0], filled[1])
        single = tested.draw(0, [1], [2], device=CPU, batch_size=2, edit=Edit(image, mask=mask, resamplings=resamplings))
        torch.testing.assert_close(single[0], filled[1], rtol=1e-4, atol=1e-4)


def test_stopping_early_keeps_what_the_mask_keeps() -> None:
    image, mask = torch.full(SHAPE, 0.3), torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    result = sampler(steps=6, stop_at=3).draw(0, [0], [1], device=CPU, edit=Edit(image, mask=mask))
    assert bool((result[0, :, 4:] == image[:, 4:]).all()) and not torch.allclose(result[0, :, :4], image[:, :4], atol=0.01)
    with pytest.raises(UserError, match="start_at 3 is not before stop_at 3"):
        sampler(steps=6, stop_at=3).draw(0, [0], [1], device=CPU, edit=Edit(image, start_at=3))
    with pytest.raises(UserError, match="dpmpp_2m remembers the step before"):
        sampler("dpmpp_2m").draw(0, [0], [1], device=CPU, edit=Edit(image, mask=mask))


def test_resampling_makes_what_is_drawn_agree_with_what_is_kept() -> None:
    """Two pixels of a Gaussian with correlation 0.9; the first is known. The mean of the second is 0.9 times it; without
    resampling it lags behind (Fig. 3, Lugmayr et al. 2022)."""
    covariance = torch.tensor([[0.25, 0.225], [0.225, 0.25]])
    process = build_process(validate(ProcessConfig, {"schedule": {"kind": "cosine", "steps": 200}, "target": "x0"}))

    def best(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha, sigma = process.schedule.level(time[:1].double())
        total = alpha.float() ** 2 * covariance + sigma.float() ** 2 * torch.eye(2)
        return (x.flatten(1) @ torch.linalg.solve(total, alpha.float() * covariance)).reshape(x.shape)

    means = []
    for resamplings in (1, 10):
        spec = SamplerConfig(solver="ancestral", steps=40)
        tested = Sampler(best, process, spec, shape=(1, 1, 2), num_classes=None, clip_x0=None)
        edit = Edit(torch.tensor([[[0.4, 0.0]]]), mask=torch.tensor([[[0.0, 1.0]]]), resamplings=resamplings)
        samples = tested.draw(0, range(300), None, device=CPU, edit=edit)
        assert bool((samples[:, 0, 0, 0] == 0.4).all())
        means.append(float(samples[:, 0, 0, 1].mean()))
    assert means[0] < 0.3 and means[1] == pytest.approx(0.36, abs=0.05)


class Brightness:
    """A classifier of two classes, dark and bright, on its own schedule."""

    schedule = build_process(validate(ProcessConfig, {"schedule": {"kind": "linear", "steps": 80}, "target": "v"})).schedule

    def logits(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mean = x_t.mean((1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


@pytest.mark.parametrize("solver", ["ddim", "ancestral", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("num_classes", [None, 2])
def test_a_classifier_guides_networks_with_classes_and_without(solver: str, num_classes: int | None) -> None:
    means = {}
    for scale, levels in ((0.0, None), (200.0, None), (200.0, [1e6, 2e6])):
        tested = sampler(
            solver, num_classes=num_classes, steps=8, guidance=scale, guidance_method="classifier", classifier=Brightness(),
            **({"guidance_interval": levels} if levels else {}),
        )  # fmt: skip
        means[scale, levels is None] = tested.draw(0, range(4), [0, 0, 1, 1], device=CPU).mean((1, 2, 3))
    shift = means[200.0, True] - means[0.0, True]
    assert bool((shift[:2] < -0.01).all()) and bool((shift[2:] > 0.01).all())
    torch.testing.assert_close(means[200.0, False], means[0.0, True])


def test_a_classifier_shifts_eps_of_the_clipped_estimate() -> None:
    """In guided-diffusion's order: clip x0, take its eps, subtract sigma times the gradient; then, which it does not, clip the
    x0 of that. Ancestral sampling moves the mean by variance times gradient instead."""
    guided = {"guidance": 300.0, "guidance_method": "classifier", "classifier": Brightness(), "num_classes": None}
    x, labels = noise_of(5, range(2), SHAPE), torch.tensor([0, 1])
    tested = sampler("ddim", steps=4, **guided)
    schedule, (t, s) = tested.process.schedule, tested.times[1:3]
    (alpha, sigma), (alpha_s, sigma_s) = (map(float, schedule.level(at)) for at in (t, s))
    gradient = tested.gradient(labels)
    assert gradient is not None
    with torch.no_grad():
        plain = tested.process.denoiser(tested.network)(x, t)
        assert plain.x0.abs().max() > 1, "there is something to clip"
        eps = (x - alpha * plain.x0.clamp(-1, 1)) / sigma - sigma * gradient(x, t)
        shifted = (x - sigma * eps) / alpha
        assert shifted.abs().max() > 1, "and again"
        x0 = shifted.clamp(-1, 1)
        wanted = alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma
        denoiser = tested.denoiser(labels, gradient)
        torch.testing.assert_close(euler(denoiser, x, tested.times[1:3], schedule), wanted, rtol=1e-4, atol=1e-4)

        chain = sampler("ancestral", steps=4, **guided)
        chain.network = tested.network
        way = Trajectory(chain, labels, 0, range(2))
        way.noise = lambda step, like: torch.zeros_like(like)
        steps = transitions(schedule, tested.times)
        mean = steps.mean(1, plain.x0.clamp(-1, 1), x)
        wanted = mean + float(steps.beta[1]) * gradient(x, t)
        torch.testing.assert_close(way._solve(x, 1, 2), wanted, rtol=1e-4, atol=1e-4)


def test_sections_and_dynamic_thresholds() -> None:
    sections = sampler(steps=[4, 3, 2])
    assert sections.steps == 9 and len(sections.times) == 10 and describe(sections, 0)["steps"] == [4, 3, 2]
    held = sampler(threshold=0.5).draw(0, [0], [1], device=CPU)
    assert held.abs().max() <= 1.001


def test_guidance_pulls_towards_the_class() -> None:
    plain, strong = sampler(guidance=1.0), sampler(guidance=4.0)
    null = plain.draw(0, [0], [3], device=CPU)
    one, four = plain.draw(0, [0], [1], device=CPU), strong.draw(0, [0], [1], device=CPU)
    assert (four - null).norm() > (one - null).norm() > 0


@pytest.mark.parametrize(
    ("classes", "guidable", "by_class", "by_condition", "calls"),
    [(3, True, 1.0, 1.0, 1), (3, True, 3.0, 1.0, 2), (3, True, 1.0, 2.0, 3), (3, True, 3.0, 2.0, 3), (3, True, 2.0, 2.0, 2),
     (3, False, 1.0, 2.0, 2), (None, True, 1.0, 2.0, 2)],
)  # fmt: skip
def test_guidance_by_class_and_condition(
    classes: int | None, guidable: bool, by_class: float, by_condition: float, calls: int
) -> None:
    """The estimate is that of the formula for both scales, with as few calls as are counted."""
    spec, network = sampler(num_classes=classes, guidance=by_class), conditioned(classes)
    counted: list[int] = []
    options = {"guidable": guidable, "condition_guidance": by_condition, "condition_guidable": True}
    tested = Sampler(lambda *a, **k: (counted.append(1), network(*a, **k))[1], spec.process, spec.spec, shape=SHAPE,
                     num_classes=classes, **options)  # fmt: skip
    labels, condition = (torch.tensor([0, 2]) if classes else None), torch.randn(2, 2, 8, 8)
    x, t = torch.randn(2, *SHAPE), tested.times[1]
    with torch.no_grad():
        eps = tested.denoiser(labels, condition=condition)(x, t).eps
        assert len(counted) == calls

        def eps_of(labels: Any, condition: torch.Tensor) -> torch.Tensor:
            inputs = {} if labels is None else {"labels": labels}
            return tested.process.denoiser(network, condition=condition, **inputs)(x, t).eps

        null = torch.full_like(labels, 3) if labels is not None and guidable else labels
        e_ic, e_i0, e_00 = (eps_of(*each) for each in ((labels, condition), (null, condition), (null, 0 * condition)))
    torch.testing.assert_close(eps, e_00 + by_condition * (e_i0 - e_00) + by_class * (e_ic - e_i0))
    counted.clear()
    tested.draw(0, range(2), [0, 2] if classes else None, device=CPU, condition=condition)
    assert len(counted) == tested.calls()
    assert ("condition_guidance" in describe(tested, 0)) == (by_condition != 1)


def conditioned(classes: int | None) -> UNet:
    config = {"base_channels": 8, "channel_mult": [1, 2], "attention": ["none", "none"], "blocks": 1, "norm_groups": 4}
    network = UNet(validate(UNetConfig, config), in_channels=1, num_classes=classes, condition_channels=2).eval()
    randomise(network)
    return network


def test_guidance_by_a_condition_that_does_not_fit() -> None:
    plain = sampler()
    options: Any = {"shape": SHAPE, "num_classes": 3, "condition_guidance": 2.0}
    with pytest.raises(UserError, match="trained with a condition and condition_dropout above 0"):
        Sampler(plain.network, plain.process, plain.spec, **options)
    spec = validate(SamplerConfig, {"guidance": 2.0, "guidance_method": "classifier"})
    options |= {"condition_guidable": True, "classifier": Brightness()}
    with pytest.raises(UserError, match="by a classifier and by the condition do not go together"):
        Sampler(plain.network, plain.process, spec, **options)


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="has no classes"):
        sampler(num_classes=None, guidance=2.0)
    with pytest.raises(UserError, match="eta belongs to"):
        sampler("euler", eta=0.5)
    with pytest.raises(UserError, match="more than the schedule's 50"):
        sampler(steps=51)
    for options, message in (
        ({"stop_at": 4}, "leaves none out"), ({"double_sampling": 4}, "none to do again"),
        ({"stop_at": 2, "double_sampling": 2}, "do not go together"), ({"guidance_interval": [0, 1]}, "no guidance to hold"),
        ({"guidance": 2, "guidance_interval": [2, 1]}, "the lower one first"),
        ({"guidance": 2, "guidance_method": "classifier"}, "guidance by a classifier needs one"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            sampler(**options)
    assert random_labels(0, range(1000), 4).count(2) > 180
    assert (columns_for(16), columns_for(100, 10), columns_for(1)) == (4, 10, 1)
