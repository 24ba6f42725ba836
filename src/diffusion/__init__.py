"""The mathematics of diffusion and blending. A network is always an argument."""

from .guidance import (
    at_same_level,
    autoguided,
    classifier_free,
    classifier_gradient,
    classifier_guided,
    clip,
    dynamic_threshold,
    is_trained_at,
    is_within,
    on_schedule,
    two_scales,
    within,
)
from .likelihood import bits_per_dimension
from .process import Denoiser, LossConfig, Prediction, Process, ProcessConfig, TimeInput, build_process
from .schedules import SPACINGS, BlendSchedule, Schedule, TableSchedule, build_schedule, inversion_times, times
from .solvers import SOLVERS, Solver, ancestral, ddim, dpmpp_2m, euler, invertible_solvers, redraw, register_solver, rk4
from .time_shift import TimeShift, shift_times
from .variance import log_variance, transitions
