"""Images: opened late, always 8-bit RGB, always inside the data root, with an error that names the file.

How they are opened is one setting of a process (`pictures`), because every part that opens one must open it alike.
"""

from __future__ import annotations

import base64
import io
import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from holdfast.data.embedded import embedded_text, is_embedded
from holdfast.data.source_files import inside, is_plain_path, missing, plain_start
from holdfast.errors import ConfigError, DataError
from holdfast.files import NotAFileError, open_regular
from holdfast.text import one_line

# 8192 x 8192: 200 MB as RGB, and as much again while it is converted. Documents of real benchmarks stay far below.
MAX_PIXELS = 2**26
# Channels of 16 bits and opacity take several copies while they are converted.
MAX_DEEP_PIXELS = MAX_PIXELS // 2
# Drawn by another program (Ghostscript), drawn anew at any size, or mere stubs: no pictures to be trusted.
_NOT_OPENED = frozenset({"EPS", "WMF", "EMF", "HDF5", "GRIB", "BUFR", "MPEG", "FITS"})
# Modes that hold more than 8 bits a channel.
_DEEP = ("I", "F")
_EXIF_ORIENTATION = 0x0112
_ROWS = 256
_TIFF_PHOTOMETRIC = 262

ImageMode = Literal["upright", "published"]


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How pictures are opened.

    images: "upright" turns a picture as its EXIF tag says and lays transparency over white; "published" does neither,
        as the scripts of CoIN, HiDe-LLaVA, MCITlib and LLaVA do (`Image.open(...).convert("RGB")`).
    max_pixels: the most pixels (width x height) that the model is shown of one; null: the processor's bound.
    """

    images: ImageMode = "upright"
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.images not in ("upright", "published"):
            raise ConfigError(f"images is {self.images!r}; expected upright or published.")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ConfigError(f"max_pixels is {self.max_pixels}; expected 1 or more, or null.")


@dataclass(frozen=True, kw_only=True)
class PictureForm:
    """A kind of picture, and what is made of it. modes: Pillow's names of what it is opened as."""

    name: str
    verdict: Literal["read", "refused"]
    sentence: str
    modes: tuple[str, ...] = ()


