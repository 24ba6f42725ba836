"""From a run to pictures: open it, seeded noise, batches dealt to ranks, files written once."""

from ..runs.opened import Opened, open_trained
from .sampler import Sampler, SamplerConfig, noise_of

__all__ = ["Opened", "Sampler", "SamplerConfig", "noise_of", "open_trained"]
