"""Loss weightings against their closed forms, for every target."""

from typing import Any

import pytest
import torch

from src.config import UserError, dump, load, validate
from src.diffusion import LossConfig, Process, ProcessConfig, build_process
from tests.conftest import ROOT

T = torch.tensor([3.0, 300.0, 700.0, 998.0])
KINDS = [{"kind": "min_snr", "gamma": 3}, {"kind": "p2"}, {"kind": "p2", "gamma": 0.5, "k": 2.0}, {"kind": "edm"}]


def process_of(target: str, weighting: Any, schedule: dict[str, Any] | None = None) -> Process:
    raw = {"schedule": schedule or {"kind": "cosine"}, "target": target, "loss": {"weighting": weighting}}
    return build_process(validate(ProcessConfig, raw))


def levels(process: Process, t: torch.Tensor = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """alpha, sigma and the ratio of signal and noise, alpha^2 / sigma^2."""
    alpha, sigma = process.schedule.level(t)
    return alpha, sigma, (alpha / sigma) ** 2


def test_constant_is_the_squared_error_as_it_is() -> None:
    process = process_of("v", {"kind": "constant"})
    assert process.loss == LossConfig() and torch.equal(process.loss_weight(T), torch.ones(4, dtype=torch.float64))
    x0, eps = torch.randn(2, 4, 1, 4, 4)
    losses = process.losses(lambda x, time: torch.zeros_like(x), x0, eps, T)
    assert losses.loss is losses.mse


@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5)])
def test_p2_by_its_formula(gamma: float, k: float) -> None:
    """Eq. 8, Choi et al. 2022: 1 / (k + SNR)^gamma times the squared error of eps, which is SNR times that of x0, and alpha^2
    times that of v."""
    spec = {"kind": "p2", "gamma": gamma, "k": k}
    alpha, _, snr = levels(process_of("eps", spec))
    on_eps = 1 / (k + snr) ** gamma
    for target, gain in (("eps", torch.ones_like(snr)), ("x0", snr), ("v", alpha**2)):
        torch.testing.assert_close(process_of(target, spec).loss_weight(T), on_eps * gain)


def test_edm_by_its_formula() -> None:
    """Table 1, Karras et al. 2022, with s = sigma / alpha: (s^2 + sigma_data^2) / (s sigma_data)^2 times the squared error of
    x0. Of data of deviation 1 that is the squared error of v as it is."""
    process = process_of("x0", {"kind": "edm", "sigma_data": 0.7})
    alpha, sigma, _ = levels(process)
    s = sigma / alpha
    torch.testing.assert_close(process.loss_weight(T), (s**2 + 0.7**2) / (s * 0.7) ** 2)
    plain = process_of("v", {"kind": "edm", "sigma_data": 1})
    torch.testing.assert_close(plain.loss_weight(T), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("weighting", KINDS, ids=str)
@pytest.mark.parametrize("target", ["eps", "v", "blend"])
def test_all_targets_are_weighed_as_x0_is(weighting: dict[str, Any], target: str) -> None:
    """An error of the output, read as one of x0, costs the same whatever the network predicts."""
    process, of_x0 = process_of(target, weighting), process_of("x0", weighting)
    x_t, y, error = torch.randn(3, 4, 1, 2, 2, dtype=torch.float64)
    moved = (process.read(y + error, x_t, T).x0 - process.read(y, x_t, T).x0).square().mean((1, 2, 3))
    torch.testing.assert_close(process.loss_weight(T) * error.square().mean((1, 2, 3)), of_x0.loss_weight(T) * moved)


def test_the_ends_of_the_blend_have_finite_weights() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    others = {"edm": [1, 4]}  # than zero at both ends
    for weighting in KINDS:
        process, wanted = process_of("blend", weighting, {"kind": "blend"}), others.get(weighting["kind"], [0, 0])
        torch.testing.assert_close(process.loss_weight(t), torch.tensor(wanted, dtype=torch.float64))


def test_a_level_without_signal_needs_a_weight() -> None:
    zero = {"kind": "cosine", "zero_terminal_snr": True}
    for kind in ("min_snr", "p2"):
        with pytest.raises(UserError, match=f"{kind} gives a level without signal no weight"):
            process_of("v", {"kind": kind}, zero)
    assert float(process_of("v", {"kind": "edm"}, zero).loss_weight(torch.tensor(999))) == pytest.approx(4)


def test_the_old_key_of_min_snr_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a config, in a run and on the command line, where it wins over the new key of the file."""
    five = {"kind": "min_snr", "gamma": 5.0}
    for gamma, wanted in ((5, five), (None, {"kind": "constant"})):
        spec = validate(LossConfig, {"min_snr_gamma": gamma})
        assert dump(spec) == dump(validate(LossConfig, {"weighting": wanted})) and dump(spec)["weighting"] == wanted
    monkeypatch.syspath_prepend(str(ROOT))
    import ddpm_accelerate

    def weighting(config: str, *words: str) -> Any:
        return dump(load(ROOT / "configs" / f"{config}.json", ddpm_accelerate.Config, words).process.loss.weighting)

    assert weighting("landscape64_ddpm") == five, "a shipped config has the new key"
    assert weighting("landscape64_ddpm", "process.loss.min_snr_gamma=2") == {"kind": "min_snr", "gamma": 2.0}
    assert weighting("landscape64_ddpm", "process.loss.min_snr_gamma=null") == {"kind": "constant"}
    assert weighting("smoke/ddpm", "process.loss.min_snr_gamma=5") == five
    assert weighting("smoke/ddpm", "process.loss.weighting.kind=p2", "process.loss.weighting.k=2")["k"] == 2
    old = ROOT / "tests" / "old_runs" / "ddpm_accelerate" / "config.json"
    assert dump(load(old, ddpm_accelerate.Config, ["process.loss.weighting.gamma=4"]).process.loss.weighting)["gamma"] == 4
    with pytest.raises(UserError, match=r"process\.loss\.weighting\.gamma: input should be a valid number, not 'five'"):
        weighting("smoke/ddpm", "process.loss.min_snr_gamma=five")
    with pytest.raises(UserError, match=r"weighting.kind: 'min_snrr' is not known; did you mean 'min_snr'\?"):
        weighting("smoke/ddpm", "process.loss.weighting.kind=min_snrr")
