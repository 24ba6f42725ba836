"""The mathematics of diffusion and blending; knows no network."""

from .guidance import (
    classifier_free,
    classifier_gradient,
    classifier_guided,
    clip,
    dynamic_threshold,
    is_within,
    on_schedule,
    within,
)
from .likelihood import BitsPerDimension, bits_per_dimension
from .process import Denoiser, LossConfig, Losses, Prediction, Process, ProcessConfig, TimeInput, build_process, gain
from .schedules import SPACINGS, BlendSchedule, Level, Schedule, TableSchedule, build_schedule, inversion_times, times
from .solvers import DETERMINISTIC, INVERTIBLE, SOLVERS, ancestral, ddim, dpmpp_2m, euler, heun, midpoint, redraw, rk4
from .variance import log_variance, transitions

__all__ = [
    "DETERMINISTIC",
    "INVERTIBLE",
    "SOLVERS",
    "SPACINGS",
    "BitsPerDimension",
    "BlendSchedule",
    "Denoiser",
    "Level",
    "LossConfig",
    "Losses",
    "Prediction",
    "Process",
    "ProcessConfig",
    "Schedule",
    "TableSchedule",
    "TimeInput",
    "ancestral",
    "bits_per_dimension",
    "build_process",
    "build_schedule",
    "classifier_free",
    "classifier_gradient",
    "classifier_guided",
    "clip",
    "ddim",
    "dpmpp_2m",
    "dynamic_threshold",
    "euler",
    "gain",
    "heun",
    "inversion_times",
    "is_within",
    "log_variance",
    "midpoint",
    "on_schedule",
    "redraw",
    "rk4",
    "times",
    "transitions",
    "within",
]
