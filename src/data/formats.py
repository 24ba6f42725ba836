"""Which files are images here: what Pillow and its plugins read, and what a person has to convert first."""

import importlib
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.packages import is_installed

if TYPE_CHECKING:
    from PIL import Image

_NAMED_BY_ENDING = ("WEBP", "GIF", "ICO", "CUR", "ICNS", "DDS", "PCX", "PSD", "QOI", "SGI", "XBM", "XPM", "TGA")
# Formats of Pillow that run no other program (EPS would start Ghostscript), with the endings of their files.
BUILT_IN = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "SUN": (".ras",),
    "FITS": (".fits", ".fit"),
    **{name: (f".{name.lower()}",) for name in _NAMED_BY_ENDING},
}
LIBRARIES = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # what Pillow must have been built with for them
READ_BEFORE = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
UNSIGNED = ("TGA", "CUR", "ICO", "PCX", "XBM")  # too little at the beginning of such a file says what it is: its ending has to
SERIES = ("GIF", "TIFF", "WEBP", "PNG", "AVIF", "HEIF", "JXL")  # formats of animations and of pages
# Packages that teach Pillow another format: the module to import, its function to call, and the format's name afterwards.
PLUGINS = {
    "pillow-heif": ("pillow_heif", "register_heif_opener", "HEIF", (".heic", ".heif", ".heics", ".heifs", ".hif")),
    "pillow-jxl-plugin": ("pillow_jxl", None, "JXL", (".jxl",)),
    "pillow-avif-plugin": ("pillow_avif", None, "AVIF", (".avif", ".avifs")),
}
_RAW = ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .rw2 .rwl .sr2 .srf .srw .x3f"
RAW = tuple(_RAW.split())  # of cameras; read with rawpy
_VIDEO = ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .webm .wmv"
_ARCHIVES = ".7z .bz2 .gz .rar .tar .tgz .txz .xz .zip .zst"
_ADVICE = {
    ".pdf": "draw its pages first, such as with pdftoppm",
    ".svg .svgz": "draw them first, such as with cairosvg",
    ".eps .ps .ai": "draw them first, such as with Ghostscript",
    ".psb .xcf .kra .clip .sketch .afphoto .procreate .cdr": "save them as PNG first",
    ".exr .hdr .jxr .wdp .hdp .bpg .flif .djvu .wmf .emf": "convert them to PNG first",
    ".dcm .dicom .nii": "convert them to PNG first, such as with pydicom or nibabel",
    _VIDEO: "take images out of them first, such as with ffmpeg",
    _ARCHIVES: "unpack them first: python prepare_data.py unpack FILE",
}
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands of files that begin as videos do
_AVIF = (b"avif", b"avis")
_STARTS = {  # of text that says what a file is
    b"%pdf": "a PDF under another ending",
    b"<svg": "an SVG under another ending",
    b"version https://git-lfs": "a Git LFS pointer: fetch the image with git lfs pull",
    b"pk\x03\x04": "a zip archive under another ending",
}


@cache
def _formats() -> dict[str, tuple[str, ...]]:
    """{format: endings} that can be read here. Plugins that are installed register themselves with Pillow.

    Pillow's own limits on what is read are lifted with it.
    """
    from PIL import Image, PngImagePlugin, features

    Image.MAX_IMAGE_PIXELS = None  # the scan holds images to `max_pixels` by their header, before anything is decoded
    # A PNG may carry a workflow or a profile that is far larger than what Pillow takes by itself, and is a whole image.
    PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # bytes of one chunk of text, or of a profile, when it is unpacked
    PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20  # of all of them together
    Image.init()
    known = {
        name: endings
        for name, endings in BUILT_IN.items()
        if name in Image.OPEN and (name not in LIBRARIES or features.check(LIBRARIES[name]))
    }
    for module, function, name, endings in PLUGINS.values():
        if name in known or not is_installed(module):
            continue
        try:
            plugin: Any = importlib.import_module(module)
            if function is not None:
                getattr(plugin, function)()
        except Exception:  # a plugin that does not start is as one that is not installed
            continue
        if name in Image.OPEN:
            known[name] = endings
    return known


