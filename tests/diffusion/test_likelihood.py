"""The variational bound: closed forms, a Gaussian's entropy, and the variance that the hybrid loss finds."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from src.config import UserError, validate
from src.diffusion import ProcessConfig, bits_per_dimension, build_process, times, transitions
from src.diffusion.likelihood import bits, discretized_gaussian_log_likelihood, normal_kl, prior_term, variational_term
from src.diffusion.process import Prediction, Process
from src.diffusion.schedules import like

SCALE = 0.25  # of the Gaussian data: few of its values leave [-1, 1]


def process_of(steps: int = 200, **options: object) -> Process:
    schedule = {"kind": "cosine", "steps": steps}
    hybrid = {"variance": "learned", "loss": {"kind": "hybrid"}}
    return build_process(validate(ProcessConfig, {"schedule": schedule, "target": "eps", **hybrid, **options}))


def best_x0(process: Process, x_t: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] of data N(0, SCALE^2)."""
    alpha, sigma = process.schedule.level(t)
    return like(alpha * SCALE**2 / (alpha**2 * SCALE**2 + sigma**2), x_t) * x_t


def true_log_variance(process: Process, chain: Tensor) -> Tensor:
    """Of q(x_s | x_t) for such data, which is Gaussian: beta_tilde + from_x0^2 Var(x0 | x_t), (N,)."""
    steps = transitions(process.schedule, chain)
    alpha, sigma = process.schedule.level(chain[:-1])
    spread = SCALE**2 * sigma**2 / (alpha**2 * SCALE**2 + sigma**2)
    return (steps.beta_tilde + steps.from_x0**2 * spread).log()


def fractions(process: Process, chain: Tensor) -> Tensor:
    """The learned variance's fraction that gives that variance."""
    steps = transitions(process.schedule, chain)
    log_beta, small = steps.beta.log(), steps.log_beta_tilde
    return (true_log_variance(process, chain) - small) / (log_beta - small)


