"""Images that are none, that are traps, or that are unusual (S3): one beside a folder of good people."""

from __future__ import annotations

import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from unittest import SkipTest

import numpy as np
from PIL import Image, PngImagePlugin

from fedgc.data.faces import load_faces
from fedgc.data.folder import DAMAGED, EMPTY, FOREIGN, TOO_LARGE, TOO_SMALL, UNREADABLE
from tests.pictures import encoded, picture
from tests.trust.cases import Case
from tests.trust.folders import GOOD, inspected, people
from tests.trust.pickles import CANARY, Code

SIDE = 16
TOLERANCE = 4  # of 255: what JPEG and rounding change
Colour = tuple[int, int, int]


def _left_out(name: str, data: bytes | Callable[[], bytes], reason: str, folder: Path) -> str | None:
    """The file is left out for its reason, and every good one loads."""
    root = people(folder / "faces")
    (root / "ada" / name).write_bytes(data if isinstance(data, bytes) else data())
    if complaint := inspected(root, GOOD, {f"ada/{name}": reason}):
        return complaint
    faces = _loaded(root)
    left = {entry.path: entry.reason for entry in faces.skipped}
    return None if len(faces) == GOOD and left == {f"ada/{name}": reason} else f"loaded {len(faces)}, left out {left}"


def _normalised(name: str, make: Callable[[], bytes], left: Colour, right: Colour, folder: Path) -> str | None:
    """The file loads, with these colours in its left and its right half."""
    root = people(folder / "faces")
    (root / "ada" / name).write_bytes(make())
    if complaint := inspected(root, GOOD + 1, {}):
        return complaint
    faces = _loaded(root)
    image = faces.images[faces.files.index(f"ada/{name}")].permute(1, 2, 0).numpy().astype(float)
    half = SIDE // 2 - 2  # the halves run into one another where they meet
    seen = image[:, :half].mean((0, 1)), image[:, -half:].mean((0, 1))
    near = [np.abs(part - colour).max() <= TOLERANCE for part, colour in zip(seen, (left, right), strict=True)]
    return None if all(near) else f"its halves are {[part.round().tolist() for part in seen]}, not {left} and {right}"


def _loaded(root: Path):  # type: ignore[no-untyped-def]
    return load_faces(str(root), image_size=SIDE, align="none", seed=0)


