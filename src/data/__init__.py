"""Images and points: where they come from, which are left out, and what the network sees of them."""

from .facts import check_images, describe_data
from .points import DataEnd, GaussianSource, PointSet, SourceEnd, open_given_points, open_points
from .sources import (
    GIVEN,
    HeldOut,
    HeldOutShare,
    ImageSet,
    Share,
    Source,
    Sources,
    open_data,
    open_given,
    open_sources,
    register_source,
)
from .transforms import ImageConfig
