"""Images come out RGB and upright, or as an error that names the file."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from holdfast.data.images import (
    PictureConfig,
    image_size,
    open_image,
    opening_differs,
    pictures,
    shrunk,
    thumbnail_uri,
)
from holdfast.errors import DataError


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.new(mode, (5, 3)).save(path)
    image = open_image(path)
    assert image.mode == "RGB" and image.size == (5, 3) == image_size(path)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (6, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (2, 6)


def test_a_missing_image_names_the_look_alike(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "photo_01.png")
    with pytest.raises(DataError, match=r"photo_01\.jpg does not exist; did you mean 'photo_01\.png'"):
        open_image(tmp_path / "photo_01.jpg")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_an_unreadable_image_is_named_with_its_size(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.png .*{len(content)} bytes"):
        open_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png .*bytes"):
        image_size(tmp_path / "a.png")


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:600])
    with pytest.raises(DataError, match=r"a\.png cannot be decoded \(600 bytes\)"):
        open_image(tmp_path / "a.png")


def ramp() -> np.ndarray:
    """8-bit grey scene: what every deeper copy of it must come out as."""
    return (np.arange(32 * 16).reshape(16, 32) * 255 / 511).round().astype(np.uint8)


DEEP = {
    "16-bit PNG": ("a.png", lambda x: x.astype(np.uint16) * 257, {}),
    "16-bit TIFF": ("a.tif", lambda x: x.astype(np.uint16) * 257, {}),
    "16-bit big-endian TIFF": ("a.tif", lambda x: (x.astype(np.uint16) * 257).astype(">u2"), {}),
    "16-bit TIFF, white is zero": ("a.tif", lambda x: 65535 - x.astype(np.uint16) * 257, {"tiffinfo": {262: 0}}),
    "16-bit PGM": ("a.pgm", lambda x: x.astype(np.int32) * 257, {}),
    "32-bit TIFF, to 255": ("a.tif", lambda x: x.astype(np.int32), {}),
    "32-bit TIFF, to 65535": ("a.tif", lambda x: x.astype(np.int32) * 257, {}),
    "32-bit TIFF, to 2^31": ("a.tif", lambda x: (x * ((2.0**31 - 1) / 255)).astype(np.int32), {}),
    "float TIFF, to 1": ("a.tif", lambda x: x.astype(np.float32) / 255, {}),
    "float TIFF, to 255": ("a.tif", lambda x: x.astype(np.float32), {}),
    "float TIFF, to 65535": ("a.tif", lambda x: x.astype(np.float32) * 257, {}),
}


@pytest.mark.parametrize("mode", ["upright", "published"])
@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_pictures_keep_their_scene(tmp_path: Path, kind: str, mode) -> None:
    name, deepen, how = DEEP[kind]
    Image.fromarray(deepen(ramp())).save(tmp_path / name, **how)
    with Image.open(tmp_path / name) as raw:
        assert raw.mode[0] in "IF"
    found = np.asarray(open_image(tmp_path / name, PictureConfig(images=mode))).astype(int)
    assert np.abs(found - ramp()[..., None]).max() <= 1
    assert abs(found.mean() - 127.5) < 1


@pytest.mark.parametrize("mode", ["LA", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "1"])
def test_other_modes_keep_their_scene(tmp_path: Path, mode: str) -> None:
    scene = Image.fromarray(np.stack([ramp(), ramp()[::-1], ramp()[:, ::-1]], axis=-1))
    expected = scene.convert("L").convert("RGB") if mode in ("LA", "1") else scene
    if mode == "1":
        expected = scene.convert("L").point(lambda v: 255 * (v > 127)).convert("RGB")
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        stored = ImageCms.profileToProfile(scene, *profiles, outputMode="LAB")
    elif mode == "P":
        stored, expected = scene.quantize(16), scene.quantize(16).convert("RGB")
    elif mode in ("LA", "1"):
        stored = expected.convert(mode)
    else:
        stored = scene.convert(mode)
    path = tmp_path / ("a.png" if mode in ("LA", "P", "RGB", "1") else "a.tif")
    if mode == "HSV":
        path = tmp_path / "a.tif"
        stored = scene.convert("RGB")  # no format keeps it
    stored.save(path)
    off = np.abs(np.asarray(open_image(path)).astype(int) - np.asarray(expected).astype(int))
    assert off.mean() < 2


@pytest.mark.parametrize("values", [[-1.0, 0.5], [float("nan"), 0.5], [0.0, 1e6], [float("inf"), 0.0]])
def test_numbers_without_an_agreed_white_are_refused(tmp_path: Path, values: list[float]) -> None:
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(
        DataError, match=r"a\.tif: its pixels are floating numbers from .* expected numbers from 0 to 1"
    ):
        open_image(tmp_path / "a.tif")


def test_published_pictures_are_those_of_a_plain_conversion(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    scene = Image.fromarray(np.stack([ramp()] * 3, axis=-1))
    scene.save(tmp_path / "turned.png", exif=exif)
    clear = scene.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    marked = scene.quantize(8)
    marked.save(tmp_path / "palette.png", transparency=0)
    scene.save(tmp_path / "plain.png")
    scene.convert("L").save(tmp_path / "grey.png", transparency=0)
    differs = {"turned": ("turned",), "clear": ("transparent",), "palette": ("transparent",), "plain": ()}
    for name, kinds in {**differs, "grey": ("transparent",)}.items():
        path = tmp_path / f"{name}.png"
        with Image.open(path) as raw:
            published = raw.convert("RGB")
        assert opening_differs(path) == kinds
        with pictures(PictureConfig(images="published")):
            assert open_image(path).tobytes() == published.tobytes()
        assert (open_image(path).tobytes() == published.tobytes()) == (not kinds)


def test_a_transparent_value_of_a_16_bit_picture_is_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 300], [65535, 301]], dtype=np.uint16)).save(tmp_path / "a.png", transparency=300)
    assert np.asarray(open_image(tmp_path / "a.png"))[..., 0].tolist() == [[0, 255], [255, 1]]


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (640, 480), (3, 3), (20000, 20)])
@pytest.mark.parametrize("bound", [1, 7, 1000, 50_000])
def test_a_pixel_budget_is_kept(size: tuple[int, int], bound: int) -> None:
    made = shrunk(Image.new("RGB", size), bound)
    assert 1 <= made.width * made.height <= bound or made.size == size
    assert made.width * made.height <= max(bound, 1)


def png_of(path: Path, width: int, height: int, *, depth: int = 8, colour: int = 0, rows: int | None = None) -> None:
    """A PNG of one colour in every pixel, some kB for any size, written without making the picture."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    line = b"\0" + b"\x80" * (width * channels * depth // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(line) for _ in range(rows or height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def peak_of(code: str) -> int:
    """Bytes that a process of its own has at its peak beyond what its imports take."""
    import subprocess
    import sys

    text = (
        "import resource; from pathlib import Path; from holdfast.data import images\n"
        "from PIL import Image\nImage.init()\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"before = peak()\n{code}\nprint(peak() - before)"
    )
    return int(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("shape", [(13000, 13000), (20000, 20000), (8193, 8192), (2**26 + 1, 1)])
def test_more_pixels_than_the_bound_are_refused_by_name_size_and_bound(tmp_path: Path, shape: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    png_of(path, *shape, rows=1)
    for opened in (open_image, image_size):
        with pytest.raises(DataError, match=r"bomb\.png.*\d+ bytes.*(67108864|exceeds limit)"):
            opened(path)
    assert thumbnail_uri(path, 64) == ""


@pytest.mark.parametrize("depth, colour, shape", [(8, 2, (6000, 6000)), (16, 0, (5000, 5000)), (8, 6, (5000, 5000))])
def test_a_small_file_takes_memory_within_the_bound(
    tmp_path: Path, depth: int, colour: int, shape: tuple[int, int]
) -> None:
    png_of(tmp_path / "a.png", *shape, depth=depth, colour=colour)
    assert (tmp_path / "a.png").stat().st_size < 1_000_000
    pixels = shape[0] * shape[1]
    # Of the largest that are decoded: 2^26 pixels plain, half as many of the others.
    most = 550e6 * pixels / (2**26 if colour == 2 else 2**25)
    assert peak_of(f"images.open_image(Path({str(tmp_path / 'a.png')!r}))") < most


@pytest.mark.timeout(30)
def test_what_is_no_file_or_no_picture_is_refused_without_waiting(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    for name, said in (("pipe.png", "named pipe"), ("folder.png", "a folder"), ("a.eps", "not an image")):
        with pytest.raises(DataError, match=f"{name}.*{said}"):
            open_image(tmp_path / name)
        assert thumbnail_uri(tmp_path / name, 64) == ""
    with pytest.raises(DataError, match="a device"):
        open_image(Path("/dev/zero"))


def test_every_cut_of_a_picture_is_opened_or_named(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ico", "tga", "pcx", "ppm"):
        path = tmp_path / f"a.{suffix}"
        Image.effect_noise((24, 24), 50).convert("RGB").save(path)
        whole = path.read_bytes()
        for cut in range(0, len(whole), max(1, len(whole) // 17)):
            changed = bytearray(whole)
            changed[cut : cut + 3] = b"\xff\x00\x7f"[: len(whole) - cut]
            for content in (whole[:cut], changed):
                path.write_bytes(content)
                with contextlib.suppress(DataError):
                    assert open_image(path).mode == "RGB"
