"""From a run to images: open it, seeded noise, batches dealt to ranks, files written once."""

from ..runs.opened import Opened, open_trained
from ..runtime.seeds import noise_of
from .config import SamplerConfig
from .sampler import Sampler, build_sampler
