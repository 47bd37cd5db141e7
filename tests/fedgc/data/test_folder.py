"""Every kind of file and entry that a folder of faces can hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fedgc.data import folder as folder_module
from fedgc.data.faces import LONE, FaceSet, load_faces
from fedgc.data.folder import (
    BARREN,
    DAMAGED,
    EMPTY,
    FLOATING,
    FOREIGN,
    LOOSE,
    NESTED,
    OUTSIDE,
    REPEATED,
    SPECIAL,
    TOO_LARGE,
    TOO_SMALL,
    UNREADABLE,
    UnusableImageError,
    decode,
)
from tests.pictures import encoded, picture


def person(root: Path, name: str, count: int = 2) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for number in range(count):
        picture(hash_of(name) + number).save(folder / f"{number}.png")
    return folder


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "big") % 2**32


def load(root: Path, **options: object) -> FaceSet:
    return load_faces(str(root), **{"image_size": 16, "align": "none", "seed": 0, **options})  # type: ignore[arg-type]


def reasons(faces: FaceSet) -> dict[str, str]:
    return {entry.path: entry.reason for entry in faces.skipped}


def bad_text() -> bytes:
    return b"notes about the pictures, not a picture"


def corrupt_png() -> bytes:
    data = bytearray(encoded(picture(1), "PNG"))
    data[data.index(b"IDAT") + 10] ^= 0xFF
    return bytes(data)


def text_bomb() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 80_000_000, zip=True)
    return encoded(picture(1), "PNG", pnginfo=text)


def giant_png() -> bytes:
    return encoded(Image.new("1", (6_000, 5_000)), "PNG")


BAD = {
    "empty.jpg": (lambda: b"", EMPTY),
    "notes.txt": (bad_text, FOREIGN),
    "wrong.jpg": (bad_text, FOREIGN),
    "cut.jpg": (lambda: encoded(picture(1, (200, 200)), "JPEG")[:-600], DAMAGED),
    "header.jpg": (lambda: encoded(picture(1), "JPEG")[:30], DAMAGED),
    "cut.png": (lambda: encoded(picture(1, (200, 200)), "PNG")[:-600], DAMAGED),
    "cut.pgm": (lambda: encoded(picture(1).convert("L"), "PPM")[:-9], DAMAGED),
    "crc.png": (corrupt_png, DAMAGED),
    "giant.png": (giant_png, TOO_LARGE),
    "dot.png": (lambda: encoded(picture(1, (1, 1)), "PNG"), TOO_SMALL),
    "line.png": (lambda: encoded(picture(1, (500, 3)), "PNG"), TOO_SMALL),
    "float.pfm": (lambda: encoded(picture(1).convert("F"), "PPM"), FLOATING),
    "other.gif": (lambda: encoded(picture(1), "GIF"), FOREIGN),
    "other.eps": (lambda: encoded(picture(1), "EPS"), FOREIGN),
    "other.tif": (lambda: encoded(picture(1), "TIFF"), FOREIGN),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_the_others_load(tmp_path: Path, name: str) -> None:
    make, reason = BAD[name]
    (person(tmp_path, "abe", 3) / name).write_bytes(make())
    faces = load(tmp_path)
    assert reasons(faces) == {f"abe/{name}": reason}
    assert len(faces) == 3


def test_a_text_chunk_bomb_is_not_unpacked(tmp_path: Path) -> None:
    (person(tmp_path, "abe", 3) / "bomb.png").write_bytes(text_bomb())
    faces = load(tmp_path)
    assert list(reasons(faces)) == ["abe/bomb.png"]
    assert len(faces) == 3


def test_entries_that_are_no_photos_of_a_person_are_named(tmp_path: Path) -> None:
    abe = person(tmp_path, "abe", 3)
    (abe / "older").mkdir()
    picture(9).save(abe / "older" / "0.png")
    (abe / ".hidden.png").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README").write_text("hello")
    (tmp_path / "nobody").mkdir()
    person(tmp_path, "one", 1)
    assert reasons(load(tmp_path)) == {
        "README": LOOSE,
        "abe/older": NESTED,
        "nobody": BARREN,
        "one/0.png": LONE,
    }


def test_links_are_followed_only_inside_the_folder_and_once(tmp_path: Path) -> None:
    root = tmp_path / "faces"
    abe, zoe = person(root, "abe"), person(root, "zoe")
    person(tmp_path, "stranger")
    picture(5).save(root / ".store.png")
    (root / "outside").symlink_to(tmp_path / "stranger")
    (root / "aaron").symlink_to(zoe)
    (root / "self").symlink_to(root)
    (abe / "outside.png").symlink_to(tmp_path / "stranger" / "0.png")
    (abe / "again.png").symlink_to(abe / "1.png")
    (abe / "hers.png").symlink_to(zoe / "1.png")
    (abe / "nowhere.png").symlink_to(root / "missing.png")
    (abe / "loop.png").symlink_to(abe / "loop.png")
    (abe / "stored.png").symlink_to(root / ".store.png")
    faces = load(root)
    assert faces.files == ("abe/0.png", "abe/1.png", "abe/stored.png", "zoe/0.png", "zoe/1.png")
    assert reasons(faces) == {
        "outside": OUTSIDE,
        "aaron": REPEATED,
        "self": REPEATED,
        "abe/outside.png": OUTSIDE,
        "abe/again.png": REPEATED,
        "abe/hers.png": REPEATED,
        "abe/nowhere.png": OUTSIDE,
        "abe/loop.png": OUTSIDE,
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(person(tmp_path, "abe") / "pipe.png")
    assert reasons(load(tmp_path)) == {"abe/pipe.png": SPECIAL}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    abe = person(tmp_path, "abe", 3)
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path == abe / "1.png":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert reasons(load(tmp_path)) == {"abe/1.png": UNREADABLE}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_permissions_are_respected(tmp_path: Path) -> None:
    person(tmp_path, "abe", 3)
    (tmp_path / "abe" / "1.png").chmod(0)
    locked = person(tmp_path, "bea")
    locked.chmod(0)
    try:
        assert reasons(load(tmp_path)) == {"abe/1.png": UNREADABLE, "bea": BARREN}
    finally:
        locked.chmod(0o700)


def test_a_file_too_large_for_any_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (person(tmp_path, "abe", 2) / "huge.png").write_bytes(b"x" * 5000)
    monkeypatch.setattr(folder_module, "MAX_BYTES", 4999)
    assert reasons(load(tmp_path)) == {"abe/huge.png": TOO_LARGE}


def test_a_name_with_control_characters_is_shown_escaped(tmp_path: Path) -> None:
    (person(tmp_path, "abe") / "a\x1b[31m.png").write_bytes(b"")
    assert list(reasons(load(tmp_path))) == ["abe/a\\x1b[31m.png"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PPM", "BMP", "WEBP"])
def test_accepted_formats_keep_their_colours(kind: str) -> None:
    image = picture(3)
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    decoded = np.asarray(decode(encoded(image, kind, **options)), dtype=float)
    assert np.abs(decoded - np.asarray(image)).mean() < 4


def grey(mode: str, value: int) -> Image.Image:
    return Image.new(mode, (12, 12), value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(grey("L", 77), "PNG"), (77, 77, 77)),
        (encoded(grey("1", 1), "PNG"), (255, 255, 255)),
        (encoded(grey("I;16", 0x8080), "PNG"), (128, 128, 128)),
        (b"P5 12 12 65535 " + b"\x80\x80" * 144, (128, 128, 128)),
        (b"P5 12 12 1000 " + (500).to_bytes(2, "big") * 144, (128, 128, 128)),
        (encoded(Image.new("LA", (12, 12), (50, 255)), "PNG"), (50, 50, 50)),
        (encoded(Image.new("RGBA", (12, 12), (200, 0, 0, 0)), "PNG"), (255, 255, 255)),
        (encoded(Image.new("RGBA", (12, 12), (200, 0, 100, 255)), "PNG"), (200, 0, 100)),
        (encoded(Image.new("CMYK", (12, 12), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
        (encoded(grey("P", 0), "PNG", transparency=0), (255, 255, 255)),
        (encoded(grey("P", 0), "PNG", transparency=1), (0, 0, 0)),
    ],
    ids=[
        "L",
        "1",
        "I;16",
        "pgm16",
        "pgm1000",
        "LA",
        "transparent",
        "opaque",
        "CMYK",
        "P-transparent",
        "P-opaque",
    ],
)
def test_every_mode_becomes_rgb(data: bytes, expected: tuple[int, int, int]) -> None:
    image = decode(data)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, dtype=int) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_orientation_is_applied(kind: str) -> None:
    upright = picture(4, (48, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 270 degrees to see it upright
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    decoded = decode(encoded(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})))
    assert decoded.size == upright.size
    assert np.abs(np.asarray(decoded, dtype=float) - np.asarray(upright)).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    red, _, blue = np.asarray(decode(data)).reshape(-1, 3).mean(0)
    assert red > 240
    assert blue < 15


@pytest.mark.parametrize("shorter_side", [None, 8])
def test_truncation_is_found_at_any_decoding_size(shorter_side: int | None) -> None:
    data = encoded(picture(6, (1600, 1200)), "JPEG", quality=95)
    with pytest.raises(UnusableImageError, match=DAMAGED):
        decode(data[: len(data) * 3 // 4], shorter_side=shorter_side)
