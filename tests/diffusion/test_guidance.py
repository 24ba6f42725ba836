"""Guidance by its formulas: a classifier's gradient in each solver, intervals, thresholds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from src.config import validate
from src.diffusion import (
    ProcessConfig,
    ancestral,
    at_same_level,
    autoguided,
    build_process,
    classifier_free,
    classifier_gradient,
    classifier_guided,
    ddim,
    dynamic_threshold,
    is_trained_at,
    is_within,
    on_schedule,
    times,
    transitions,
    two_scales,
    within,
)
from src.diffusion.process import Prediction, Process
from src.diffusion.schedules import like


def process_of(kind: str = "linear", target: str = "eps") -> Process:
    schedule = {"kind": kind} | (
        {} if kind == "blend" else {"steps": 100, **({"rescale_betas": True} if kind == "linear" else {})}
    )
    return build_process(validate(ProcessConfig, {"schedule": schedule, "target": target}))


WEIGHTS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([1, 4])


def logits(x_t: Tensor, t: Tensor) -> Tensor:
    return x_t.flatten(1) @ WEIGHTS.T


def constant(x0: Tensor) -> Any:
    """A denoiser that always says `x0`."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = process_of().schedule.level(t)
        return Prediction(x0, (x_t - like(alpha, x_t) * x0) / like(sigma, x_t))

    return denoise


def test_the_gradient_is_that_of_log_p() -> None:
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    gradient = classifier_gradient(logits, LABELS, 2.5)(x, torch.tensor(3.0))
    chances = torch.softmax(logits(x, torch.tensor(3.0)), dim=1)
    by_hand = WEIGHTS[LABELS] - chances @ WEIGHTS  # of a linear classifier: w_y - sum_k p_k w_k
    torch.testing.assert_close(gradient, 2.5 * by_hand.reshape(x.shape), rtol=0, atol=1e-6)
    assert not gradient.requires_grad


def test_all_but_ancestral_sampling_shift_eps() -> None:
    """eps - sigma s grad log p, and x0 so that x_t = alpha x0 + sigma eps still holds; DDIM steps with both."""
    process, x_t, x0 = process_of(), torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    gradient = classifier_gradient(logits, LABELS, 3.0)
    guided = classifier_guided(constant(x0), gradient, process.schedule)
    t = torch.tensor(60.0)
    plain, shifted = constant(x0)(x_t, t), guided(x_t, t)
    alpha, sigma = process.schedule.level(t)
    torch.testing.assert_close(shifted.eps, plain.eps - sigma * gradient(x_t, t))
    torch.testing.assert_close(alpha * shifted.x0 + sigma * shifted.eps, x_t)
    chain = torch.tensor([60.0, 40.0])
    next_alpha, next_sigma = process.schedule.level(chain[1])
    stepped = ddim(guided, x_t, chain, process.schedule, noise=lambda step, like: torch.zeros_like(like))
    torch.testing.assert_close(stepped, next_alpha * shifted.x0 + next_sigma * shifted.eps)


def test_ancestral_sampling_adds_variance_times_gradient_to_the_mean() -> None:
    process, x_t, x0 = process_of(), torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    gradient, chain = classifier_gradient(logits, LABELS, 3.0), torch.tensor([60.0, 40.0])
    zero: Any = {"noise": lambda step, like: torch.zeros_like(like), "variance": "large"}
    plain = ancestral(constant(x0), x_t, chain, process.schedule, **zero)
    shifted = ancestral(constant(x0), x_t, chain, process.schedule, mean_shift=lambda x, t, v: v * gradient(x, t), **zero)
    variance = transitions(process.schedule, torch.tensor([60.0, 40.0, -1.0])).beta[0]
    torch.testing.assert_close(shifted - plain, variance * gradient(x_t, chain[0]))


def test_in_pure_noise_a_classifier_sees_nothing() -> None:
    spec = {"schedule": {"kind": "cosine", "steps": 50, "zero_terminal_snr": True}, "target": "v"}
    process = build_process(validate(ProcessConfig, spec))
    x = torch.randn(1, 3, 2, 2).double()
    prediction = Prediction(x, x)
    says: Any = lambda x_t, t: prediction  # noqa: E731
    guided = classifier_guided(says, classifier_gradient(logits, LABELS[:1], 1.0), process.schedule)
    assert guided(x, torch.tensor(49.0)) is prediction and bool((guided(x, torch.tensor(40.0)).x0 != x).any())


