"""Images: opened late, always RGB, always inside the data root, with an error that names the file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps, UnidentifiedImageError

from holdfast.data.source_files import inside, missing
from holdfast.errors import DataError

# Above this Pillow itself refuses (a decompression bomb); documents of real benchmarks stay far below.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)


def open_image(path: Path) -> Image.Image:
    """The image in `path` as a loaded 8-bit RGB picture, upright (EXIF orientation applied).

    Transparency is laid over white, because a plain conversion turns transparent pixels of charts black.
    Raises DataError: missing, not an image, truncated, or so large that decoding it is unsafe.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns on odd metadata and on large pictures below its hard limit; neither is the user's business.
            warnings.simplefilter("ignore")
            with Image.open(path) as raw:
                image = ImageOps.exif_transpose(raw)
                if "A" in image.getbands() or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(
            f"Image {missing(path)} Run `holdfast doctor` on the stream to list all that is missing."
        ) from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image that can be read ({_size(path)}). Fetch it again.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded ({_size(path)}): {error}. Fetch it again.") from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the file's header, without decoding the picture. Raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return image.size
    except FileNotFoundError:
        raise DataError(f"Image {missing(path)}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not an image that can be read ({_size(path)}): {error}.") from error


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


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError:
        return "size unknown"