def _halves(mode: str, left: object, right: object, size: tuple[int, int] = (32, 32)) -> Image.Image:
    image = Image.new(mode, size, left)  # type: ignore[arg-type]
    image.paste(right, (size[0] // 2, 0, *size))  # type: ignore[arg-type]
    return image


# -- traps


def _huge_png() -> bytes:
    """30,000 x 30,000 pixels in a few hundred bytes: the header promises what the body would unpack to."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        map(_chunk, (b"IHDR", b"IDAT", b"IEND"), (header, zlib.compress(bytes(10_000)), b""))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _wrong_checksum() -> bytes:
    data = bytearray(encoded(picture(1), "PNG"))
    data[data.index(b"IEND") - 5] ^= 0xFF  # the last byte of the checksum of the pixels
    return bytes(data)


def _text_bomb() -> bytes:
    """80 MB of text in 80 kB."""
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 80_000_000, zip=True)
    return encoded(picture(1), "PNG", pnginfo=text)


def _zip() -> bytes:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("ada/4.png", encoded(picture(1), "PNG"))
    return stream.getvalue()


def _pickle(folder: Path) -> str | None:
    canary = folder / CANARY
    complaint = _left_out("x.jpg", pickle.dumps(Code(canary)), FOREIGN, folder)
    return "the code in the file has run" if canary.exists() else complaint


def _forbidden(folder: Path) -> str | None:
    """Read by a process without the power of root, which permissions do not stop."""
    if not sys.platform.startswith("linux"):
        raise SkipTest("dropping the power of root is written for Linux alone")
    root = people(folder / "faces")
    (root / "ada" / "x.png").write_bytes(encoded(picture(1), "PNG"))
    (root / "ada" / "x.png").chmod(0)
    return inspected(root, GOOD, {"ada/x.png": UNREADABLE}, powerless=True)


# -- unusual


def _turned(size: tuple[int, int] = (32, 48)) -> bytes:
    """Its camera was held on its side; upright, its left half is black."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = _halves("RGB", (0, 0, 0), (255, 255, 255), size)
    return encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def _palette() -> bytes:
    image = _halves("P", 0, 1)
    image.putpalette([200, 0, 100, 0, 0, 0])
    return encoded(image, "PNG", transparency=bytes([255, 0]))


def _animated() -> bytes:
    frames = [_halves("RGB", (255, 0, 0), (0, 0, 0)), Image.new("RGB", (32, 32), "blue")]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=100)


def _card(text: str) -> bytes:
    return text.ljust(80).encode()


FITS = b"".join(map(_card, ("SIMPLE  =  T", "BITPIX  =  8", "NAXIS   =  2", "NAXIS1  =  32", "NAXIS2  =  32", "END")))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(x) (w) file closefile showpage\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"><rect width="32" height="32"/></svg>\n'
HTML = b"<!DOCTYPE html><html><body>404: there is no such photo</body></html>\n"
WHITE, BLACK, GREY, RED, ROSE = (255,) * 3, (0,) * 3, (128,) * 3, (255, 0, 0), (200, 0, 100)


def _out(title: str, name: str, data: bytes | Callable[[], bytes], reason: str = FOREIGN) -> Case:
    return Case(title, partial(_left_out, name, data, reason))


def _fine(title: str, name: str, make: Callable[[], bytes], left: Colour, right: Colour) -> Case:
    return Case(title, partial(_normalised, name, make, left, right))


IMAGES = (
    _out("no bytes", "x.jpg", b"", EMPTY),
    _out("JPEG cut off", "x.jpg", lambda: encoded(picture(1, (300, 200)), "JPEG")[:-600], DAMAGED),
    _out("PNG cut off", "x.png", lambda: encoded(picture(1, (300, 200)), "PNG")[:-600], DAMAGED),
    _out("PNG with a wrong checksum", "x.png", _wrong_checksum, DAMAGED),
    _out("PNG of 900 megapixels", "x.png", _huge_png, TOO_LARGE),
    _out("one pixel", "x.png", lambda: encoded(picture(1, (1, 1)), "PNG"), TOO_SMALL),
    _out("text named JPEG", "x.jpg", b"notes about the pictures, not a picture\n"),
    _out("GIF", "x.gif", lambda: encoded(picture(1), "GIF")),
    _out("TIFF", "x.tif", lambda: encoded(picture(1), "TIFF")),
    _out("TIFF of floating point", "x.tif", lambda: encoded(picture(1).convert("F"), "TIFF")),
    _out("FITS", "x.fits", FITS.ljust(2880) + bytes(2880)),
    _out("EPS", "x.eps", EPS),
    _out("SVG", "x.svg", SVG),
    _out("HTML named PNG", "x.png", HTML),
    _out("zip named PNG", "x.png", _zip),
    _out("PNG with a text bomb", "x.png", _text_bomb, DAMAGED),
    Case("pickle named JPEG", _pickle),
    Case("no permission", _forbidden),
    _fine(
        "CMYK",
        "x.jpg",
        lambda: encoded(_halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "JPEG", quality=100),
        RED,
        WHITE,
    ),
    _fine("16-bit grey", "x.png", lambda: encoded(_halves("I;16", 0x8080, 0xFFFF), "PNG"), GREY, WHITE),
    _fine("palette with transparency", "x.png", _palette, ROSE, WHITE),
    _fine("grey with transparency", "x.png", lambda: encoded(_halves("LA", (128, 255), (0, 0)), "PNG"), GREY, WHITE),
    _fine("one bit", "x.png", lambda: encoded(_halves("1", 0, 1), "PNG"), BLACK, WHITE),
    _fine("turned by EXIF", "x.jpg", _turned, BLACK, WHITE),
    _fine("animated", "x.png", _animated, RED, BLACK),
)
