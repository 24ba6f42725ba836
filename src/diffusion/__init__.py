"""The mathematics of diffusion and blending. A network is always an argument."""

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
from .solvers import (
    SOLVERS,
    Solver,
    ancestral,
    ddim,
    dpmpp_2m,
    euler,
    heun,
    invertible_solvers,
    midpoint,
    redraw,
    register_solver,
    rk4,
)
from .variance import log_variance, transitions