@cache
def endings() -> frozenset[str]:
    """The endings, in small letters, of the files that can be read here."""
    of_formats = {ending for endings in _formats().values() for ending in endings}
    return frozenset(of_formats | set(RAW if is_installed("rawpy") else ()))


def with_plugins(key: str) -> str:
    """The key of a scan with the formats that packages besides Pillow read here: with them other files can be read."""
    names = [name for _, _, name, _ in PLUGINS.values() if name in _formats() and name not in BUILT_IN]
    return f"{key}|{','.join(names)}" if names else key


@cache
def unreadable() -> dict[str, str]:
    """{ending: what to do} of files that are images to their owner, or hold images, and cannot be read here."""
    advice = {ending: f"to read them: pip install {package}" for package, plugin in PLUGINS.items() for ending in plugin[3]}
    advice |= dict.fromkeys(BUILT_IN["JPEG2000"] + BUILT_IN["WEBP"], "to read them: install a Pillow that has their library")
    advice |= dict.fromkeys(RAW, "to read them: pip install rawpy")
    advice |= {ending: what_to_do for several, what_to_do in _ADVICE.items() for ending in several.split()}
    return {ending: what_to_do for ending, what_to_do in advice.items() if ending not in endings()}


def reason_for(ending: str) -> str:
    """Why files of an ending that cannot be read here are left out, in words."""
    return f"{ending} ({unreadable()[ending]})"


def describe_content(file: Any) -> str | None:
    """What a file that Pillow does not know is by its first bytes, whatever its ending says; None where that is not known."""
    try:
        if hasattr(file, "seek"):
            file.seek(0)
            head = file.read(64)
        else:
            with open(file, "rb") as opened:
                head = opened.read(64)
    except OSError:
        return None
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    kinds = {"a HEIC": (".heic", brand in _HEIC), "an AVIF": (".avif", brand in _AVIF)}
    kinds["a JPEG XL"] = (".jxl", head[:2] == b"\xff\x0a" or head[4:8] == b"JXL ")
    for kind, (ending, is_it) in kinds.items():
        if is_it:
            return f"{kind} image under another ending ({unreadable().get(ending, 'damaged')})"
    text = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    words = next((words for start, words in _STARTS.items() if text.startswith(start)), None)
    return words or ("a video under another ending" if brand else None)


def open_image(file: Any) -> "Image.Image":
    """Open a path or an open file as Pillow does, in the formats above alone; camera raw by rawpy, where that is there."""
    from PIL import Image, UnidentifiedImageError

    ending = Path(file).suffix.lower() if isinstance(file, str | Path) else ""
    if ending in RAW and ending in endings():
        rawpy: Any = importlib.import_module("rawpy")  # as the camera's maker meant it: its own white balance, turned upright
        with open(file, "rb") as opened, rawpy.imread(io.BytesIO(opened.read())) as raw:
            return Image.fromarray(np.asarray(raw.postprocess(use_camera_wb=True), dtype=np.uint8))
    names = [name for name in _formats() if name not in UNSIGNED or ending in BUILT_IN[name]]
    try:
        return Image.open(file, formats=sorted(names, key=lambda name: name not in UNSIGNED))
    except UnidentifiedImageError as error:
        advice = f": {reason_for(ending)}" if ending in unreadable() else ""
        raise UnidentifiedImageError(f"{error}{advice}") from None


def sequence_of(file: Any) -> str | None:
    """What a file is that holds several images, of which the first is used: an animation, a series of pages. The stereo pairs
    of a camera, the sizes of an icon and the layers of a drawing are no series."""
    try:
        with open_image(file) as image:
            if image.format not in SERIES or not getattr(image, "is_animated", False):
                return None
            kind = "files of several pages" if image.format in ("TIFF", "HEIF") else "animated files"
            return f"{kind} ({image.format}), of which the first image is used"
    except Exception:  # the scan says what cannot be read
        return None