def test_the_divergence_is_torchs() -> None:
    mean, log_var = torch.randn(2, 50, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    first, second = (Normal(m, (0.5 * v).exp()) for m, v in zip(mean, log_var, strict=True))
    divergence = normal_kl(mean[0], log_var[0], mean[1], log_var[1])
    torch.testing.assert_close(divergence, kl_divergence(first, second))


@pytest.mark.parametrize("scale", [0.002, 0.05, 0.7])
def test_a_pixels_values_have_probability_one_together(scale: float) -> None:
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean in (-1.3, -0.2, 0.99):
        chances = discretized_gaussian_log_likelihood(
            values, torch.tensor(mean).double(), torch.tensor(math.log(scale)).double()
        )
        assert float(chances.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_the_likelihood_of_a_gaussian_is_its_entropy() -> None:
    process = process_of()
    x0 = SCALE * torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    generator = torch.Generator().manual_seed(1)
    for chain in (times(process.schedule, 200), times(process.schedule, 25), times(process.schedule, [15, 10])):
        share = fractions(process, chain)

        def denoise(x_t: Tensor, t: Tensor, chain: Tensor = chain, share: Tensor = share) -> Prediction:
            estimate = best_x0(process, x_t, t)
            alpha, sigma = process.schedule.level(t)
            fraction = share[int((chain == t).nonzero())].expand_as(x_t)
            return Prediction(estimate, (x_t - like(alpha, x_t) * estimate) / like(sigma, x_t), fraction)

        likelihood = bits_per_dimension(
            denoise, x0, chain, process.schedule, variance="learned",
            noise=lambda _, like: torch.randn(like.shape, generator=generator, dtype=like.dtype),
        )  # fmt: skip
        entropy = 0.5 * math.log2(2 * math.pi * math.e * SCALE**2) - math.log2(2 / 255)
        assert likelihood.total.shape == (64,) and likelihood.terms.shape == (64, len(chain) - 1)
        assert float(likelihood.total.mean()) == pytest.approx(entropy, rel=0.005), "the bound is tight: the model is the truth"
        assert float(likelihood.prior.max()) < 0.01 and bool((likelihood.terms[:, :-1].mean(0) > -1e-6).all())


def test_the_prior_term_is_that_of_the_noisiest_level() -> None:
    process = process_of()
    x0 = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor(150.0)
    alpha, sigma = process.schedule.level(t)
    wanted = kl_divergence(Normal(alpha * x0, sigma), Normal(torch.zeros(()).double(), torch.ones(()).double()))
    torch.testing.assert_close(prior_term(process.schedule, t, x0), wanted.mean((1, 2, 3)) / math.log(2))


class Known(torch.nn.Module):
    """The best estimate of eps, and a learned variance for each entry of the table."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.v = torch.nn.Parameter(torch.zeros(len(process.chain.beta), dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = time.cpu().double()
        alpha, sigma = self.process.schedule.level(t)
        eps = (x - like(alpha, x) * best_x0(self.process, x, t)) / like(sigma, x)
        return torch.cat([eps, self.v[time.long()].reshape(-1, 1, 1, 1).expand_as(x)], dim=1)


@pytest.mark.parametrize("kind", ["hybrid", "kl", "rescaled_kl"])
def test_the_learned_variance_finds_the_known_one(kind: str) -> None:
    process = process_of(12, loss={"kind": kind})
    network, generator = Known(process), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    chain = times(process.schedule, 12)
    t = torch.arange(12).repeat(8).double()
    for _ in range(250):
        x0 = SCALE * torch.randn(len(t), 1, 16, 16, generator=generator, dtype=torch.float64)
        eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        process.losses(network, x0, eps, t).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    fraction = ((network.v.detach() + 1) / 2).flip(0)  # the chain begins with the noisiest
    wanted = fractions(process, chain)
    inside = slice(0, 11)  # into the clean level it is the decoder's bins that count, not the density
    torch.testing.assert_close(fraction[inside], wanted[inside], rtol=0, atol=0.03)


def test_the_hybrid_loss_teaches_the_variance_alone_by_its_variational_part() -> None:
    process = process_of(50, loss={"kind": "hybrid", "variational_weight": 3.0})
    output = torch.randn(2, 6, 4, 4, requires_grad=True)
    x0, eps = torch.randn(2, 2, 3, 4, 4)
    losses = process.losses(lambda x, time: output, x0, eps, torch.tensor([0, 30]))
    assert losses.mse is not None and losses.vb is not None and set(losses.terms) == {"mse", "vb"}
    torch.testing.assert_close(losses.loss, losses.mse + 3 * losses.vb)
    torch.testing.assert_close(losses.mse, (output[:, :3] - eps).square().mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(losses.vb.sum(), output, retain_graph=True)
    assert bool((gradient[:, :3] == 0).all()) and bool((gradient[:, 3:] != 0).any())


@torch.no_grad()
def test_kl_is_the_variational_term_and_rescaled_times_the_steps() -> None:
    x0, eps = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 7])
    network = torch.nn.Conv2d(1, 1, 3, padding=1).double()
    losses = {}
    for kind in ("kl", "rescaled_kl"):
        process = process_of(10, variance="small", loss={"kind": kind})
        losses[kind] = process.losses(lambda x, time: network(x), x0, eps, t).loss
    torch.testing.assert_close(losses["rescaled_kl"], 10 * losses["kl"])
    process = process_of(10, variance="small", loss={"kind": "kl"})
    x_t = process.add_noise(x0, eps, t)
    estimate = process.read(network(x_t), x_t, t).x0
    steps, index = process.chain, 9 - t
    by_hand = variational_term(steps, index, x0, x_t, estimate, "small", None)
    torch.testing.assert_close(losses["kl"], by_hand)
    gap = float(steps.from_x0[2]) * (x0[1] - estimate[1])
    divergence = gap.square().mean() / (2 * float(steps.beta_tilde[2])) / math.log(2)
    assert float(by_hand[1]) == pytest.approx(float(divergence))
    decoder = discretized_gaussian_log_likelihood(x0[:1], estimate[:1], 0.5 * steps.log_beta_tilde[9])
    assert float(by_hand[0]) == pytest.approx(float(bits(-decoder)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": {"kind": "simple"}}, "teaches no learned variance; use hybrid"),
        ({"variance": "small"}, "set variance to learned, or use simple"),
        ({"schedule": {"kind": "blend"}, "target": "v"}, "the blend has no chain of steps"),
        ({"loss": {"kind": "kl", "variational_weight": 2.0}}, "weighs a part of the hybrid loss, which 'kl' has not"),
        ({"loss": {"kind": "kl", "min_snr_gamma": 5}}, "weighs a squared error"),
        (
            {
                "schedule": {"kind": "cosine", "zero_terminal_snr": True},
                "target": "v",
                "variance": "large",
                "loss": {"kind": "simple", "min_snr_gamma": 5},
            },
            "gives a level without signal no weight",
        ),
        ({"loss": {"kind": "hybrd"}}, "'simple', 'hybrid', 'kl' or 'rescaled_kl'"),
    ],
)
def test_losses_that_make_no_sense(changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        process_of(**changed)
