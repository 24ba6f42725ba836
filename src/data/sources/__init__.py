"""Where images come from: a file for each source, all read through one interface; registry.py lists them."""

from .datasets import DatasetsSource
from .digits import DigitsSource
from .emnist import EMNIST_CLASSES, EmnistSource
from .folder import FolderImages, FolderSource
from .image_set import ImageSet, open_data, open_given, open_sources
from .images import ArrayImages, HeldOutShare, Images, Share, Source
from .packed import PackedImages, PackedSource
from .python import GIVEN, PythonSource
from .registry import SOURCES, HeldOut, OneSource, Sources, register_source
from .shapes import SHAPES, ShapesSource, draw_shape
