"""The training loops: the three diffusion scripts have one, and each can be read from top to bottom."""

import difflib
from pathlib import Path

import pytest
import torch
from torch import nn

from src.runtime.stream import plan_batch
from src.training.ema import EMA, EMAConfig
from tests.conftest import ROOT

DIFFUSION = ("ddpm_accelerate", "train_ldm", "train_iadb")
# The lines in which the loops of the three diffusion scripts may differ: their scripts' own inputs and outputs.
MAY_DIFFER = {
    "accelerator.backward(loss * (batch_plan.world / batch_plan.batch))",
    "accelerator.backward(loss * (batch_plan.world / batch_plan.batch * loss_scale))",  # loss_reduction of the IADB paper
    "preview(sampler, cfg.preview, session, train_set.class_names)",
    "values |= preview_paths(sampler_for, cfg.preview, session, train_set.class_names, coupling)",
    'if session.is_due("export"):',
    'session.export(Path(cfg.export_dir), f"ckpt_epoch{batch_plan.images_at(session.step) // len(train_set)}_ddpm.pt")',
}


def loop_of(script: str) -> list[str]:
    """The lines of a script from `# Train.` to the comment after the loop."""
    text = (ROOT / f"{script}.py").read_text()
    begin = text.index("# Train.\n")
    return text[begin : text.index("# Leave what", begin)].splitlines()


def lines_of(script: str) -> int:
    return len((ROOT / f"{script}.py").read_text().splitlines())


@pytest.mark.parametrize("script", DIFFUSION[1:])
def test_the_diffusion_scripts_have_the_same_loop(script: str) -> None:
    difference = difflib.ndiff(loop_of(DIFFUSION[0]), loop_of(script))
    changed = {line[2:].strip() for line in difference if line[0] in "+-"}
    assert changed <= MAY_DIFFER, "write these lines in the same way in all three scripts"


def test_scripts_and_loops_are_short() -> None:
    lines = {
        path.stem: lines_of(path.stem)
        for path in ROOT.glob("*.py")
        if (ROOT / "configs/schemas" / f"{path.stem}.json").exists()
    }
    assert len(lines) == 5 and max(lines.values()) <= 250
    assert lines["ddpm_accelerate"] == min(lines.values()), "it is the one to read first"
    assert len(loop_of("train_vae")) < 90


@pytest.mark.parametrize("script", ["train_vae", "train_classifier", *DIFFUSION])
def test_the_ema_follows_in_the_loop(script: str) -> None:
    """Before the optimizer's step, of the step before, and once more before anything looks at it."""
    steps = [line.strip() for line in loop_of(script)]
    update = "ema.update_after(session.take_finite_step(), network, batch_plan)"
    assert steps.count(update) == 2
    first, second = (number for number, line in enumerate(steps) if line == update)
    assert (
        steps[first + 1].startswith("update(optimizer, ") and first < steps.index("if not session.is_anything_due():") < second
    )


def test_a_step_that_is_not_finite_does_not_enter_the_ema() -> None:
    network = nn.Linear(1, 1, bias=False)
    ema, plan = EMA(network, EMAConfig(half_life_images=8, ramp_up=None)), plan_batch(8, None, rank=0, world=1)
    before = ema.network.weight.detach().clone()
    with torch.no_grad():
        network.weight.fill_(float(before) + 2)
    ema.update_after(None, network, plan)
    assert torch.equal(ema.network.weight, before)
    ema.update_after(1, network, plan)
    torch.testing.assert_close(ema.network.weight.data, before + 1)  # eight images are one half-life


def test_no_file_asks_whether_a_run_is_a_rehearsal() -> None:
    """A rehearsal is the same run with another config: nothing but what is said depends on it."""
    for folder in ("src/training", "src/runs", "src/evaluation", "."):
        for path in (ROOT / folder).glob("*.py"):
            text = Path(path).read_text()
            assert "attempt." not in text and "Attempt" not in text and "is_trial" not in text, path