@pytest.mark.parametrize("kind", ["cosine", "blend", "linear"])
def test_a_classifier_on_another_schedule_is_asked_at_the_same_ratio_of_noise(kind: str) -> None:
    process, classifier_process = process_of(), process_of(kind, "v")
    x0, eps = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64)
    t, calls = torch.tensor(37.0, dtype=torch.float64), []
    on_schedule(lambda x, classifier_t: calls.append((x, classifier_t)) or x, classifier_process.schedule, process.schedule)(
        process.add_noise(x0, eps, t), t
    )
    x, classifier_t = calls[0]
    torch.testing.assert_close(x, classifier_process.add_noise(x0, eps, classifier_t), rtol=0, atol=1e-9)
    if kind == "linear":
        assert float(classifier_t) == 37.0


def test_an_interval_of_noise_levels() -> None:
    process = process_of()
    schedule = process.schedule
    alpha, sigma = schedule.level(torch.tensor(30.0))
    at = float(sigma / alpha)
    assert is_within((at, 5.0), schedule, torch.tensor(30.0)) and not is_within((at * 1.01, 5.0), schedule, torch.tensor(30.0))
    assert not is_within((0.0, at * 0.99), schedule, torch.tensor(30.0))
    inside: Any = lambda x, t: Prediction(x + 1, x)  # noqa: E731
    outside: Any = lambda x, t: Prediction(x, x)  # noqa: E731
    chosen, x = within((at * 0.9, at * 1.1), inside, outside, schedule), torch.zeros(1)
    assert [float(chosen(x, torch.tensor(t)).x0) for t in (10.0, 30.0, 80.0)] == [0, 1, 0]


def test_classifier_free_guidance_by_its_formula() -> None:
    both = [torch.randn(2, 3, 4) for _ in range(2)]
    conditional: Any = lambda x, t: Prediction(both[0], both[0])  # noqa: E731
    null: Any = lambda x, t: Prediction(both[1], both[1])  # noqa: E731
    prediction = classifier_free(conditional, null, 3.0)(both[0], torch.tensor(1.0))
    torch.testing.assert_close(prediction.eps, both[1] + 3 * (both[0] - both[1]))


