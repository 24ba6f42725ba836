"""Pictures: where they come from, which are left out, and what the network sees of them."""

from .sources import HeldOut, PictureSet, Source, Sources, open_data, open_sources
from .transforms import ImageConfig

__all__ = ["HeldOut", "ImageConfig", "PictureSet", "Source", "Sources", "open_data", "open_sources"]