# What the documentation says of pictures; each mode is tried by a test.
PICTURE_FORMS = (
    PictureForm(
        name="8 bits a channel: RGB, grey, palette, black and white, CMYK, YCbCr, HSV, RGBX",
        verdict="read",
        sentence="as 8-bit RGB, by Pillow's conversion",
        modes=("RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "RGBX"),
    ),
    PictureForm(name="LAB", verdict="read", sentence="as sRGB, through colour profiles", modes=("LAB",)),
    PictureForm(
        name="transparency: RGBA, LA, PA, a transparent colour, colours multiplied by their opacity",
        verdict="read",
        sentence="laid over white; with `images: published` the colours below it show, as in the published scripts",
        modes=("RGBA", "LA", "PA", "RGBa", "La"),
    ),
    PictureForm(
        name="16-bit grey, of either byte order (PNG, TIFF, PGM)",
        verdict="read",
        sentence="scaled by 255 / 65535",
        modes=("I;16", "I;16L", "I;16B"),
    ),
    PictureForm(
        name="32-bit integers and floating numbers",
        verdict="read",
        sentence="scaled from the smallest usual white that holds the brightest pixel (255, 65535 or 2^31 - 1; 1, 255 "
        "or 65535)",
        modes=("I", "F"),
    ),
    PictureForm(
        name="numbers below 0, above every usual white, or not finite",
        verdict="refused",
        sentence="convert the picture to 8 or 16 bits",
    ),
    PictureForm(
        name="turned by an EXIF tag",
        verdict="read",
        sentence="upright; with `images: published` as it is stored",
    ),
    PictureForm(name="several frames", verdict="read", sentence="the first one"),
    PictureForm(
        name="written out in the text: a data URI, Base64", verdict="read", sentence="put on disk by its content, once"
    ),
    PictureForm(name="an address (http, https, s3, gs)", verdict="refused", sentence="fetch it, and name the file"),
    PictureForm(
        name="an absolute path, a drive, or `..` out of the data root",
        verdict="refused",
        sentence="set `root` to a folder that holds it",
    ),
    PictureForm(
        name=f"more than {MAX_PIXELS:,} pixels", verdict="refused", sentence="a decompression bomb; make it smaller"
    ),
    PictureForm(name="cut short, empty, or no picture", verdict="refused", sentence="fetch it again"),
)

_CURRENT: ContextVar[PictureConfig | None] = ContextVar("pictures", default=None)


def current_pictures() -> PictureConfig:
    """How this process opens pictures now."""
    return _CURRENT.get() or PictureConfig()


@contextmanager
def pictures(config: PictureConfig) -> Iterator[None]:
    """Within the block every picture is opened as `config` says."""
    token = _CURRENT.set(config)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def open_image(path: Path, config: PictureConfig | None = None) -> Image.Image:
    """The image in `path` as a loaded 8-bit RGB picture, opened as `config` (default: `current_pictures()`) says.

    Upright: EXIF orientation applied, transparency laid over white (a plain conversion shows whatever colour lies under
    transparent pixels, which is black in most charts). Channels of more than 8 bits are scaled to 8 in either mode.
    Raises DataError: missing, not an image, truncated, numbers that have no agreed white, or so large that decoding it
        is unsafe.
    """
    config = config or current_pictures()
    try:
        with warnings.catch_warnings():
            # Pillow warns on odd metadata and on large pictures below its hard limit; neither is the user's business.
            warnings.simplefilter("ignore")
            with _opened(path) as raw:
                return _rgb(raw, upright=config.images == "upright")
    except FileNotFoundError:
        raise DataError(
            f"Image {missing(path)} Run `holdfast doctor` on the stream to list all that is missing."
        ) from None
    except NotAFileError as error:
        raise DataError(f"Image {path} cannot be opened: {error.strerror}. Name the file of a picture.") from None
    except _TooLargeError as error:
        raise DataError(f"{path} ({_size(path)}) {error}. Shrink it; no model looks at so many.") from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image that can be read ({_size(path)}). Fetch it again.") from None
    except _NoWhiteError as error:
        raise DataError(f"{path}: {error}. Convert it to an 8-bit or 16-bit picture.") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} ({_size(path)}): {error} At most {MAX_PIXELS} are opened. Shrink it.") from None
    except _DECODING as error:
        raise DataError(f"{path} cannot be decoded ({_size(path)}): {_said(error)}. Fetch it again.") from error


# What Pillow's decoders raise for damaged files.
_DECODING = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, struct.error)


class _TooLargeError(Exception):
    """More pixels than are decoded."""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An ordinary file as a picture whose pixels are not read yet, and are few enough to be.

    Raises: OSError, NotAFileError, UnidentifiedImageError, DecompressionBombError, what decoders raise; _TooLargeError.
    """
    with os.fdopen(open_regular(path), "rb") as file, Image.open(file, formats=_formats()) as image:
        pixels = image.width * image.height
        most = MAX_DEEP_PIXELS if image.mode.startswith(_DEEP) or _has_transparency(image) else MAX_PIXELS
        if pixels > most:
            raise _TooLargeError(
                f"has {image.width} x {image.height} = {pixels} pixels ({image.mode}); at most {most} are decoded"
            )
        yield image


def _formats() -> tuple[str, ...]:
    Image.init()  # once; a plug-in for another format may be registered later
    return tuple(name for name in Image.ID if name not in _NOT_OPENED)


def thumbnail_uri(path: Path | str, side: int) -> str:
    """A small PNG of a picture as a data URI, or "" where it cannot be opened: a page is no place to fail for that."""
    try:
        small = open_image(Path(path))
    except DataError:
        return ""
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def shrunk(image: Image.Image, max_pixels: int) -> Image.Image:
    """`image` with at most `max_pixels` pixels, its shape kept as far as whole pixels allow."""
    width, height = image.size
    if width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    # A side of one pixel cannot shrink further; the other one then does.
    width, height = min(width, max(1, max_pixels // height)), min(height, max(1, max_pixels // width))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def opening_differs(path: Path) -> tuple[str, ...]:
    """What "upright" and "published" make of a picture's header: () for alike, else "turned" and/or "transparent".

    The file was opened before: what is wrong with it is told there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _opened(path) as image:
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9)
            return ("turned",) * turned + ("transparent",) * _has_transparency(image)


