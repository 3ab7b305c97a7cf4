"""The decoding rule of fastadv.images, file by file, and its limits of memory and patience."""

from __future__ import annotations

import contextlib
import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import resize

from fastadv import images
from fastadv.errors import DataError
from fastadv.images import Store, available_memory, decode, read_blocks, read_files, to_square

RED = (255, 0, 0)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def pngs(folder: Path, num: int, bad: tuple[int, ...] = ()) -> list[str]:
    paths = [folder / f"{i:04d}.png" for i in range(num)]
    for i, path in enumerate(paths):
        Image.new("RGB", (2, 2), (i % 256, 0, 0)).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:40])
    return [str(path) for path in paths]


def palette(transparent: int | None) -> Image.Image:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([9, 9, 9, *RED])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


@pytest.mark.parametrize(
    ("image", "ending", "expected"),
    [
        (Image.new("RGB", (3, 2), (1, 2, 3)), "png", (1, 2, 3)),
        (Image.new("L", (3, 2), 100), "png", (100, 100, 100)),
        (Image.new("1", (3, 2), 1), "png", (255, 255, 255)),
        (Image.new("CMYK", (3, 2), (0, 255, 255, 0)), "tif", RED),
        (palette(None), "png", RED),
        (palette(1), "png", (255, 255, 255)),
        (palette(0), "png", RED),
        (Image.new("RGBA", (3, 2), (*RED, 255)), "png", RED),
        (Image.new("RGBA", (3, 2), (*RED, 0)), "png", (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (*RED, 128)), "png", (255, 127, 127)),
        (Image.new("LA", (3, 2), (0, 255)), "png", (0, 0, 0)),
        (Image.new("LA", (3, 2), (0, 0)), "png", (255, 255, 255)),
        (Image.fromarray(np.full((2, 3), 40000, np.uint16)), "png", (156, 156, 156)),
        (Image.fromarray(np.full((2, 3), 40000, np.uint16)), "tif", (156, 156, 156)),
        (Image.fromarray(np.full((2, 3), 65535, np.uint16)), "png", (255, 255, 255)),
        (Image.new("RGB", (3, 2), RED), "bmp", RED),
        (Image.new("RGB", (3, 2), RED), "ppm", RED),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value).replace(" ", ""),
)
def test_every_kind_of_pixel_becomes_rgb_by_the_rule(
    tmp_path: Path, image: Image.Image, ending: str, expected: tuple[int, int, int]
) -> None:
    path = tmp_path / f"image.{ending}"
    image.save(path, **({"transparency": image.info["transparency"]} if "transparency" in image.info else {}))
    pixels = decode(str(path), None)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 2, 3)
    assert (pixels == np.array(expected).reshape(3, 1, 1)).all()


def test_a_16_bit_pgm_is_scaled_and_32_bit_pixels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "grey.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([40000, 65535], ">u2").tobytes())
    assert decode(str(tmp_path / "grey.pgm"), None)[0].tolist() == [[156, 255]]
    for mode in ("I", "F"):
        Image.new(mode, (2, 2), 1).save(tmp_path / "deep.tif")
        with pytest.raises(DataError, match=r"deep\.tif.*32 bit"):
            decode(str(tmp_path / "deep.tif"), None)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    stored = noise(2, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    # EXIF 2.3, tag 0x0112: where the stored first row and first column belong.
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    assert np.array_equal(decode(str(tmp_path / "turned.png"), None), shown.transpose(2, 0, 1))


def test_a_16_bit_image_that_is_rotated_is_scaled_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[257, 65535]], np.uint16)).save(tmp_path / "turned.png", exif=exif)
    assert decode(str(tmp_path / "turned.png"), None)[0].tolist() == [[1], [255]]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 13), (13, 8), (8, 4000)])
def test_the_central_square_of_the_right_size_is_kept_exactly(height: int, width: int) -> None:
    pixels = noise(height, width)
    top, left = (height - 8) // 2, (width - 8) // 2
    assert np.array_equal(to_square(Image.fromarray(pixels), 8), pixels[top : top + 8, left : left + 8])


@pytest.mark.parametrize("size", [5, 16, 64])
def test_resizing_is_bilinear_with_antialiasing(size: int) -> None:
    pixels = noise(21, 30)
    found = np.asarray(to_square(Image.fromarray(pixels), size))
    square = pixels[:, 4:25]
    assert np.array_equal(found, np.asarray(resize(Image.fromarray(square), [size, size])))
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(square).permute(2, 0, 1)[None].double(), size=(size, size), mode="bilinear", antialias=True
    )
    assert np.abs(found.transpose(2, 0, 1) - exact[0].numpy()).max() <= 1.01


def test_one_pixel_and_a_thread_of_pixels_are_images(tmp_path: Path) -> None:
    for size in ((1, 1), (1, 50_000)):
        Image.new("RGB", size, (5, 6, 7)).save(tmp_path / "thin.png")
        assert (decode(str(tmp_path / "thin.png"), 16) == np.array([5, 6, 7]).reshape(3, 1, 1)).all()


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8100, 10_000, 20_000])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_size(side, side))
    with pytest.raises(DataError, match=r"bomb\.png.*(limit|bomb)"):
        read_files([str(path)], 64, Store(), skip=False)


