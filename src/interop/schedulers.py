"""Our process as the `scheduler_config.json` of diffusers, and back."""

from collections.abc import Mapping
from typing import Any

from ..config import UserError, validate
from ..diffusion import ProcessConfig
from ..diffusion.process import time_input_for
from ..diffusion.schedules import BetaSchedule, BlendScheduleConfig
from ..runs.diffusers_autoencoder import VERSION

# Values of diffusers -> ours.
TABLES = {
    "beta_schedule": {"linear": "linear", "scaled_linear": "quadratic", "sigmoid": "sigmoid", "squaredcos_cap_v2": "cosine"},
    "prediction_type": {"epsilon": "eps", "sample": "x0", "v_prediction": "v"},
    "variance_type": {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"},
}
DDPM_DEFAULTS = (
    {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None}
    | {"variance_type": "fixed_small", "clip_sample": True, "prediction_type": "epsilon", "thresholding": False}
    | {"dynamic_thresholding_ratio": 0.995, "clip_sample_range": 1.0, "sample_max_value": 1.0}
    | {"timestep_spacing": "leading", "steps_offset": 0, "rescale_betas_zero_snr": False}
)
# How their sampler goes through the levels, which is no part of the process; diffusers 0.1 had a `tensor_format`.
SAMPLING = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "tensor_format": "pt"}
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_SAMPLING = (
    {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    | {"max_image_seq_len": 4096, "shift_terminal": None, "use_karras_sigmas": False, "use_exponential_sigmas": False}
    | {"use_beta_sigmas": False, "time_shift_type": "exponential", "stochastic_sampling": False}
)


def process_config(theirs: Mapping[str, Any], *, learned: bool) -> ProcessConfig:
    """A `scheduler_config.json` of DDPMScheduler, DDIMScheduler or FlowMatchEulerDiscreteScheduler as our process; `learned`
    says whether the network's output has channels for the variance. A UserError names the key and the value that we lack. The
    file does not say how the network was trained: a learned variance gets the hybrid loss here. With the last scheduler a
    network predicts eps - x0, which is our `blend` negated."""
    if theirs.get("_class_name") == FLOW:
        return _flow_process(theirs, learned=learned)
    settings = {**DDPM_DEFAULTS, **theirs}
    kinds = ("DDPMScheduler", "DDIMScheduler")
    schedulers = (
        f"DDPMScheduler, DDIMScheduler, {FLOW}; save the pipeline with the scheduler that it was trained with, such as "
        "DDPMScheduler.from_config(pipeline.scheduler.config)"
    )
    variances = "learned_range with twice as many channels out as in, else fixed_small or fixed_large"
    unknown = [key for key in settings if key not in DDPM_DEFAULTS and key not in SAMPLING and not key.startswith("_")]
    checks = [
        ("_class_name", settings.get("_class_name", "DDPMScheduler") in kinds, schedulers),
        *((key, settings[key] is None, "to leave it out") for key in unknown),
        ("trained_betas", settings["trained_betas"] is None, "null, and a beta_schedule"),
        ("thresholding", not settings["thresholding"], "false"),
        ("clip_sample_range", not settings["clip_sample"] or settings["clip_sample_range"] == 1, "1.0"),
        *((key, settings[key] in list(table), ", ".join(table)) for key, table in TABLES.items()),
        ("variance_type", (settings["variance_type"] == "learned_range") == learned, variances),
    ]
    for key, fits, allowed in checks:
        if not fits:
            raise UserError(f"a scheduler with {key}={settings[key]!r} is not supported; allowed: {allowed}")
    kind, target, variance = (table[settings[key]] for key, table in TABLES.items())
    betas = {} if kind == "cosine" else {"beta_start": settings["beta_start"], "beta_end": settings["beta_end"]}
    snr = settings["rescale_betas_zero_snr"]
    return validate(
        ProcessConfig,
        {
            "schedule": {"kind": kind, "steps": settings["num_train_timesteps"], "zero_terminal_snr": snr, **betas},
            "target": target,
            "variance": variance,
            "clip": settings["clip_sample"],
            "loss": {"kind": "hybrid" if learned else "simple"},
        },
        origin="this scheduler as process",
    )


def _flow_process(theirs: Mapping[str, Any], *, learned: bool) -> ProcessConfig:
    """That of a FlowMatchEulerDiscreteScheduler: x_t = (1 - t) x0 + t eps, and the network is fed t times its timesteps."""
    for key, value in theirs.items():
        known = key in FLOW_SAMPLING or key.startswith("_") or key == "num_train_timesteps"
        if not known and value is not None and not (key == "invert_sigmas" and value is False):
            raise UserError(f"a {FLOW} with {key}={value!r} is not supported; allowed: to leave it out")
    if learned:
        raise UserError(f"a {FLOW} with twice as many channels out as in is not supported; the blend learns no variance")
    time = {"kind": "t", "scale": theirs.get("num_train_timesteps", 1000)}
    blend = {"schedule": {"kind": "blend"}, "target": "blend", "clip": False, "time_input": time}
    return validate(ProcessConfig, blend, origin="this scheduler as process")


def scheduler_config(spec: ProcessConfig) -> dict[str, Any] | None:
    """Our process as the `scheduler_config.json` of a DDPMScheduler, or of a FlowMatchEulerDiscreteScheduler for the blend: the
    inverse of `process_config`. None for a blend whose network is fed another time than 1000 t, which no scheduler feeds. A
    UserError names the option that the schedulers lack."""
    schedule, time = spec.schedule, spec.time_input
    if isinstance(schedule, BlendScheduleConfig):
        if spec.target != "blend":
            raise UserError(
                f"diffusers has no process.schedule blend with process.target {spec.target}; what can be exported has blend"
            )
        time = time_input_for(schedule, time)
        if (time.kind, time.scale) != ("t", 1000.0):
            return None
        return {"_class_name": FLOW, "_diffusers_version": VERSION, "num_train_timesteps": 1000, **FLOW_SAMPLING}
    schedules, targets, variances = ({ours: theirs for theirs, ours in table.items()} for table in TABLES.values())
    if spec.target not in targets:
        raise UserError(f"DDPMScheduler has no process.target {spec.target}; what can be exported has {', '.join(targets)}")
    if time is not None and (time.kind, time.scale) != ("index", 1.0):
        raise UserError(
            f"UNet2DModel is fed the index of the level and has no process.time_input {time.kind} times {time.scale:g}; what "
            "can be exported has index times 1"
        )
    changed: dict[str, Any] = {
        "num_train_timesteps": schedule.steps,
        "beta_schedule": schedules[schedule.kind],
        "variance_type": variances[spec.variance],
        "prediction_type": targets[spec.target],
        "clip_sample": spec.clip,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }
    if isinstance(schedule, BetaSchedule):
        scale = 1000 / schedule.steps if schedule.rescale_betas else 1.0
        changed |= {"beta_start": scale * schedule.beta_start, "beta_end": scale * schedule.beta_end}
    return {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION, **DDPM_DEFAULTS, **changed}