class _NoWhiteError(Exception):
    """Numbers of a picture that no rule maps to 8 bits."""


def _rgb(raw: Image.Image, *, upright: bool) -> Image.Image:
    raw.load()
    # Only where there is something to turn: it makes a copy otherwise, of a picture that may be large.
    turned = upright and raw.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9)
    image = ImageOps.exif_transpose(raw) if turned else raw
    if image.mode.startswith(_DEEP):
        return _from_deep(image, raw, upright=upright)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:  # only where it works in place
            raise ValueError("the LAB picture cannot be converted")
        return converted
    if image.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if upright and _has_transparency(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _has_transparency(image: Image.Image) -> bool:
    return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info


def _from_deep(image: Image.Image, raw: Image.Image, *, upright: bool) -> Image.Image:
    """A grey picture of 16-bit, 32-bit integer or floating numbers as 8-bit RGB.

    16-bit numbers are scaled by 255 / 65535, whatever they reach: the format says what white is. 32-bit formats do not
    say it; the smallest of the usual whites (255, 65535, 2^31 - 1; for floating numbers 1, 255, 65535) that holds the
    brightest pixel is taken. Pillow's own conversion clips at 255, which turns nearly all of such a picture white.
    """
    values = np.asarray(image)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    inverted = False
    if image.mode.startswith("I;16"):
        white = 65535.0
        # "White is zero", which Pillow heeds in 8-bit pictures alone.
        inverted = raw.format == "TIFF" and getattr(raw, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0
    elif image.mode == "I" and raw.format in ("PNG", "PPM"):
        white = 65535.0  # what these readers scale to
    else:
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0, 2.0**31 - 1)
        fitting = [white for white in whites if high <= white]
        # NaN is handed on by both extremes.
        if not (math.isfinite(low) and math.isfinite(high)) or low < 0 or not fitting:
            raise _NoWhiteError(
                f"its pixels are {'floating' if image.mode == 'F' else '32-bit'} numbers from {low:g} to {high:g}; "
                f"expected numbers from 0 to {', '.join(f'{white:g}' for white in whites[:-1])} or {whites[-1]:g}"
            )
        white = fitting[0]
    eight = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):  # in float64, eight times the picture, so not all at once
        rows = values[start : start + _ROWS].astype(np.float64)
        eight[start : start + _ROWS] = np.rint((white - rows if inverted else rows) * (255.0 / white)).clip(0, 255)
    grey = Image.fromarray(eight).convert("RGB")
    transparent = image.info.get("transparency")
    if upright and isinstance(transparent, int):
        grey.paste((255, 255, 255), mask=Image.fromarray(((values == transparent) * 255).astype(np.uint8)))
    return grey


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the file's header, without decoding the picture. Raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(path) as image:
                return image.size
    except FileNotFoundError:
        raise DataError(f"Image {missing(path)}") from None
    except _TooLargeError as error:
        raise DataError(f"{path} ({_size(path)}) {error}. Shrink it; no model looks at so many.") from None
    except (*_DECODING, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not an image that can be read ({_size(path)}): {_said(error)}.") from error


def choose_image_root(root: Path, folders: Sequence[str], relative: str | None) -> Path:
    """The first of `folders` (relative to `root`) under which `relative` exists, else the first of them.

    Forks of one benchmark disagree on where image paths start; nothing is guessed when the image is found nowhere.
    """
    candidates = [inside(root, folder, what="image folder") for folder in folders or (".",)]
    if relative is not None:
        for candidate in candidates:
            if inside(root, relative, start=candidate, what="image").exists():
                return candidate
    return candidates[0]


class ImageFinder:
    """Path of an image from its name as an item writes it; each name is looked at once.

    folders: absolute, each name below the first that holds it (and below the first of all where none does). Pictures
    that are written out in the text (data URIs, Base64) are put on disk. Raises DataError: a URL, a path that leaves
    `root`, or what no path can be.
    """

    def __init__(self, root: Path, folders: Sequence[Path], index: ImageIndex | None = None) -> None:
        self.root, self.folders, self._index = root, list(folders), index
        self._found: dict[str, Path] = {}
        # Where an ordinary path of a single folder starts from: no more is asked of it (see `inside`).
        self._start = plain_start(root, self.folders[0]) if index is None and len(self.folders) == 1 else None

    @classmethod
    def choose(cls, root: Path, folders: Sequence[str], probed: Sequence[str], *, search: bool) -> ImageFinder:
        """With the folder first that holds most of `probed`: forks of one benchmark disagree on where paths start."""
        candidates = [inside(root, folder, what="image folder") for folder in folders or (".",)]
        if len(candidates) > 1:
            held = [sum((folder / name).is_file() for name in probed if len(name) < 1024) for folder in candidates]
            order = sorted(range(len(candidates)), key=lambda i: -held[i])
            candidates = [candidates[i] for i in order]
        return cls(root, candidates, ImageIndex(root, candidates[0]) if search else None)

    def __call__(self, written: str) -> Path:
        path = self._found.get(written)
        if path is None:
            if self._start is not None and len(written) < 64 and is_plain_path(written):
                path = self._start / written
            else:
                path = self._path(written)
            if not is_embedded(written):  # a picture's text is as large as the picture
                self._found[written] = path
        return path

    def _path(self, written: str) -> Path:
        if is_embedded(written):
            return embedded_text(written, what="image")
        if written.startswith(("http://", "https://", "s3://", "gs://")):
            raise DataError(f"image {written!r:.100} is a URL; fetch it, and name the file below {self.root}")
        if len(written) > 63 and any(len(os.fsencode(part)) > 255 for part in written.replace("\\", "/").split("/")):
            raise DataError(f"image {written!r:.60} is longer than a file name can be; expected a path")
        place = inside(self.root, written, start=self.folders[0], what="image")
        if len(self.folders) > 1 and not place.exists():
            others = (inside(self.root, written, start=folder, what="image") for folder in self.folders[1:])
            found = next((other for other in others if other.exists()), None)
            if found is not None:
                return found
        return self._index.find(written) if self._index is not None else place


class ImageIndex:
    """Finds images by base name anywhere below a folder, for releases whose paths no longer match their archives.

    The folder is walked once, on the first question. Two files of one name are refused, never chosen between.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self._paths: dict[str, list[Path]] | None = None

    def find(self, relative: str) -> Path:
        """The image at `relative` below the folder, else the only one of that base name; else the path as written."""
        direct = inside(self.root, relative, start=self.folder, what="image")
        if direct.exists():
            return direct
        if self._paths is None:
            self._paths = {}
            for parent, _, names in os.walk(self.folder, followlinks=True):
                for name in names:
                    self._paths.setdefault(name, []).append(Path(parent) / name)
        found = self._paths.get(PurePosixPath(relative.replace("\\", "/")).name, [])
        if len(found) > 1:
            raise DataError(
                f"image {relative!r} is not at its place, and {len(found)} files of that name are below {self.folder}: "
                f"{found[0]}, {found[1]}. Restore the published layout."
            )
        return found[0] if found else direct


def _said(error: BaseException) -> str:
    found = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return one_line(found).rstrip(".")


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError:
        return "size unknown"