def test_the_pixel_limit_is_inclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "image.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 20)
    assert decode(str(tmp_path / "image.png"), None).shape == (3, 4, 5)
    monkeypatch.setattr(images, "MAX_PIXELS", 19)
    with pytest.raises(DataError, match="more than the limit of 19"):
        decode(str(tmp_path / "image.png"), None)


def damaged(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(file, "PNG" if kind == "png" else "JPEG")
    half = file.getvalue()[: len(file.getvalue()) // 2]
    return {"png": half, "jpeg": half, "empty": b"", "html": b"<!DOCTYPE html><html>404</html>", "text": b"hello"}[kind]


@pytest.mark.parametrize("kind", ["png", "jpeg", "empty", "html", "text"])
def test_a_damaged_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(damaged(kind))
    with pytest.raises(DataError, match=r"broken\.jpg") as caught:
        decode(str(path), 64)
    assert "--on-bad-image skip" in caught.value.fix and caught.value.exit_code == 3


def test_a_missing_file_a_folder_and_a_foreign_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vector.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for path in (tmp_path / "absent.png", tmp_path, tmp_path / "vector.jpg"):
        with pytest.raises(DataError, match=path.name):
            decode(str(path), None)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "PPM"])
def test_random_damage_never_raises_anything_but_a_data_error(tmp_path: Path, kind: str) -> None:
    file = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(file, kind)
    whole, path, random = file.getvalue(), tmp_path / "image", np.random.RandomState(0)
    path.write_bytes(whole)
    assert decode(str(path), 16).shape == (3, 16, 16)
    for _ in range(100):
        wrong = bytearray(whole[: random.randint(1, len(whole) + 1)])
        for place in random.randint(0, min(len(wrong), 200), 3):
            wrong[place] = random.randint(256)
        path.write_bytes(wrong)
        with contextlib.suppress(DataError):
            assert decode(str(path), 16).shape == (3, 16, 16)


def test_files_come_back_in_order_over_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BLOCK", 7)
    found, kept, skipped = read_files(pngs(tmp_path, 20), None, Store(), skip=False)
    assert found.shape == (20, 3, 2, 2) and found[:, 0, 0, 0].tolist() == kept.tolist() == list(range(20))
    assert skipped == ()


def test_the_first_bad_file_is_named_or_all_are_skipped_and_listed(tmp_path: Path) -> None:
    paths = pngs(tmp_path, 12, bad=(3, 9))
    with pytest.raises(DataError, match=r"0003\.png"):
        read_files(paths, None, Store(), skip=False)
    found, kept, skipped = read_files(paths, None, Store(), skip=True)
    assert found[:, 0, 0, 0].tolist() == kept.tolist() == [i for i in range(12) if i not in (3, 9)]
    assert skipped == (paths[3], paths[9])


def test_more_than_one_percent_and_five_bad_files_are_too_many(tmp_path: Path) -> None:
    paths = pngs(tmp_path, 600, bad=(1, 2, 3, 4, 5, 6))
    assert len(read_files(paths, None, Store(), skip=True)[2]) == 6
    assert len(read_files(paths[:6], None, Store(), skip=True)[2]) == 5
    with pytest.raises(DataError, match=r"6 of 599 images.*0006\.png"):
        read_files(paths[:599], None, Store(), skip=True)
    with pytest.raises(DataError, match="none of 3 images"):
        read_files(paths[1:4], None, Store(), skip=True)


def test_images_of_different_size_ask_for_image_size(tmp_path: Path) -> None:
    paths = pngs(tmp_path, 3)
    Image.new("RGB", (3, 2)).save(paths[2])
    with pytest.raises(DataError, match=r"0000\.png is 2x2, .*0002\.png is 3x2") as caught:
        read_files(paths, None, Store(), skip=True)
    assert "--image-size" in caught.value.fix
    assert read_files(paths, 4, Store(), skip=False)[0].shape == (3, 3, 4, 4)


def test_blocks_give_rows_in_any_order() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (10, 4, 6, 3)).astype(np.uint8)
    blocks = [pixels[:4], pixels[4:8], pixels[8:]]
    rows = np.array([9, 0, 5, 4, 3])
    assert np.array_equal(read_blocks(blocks, rows, None, Store()), pixels[rows].transpose(0, 3, 1, 2))
    squares = read_blocks(blocks, rows, 4, Store())
    assert np.array_equal(squares, pixels[rows, :, 1:5].transpose(0, 3, 1, 2))


def test_what_exceeds_the_budget_lies_in_a_nameless_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTADV_CACHE", str(tmp_path / "cache"))
    store = Store(100)
    first, second, third = (store.empty((60,)) for _ in range(3))
    assert not isinstance(first, np.memmap) and isinstance(second, np.memmap) and isinstance(third, np.memmap)
    second[:], third[:] = 7, 8
    assert second.sum() == 420 and third.sum() == 480
    assert list((tmp_path / "cache").iterdir()) == []
    assert not isinstance(store.empty((40,)), np.memmap)


def test_no_room_in_the_cache_folder_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTADV_CACHE", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(DataError, match=r"2 MiB.*do not fit") as caught:
            Store(0).empty((2 * 2**20,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "FASTADV_CACHE" in caught.value.fix
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTADV_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="do not fit"):
        Store(0).empty((1,))


def test_available_memory_is_a_part_of_the_machine() -> None:
    assert 2**20 < available_memory() <= int(Path("/proc/meminfo").read_text().split()[1]) * 1024
