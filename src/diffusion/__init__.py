"""The mathematics of diffusion and blending; knows no network."""

from .guidance import classifier_free, clip
from .process import Denoiser, Losses, Prediction, Process, ProcessConfig, TimeInput, TrainableProcess, build_process, gain
from .schedules import SPACINGS, BlendSchedule, Level, Schedule, TableSchedule, build_schedule, times
from .solvers import DETERMINISTIC, SOLVERS, ancestral, ddim, dpmpp_2m, euler, heun, midpoint, rk4
from .variance import log_variance, transitions

__all__ = [
    "DETERMINISTIC",
    "SOLVERS",
    "SPACINGS",
    "BlendSchedule",
    "Denoiser",
    "Level",
    "Losses",
    "Prediction",
    "Process",
    "ProcessConfig",
    "Schedule",
    "TableSchedule",
    "TimeInput",
    "TrainableProcess",
    "ancestral",
    "build_process",
    "build_schedule",
    "classifier_free",
    "clip",
    "ddim",
    "dpmpp_2m",
    "euler",
    "gain",
    "heun",
    "log_variance",
    "midpoint",
    "rk4",
    "times",
    "transitions",
]