def gaussian(process: Process, mean: float, variance: float, called: list[Tensor] | None = None) -> Any:
    """The best denoiser along the process of data from a normal: E[x0 | x_t] is linear in x_t."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        if called is not None:
            called.append(t)
        alpha, sigma = (like(value, x_t) for value in process.schedule.level(t))
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    return denoise


@pytest.mark.parametrize("kind", ["linear", "cosine", "blend"])
def test_autoguidance_by_its_formula(kind: str) -> None:
    """D_bad + w (D_good - D_bad) of two Gaussians that are known, the bad one along the same schedule and along others."""
    process, bad_process, called = process_of(), process_of(kind, "v"), list[Tensor]()
    bad, good = gaussian(bad_process, 0.5, 1.0, called), gaussian(process, 0.2, 0.04)
    schedules = bad_process.schedule, process.schedule
    x_t, t = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.tensor([20.0, 61.0], dtype=torch.float64)
    guided = autoguided(good, bad, *schedules, 2.0)(x_t, t)
    alpha, sigma = (like(value, x_t) for value in process.schedule.level(t))
    of_good, of_bad = good(x_t, t).x0, gaussian(process, 0.5, 1.0)(x_t, t).x0
    torch.testing.assert_close(guided.x0, 2 * of_good - of_bad, rtol=0, atol=1e-5)
    torch.testing.assert_close(alpha * guided.x0 + sigma * guided.eps, x_t, rtol=0, atol=1e-5)
    same = autoguided(good, gaussian(bad_process, 0.2, 0.04), *schedules, 3.0)(x_t, t)
    torch.testing.assert_close(same.x0, of_good, rtol=0, atol=1e-5)
    called.clear()
    assert autoguided(good, bad, *schedules, 1.0) is good and not called, "w = 1 is the good one alone"


def test_a_bad_network_is_asked_only_at_levels_that_it_was_trained_at() -> None:
    table, blend, called = process_of("linear"), process_of("blend", "blend"), list[Tensor]()
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    for t, known in ((1.0, False), (0.5, True), (1e-4, False)):
        good, time = gaussian(blend, 0.0, 1.0), torch.tensor(t, dtype=torch.float64)
        assert is_trained_at(table.schedule, blend.schedule, time) == known
        guided = autoguided(good, gaussian(table, 0.3, 0.1, called), table.schedule, blend.schedule, 2.0)(x, time)
        assert torch.equal(guided.x0, good(x, time).x0) != known
    assert len(called) == 1
    entries = torch.arange(100, dtype=torch.float64)
    assert all(is_trained_at(table.schedule, table.schedule, t) for t in entries), "both ends of its own table"
    for t in entries:
        same, time = at_same_level(x, t, table.schedule, table.schedule)
        assert torch.equal(same, x) and time == t
    assert is_trained_at(blend.schedule, table.schedule, entries)
    clean = torch.tensor(0.0, dtype=torch.float64)
    assert is_trained_at(blend.schedule, blend.schedule, clean)
    assert not is_trained_at(process_of("blend", "x0").schedule, blend.schedule, clean)


def test_guidance_of_an_image_and_a_class_by_its_formula() -> None:
    """e_00 + s_image (e_i0 - e_00) + s_class (e_ic - e_i0), with as few calls as the scales need."""
    outputs = {name: torch.randn(2, 2, 3, 4) for name in ("both", "image", "neither")}
    called: list[str] = []

    def denoiser_of(name: str) -> Any:
        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            called.append(name)
            return Prediction(outputs[name][0], outputs[name][1], torch.full((2,), len(name)))

        return denoise

    def guided(image_scale: float, class_scale: float, *, classes: bool = True) -> Tensor:
        called.clear()
        image_alone = denoiser_of("image") if classes else None
        denoise = two_scales(denoiser_of("both"), image_alone, denoiser_of("neither"), image_scale, class_scale)
        prediction = denoise(torch.zeros(1), torch.zeros(1))
        assert torch.equal(prediction.variance_fraction, torch.full((2,), 4))  # pyright: ignore[reportArgumentType]
        return torch.stack(prediction[:2])

    e_ic, e_i0, e_00 = (outputs[name] for name in ("both", "image", "neither"))
    for scales, names in (
        ((1.5, 4.0), ["both", "image", "neither"]),
        ((1.5, 1.0), ["both", "image", "neither"]),
        ((0.0, 2.0), ["both", "image", "neither"]),
        ((1.0, 3.0), ["both", "image"]),
        ((2.0, 2.0), ["both", "neither"]),
        ((1.0, 1.0), ["both"]),
    ):
        by_hand = e_00 + scales[0] * (e_i0 - e_00) + scales[1] * (e_ic - e_i0)
        torch.testing.assert_close(guided(*scales), by_hand)
        assert called == names
    assert torch.equal(guided(1.0, 1.0), e_ic)
    torch.testing.assert_close(guided(3.0, 1.0, classes=False), e_00 + 3 * (e_ic - e_00))
    assert called == ["both", "neither"]


def test_dynamic_thresholding_by_its_formula() -> None:
    """Sec. 2.3, Saharia et al. 2022: s is a quantile of |x0|, at least 1; x0 is held to [-s, s] and divided by it."""
    process = process_of()
    x0 = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)]).double()
    x_t, t = torch.randn(2, 101).double(), torch.tensor(50.0)
    prediction = dynamic_threshold(constant(x0), process.schedule, 0.9)(x_t, t)
    s = torch.quantile(x0[0].abs(), 0.9)
    torch.testing.assert_close(prediction.x0[0], x0[0].clamp(-s, s) / s)
    torch.testing.assert_close(prediction.x0[1], x0[1])
    alpha, sigma = process.schedule.level(t)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x_t)


def test_guided_sampling_of_a_mixture_finds_the_class() -> None:
    """Data at -1 and 1, class by sign: classifier guidance turns an unconditional sampler into a conditional one."""
    process = process_of("cosine", "x0")

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = process.schedule.level(t)
        x0 = torch.tanh(like(alpha / sigma**2, x_t) * x_t)  # E[x0 | x_t]
        return Prediction(x0, (x_t - like(alpha, x_t) * x0) / like(sigma, x_t))

    def signs(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = process.schedule.level(t)
        return torch.cat([-x_t, x_t], dim=1) * like(alpha / sigma**2, x_t)

    gradient = classifier_gradient(signs, torch.ones(400, dtype=torch.long), 1.0)
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain, generator = times(process.schedule, 50), torch.Generator().manual_seed(1)

    def noise(step: int, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    plain = ddim(denoise, x, chain, process.schedule, noise=noise)
    assert 0.4 < float((plain > 0).double().mean()) < 0.6
    guided = ddim(classifier_guided(denoise, gradient, process.schedule), x, chain, process.schedule, noise=noise)
    assert float((guided > 0).double().mean()) > 0.97
    shift: Any = {"mean_shift": lambda x, t, v: v * gradient(x, t), "variance": "small", "noise": noise}
    assert float((ancestral(denoise, x, chain, process.schedule, **shift) > 0).double().mean()) > 0.97
