"""Pictures and points: where they come from, which are left out, and what the network sees of them."""

from .facts import describe_data
from .given import GIVEN, open_given, open_given_points
from .points import DataEnd, GaussianSource, PointSet, SourceEnd, open_points
from .sides import check_images
from .sources import HeldOut, ImageSet, Source, Sources, open_data, open_sources
from .transforms import ImageConfig

__all__ = [
    "GIVEN",
    "DataEnd",
    "GaussianSource",
    "HeldOut",
    "ImageConfig",
    "ImageSet",
    "PointSet",
    "Source",
    "SourceEnd",
    "Sources",
    "check_images",
    "describe_data",
    "open_data",
    "open_given",
    "open_given_points",
    "open_points",
    "open_sources",
]
