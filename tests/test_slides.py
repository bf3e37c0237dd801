"""Windows of images of every kind are the pixels that reading the whole image gives."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from a2fpn.data import read_image
from a2fpn.data.slides import SlideOptions, Window, open_slide
from a2fpn.data.slides.opening import WholeSlide
from a2fpn.data.slides.png import PngSlide
from a2fpn.data.slides.tiff import TiffSlide
from a2fpn.errors import A2FPNError

tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed; it comes with the extra 'slides'")

SIZE = (203, 317)
WINDOWS: list[Window] = [(0, 0, 317, 203), (0, 0, 1, 1), (316, 202, 317, 203), (60, 30, 200, 131), (250, 150, 317, 203)]


def pixels(channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    shape = (*SIZE, channels) if channels > 1 else SIZE
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def check(path: Path, expected: Any, kind: type, **options: Any) -> None:
    with open_slide(path, SlideOptions(**options)) as slide:
        assert type(slide) is kind
        assert slide.size == SIZE
        for x0, y0, x1, y1 in WINDOWS:
            read = slide.read((x0, y0, x1, y1))
            assert read.dtype == torch.uint8
            torch.testing.assert_close(read, torch.as_tensor(expected)[:, y0:y1, x0:x1], rtol=0, atol=0)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one strip": {},
    "strips": {"rowsperstrip": 7},
    "compressed strips": {"rowsperstrip": 7, "compression": "zlib"},
    "tiles": {"tile": (64, 48)},
    "compressed tiles": {"tile": (64, 48), "compression": "zlib", "predictor": True},
    "lzw": {"tile": (64, 48), "compression": "lzw"},
    "other byte order": {"tile": (64, 48), "byteorder": ">"},
    "big": {"bigtiff": True, "tile": (64, 48)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["gray", "gray 16", "RGB", "RGBA", "white is zero"])
def test_windows_of_a_tiff_are_those_of_the_whole(layout: str, kind: str, tmp_path: Path) -> None:
    options = dict(LAYOUTS[layout])
    writer = {"byteorder": options.pop("byteorder", None), "bigtiff": options.pop("bigtiff", False)}
    values, more = {
        "gray": (pixels(1), {}),
        "gray 16": (pixels(1, np.uint16), {}),
        "RGB": (pixels(3), {"photometric": "rgb"}),
        "RGBA": (pixels(4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        "white is zero": (pixels(1), {"photometric": "miniswhite"}),
    }[kind]
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, **writer) as file:
        file.write(values, **options, **more)
    check(path, read_image(path), TiffSlide)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("tile", [None, (64, 48)])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planes_of_rgb(planar: str, tile: Any, compression: str | None, tmp_path: Path) -> None:
    values = pixels()
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    tifffile.imwrite(
        tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, tile=tile, compression=compression
    )
    check(tmp_path / "a.tif", values.transpose(2, 0, 1), TiffSlide)


@pytest.mark.parametrize("tile", [None, (64, 48)])
def test_a_jpeg_compressed_tiff(tile: Any, tmp_path: Path) -> None:
    """Its colors are stored as YCbCr, at half the resolution."""
    path = tmp_path / "a.tif"
    jpeg: dict[str, Any] = {"compression": "jpeg", "compressionargs": {"level": 95}}
    tifffile.imwrite(path, pixels(), photometric="ycbcr", tile=tile, rowsperstrip=None if tile else 16, **jpeg)
    check(path, tifffile.imread(path).transpose(2, 0, 1), TiffSlide)


@pytest.mark.parametrize("ome", [True, False])
@pytest.mark.parametrize("tile", [None, (64, 48)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_channels_of_a_stack_are_chosen(ome: bool, tile: Any, dtype: Any, tmp_path: Path) -> None:
    values = pixels(5, dtype).transpose(2, 0, 1)
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    more: dict[str, Any] = (
        {"metadata": {"axes": "CYX"}} if ome else {"imagej": tile is None, "metadata": {"axes": "CYX"}}
    )
    tifffile.imwrite(path, values, photometric="minisblack", tile=tile, **more)
    eight = values if dtype == np.uint8 else ((values.astype(int) + 128) // 257).astype(np.uint8)
    check(path, eight[[3, 0, 2]], TiffSlide, channels=(3, 0, 2))
    check(path, eight[[4, 4, 4]], TiffSlide, channels=(4,))
    check(path, eight, TiffSlide, in_channels=5)
    with pytest.raises(ValueError, match=r"has 5 channels, the model 3; set channels=\(...\) \(--channels\)"):
        open_slide(path)
    with pytest.raises(ValueError, match="3 numbers from 0 to 4, or one of them"):
        open_slide(path, SlideOptions(channels=(0, 1, 5)))


def test_pages_without_names_are_channels_if_they_are_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = pixels(4).transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", metadata=None)
    check(tmp_path / "a.tif", values[[1, 3, 0]], TiffSlide, channels=(1, 3, 0))
    assert not caplog.records
    check(tmp_path / "a.tif", values[[0, 0, 0]], TiffSlide)
    assert "only the first is read" in caplog.text


def test_pyramids_are_read_at_their_full_size_and_scale(tmp_path: Path) -> None:
    path, values = tmp_path / "a.ome.tif", pixels()
    with tifffile.TiffWriter(path) as file:
        facts = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25}
        file.write(values, subifds=1, tile=(64, 48), photometric="rgb", metadata=facts)
        file.write(values[::2, ::2], subfiletype=1, tile=(64, 48), photometric="rgb")
    check(path, values.transpose(2, 0, 1), TiffSlide)
    with open_slide(path) as slide:
        assert slide.microns_per_pixel == 0.25


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, None),
        ({"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (25_400, 25_400), "resolutionunit": "INCH"}, 1.0),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),  # of a printer
        ({"resolution": (20_000, 20_000), "resolutionunit": "NONE"}, None),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um"}}, 0.25),
    ],
)
def test_the_scale_of_a_tiff(facts: dict[str, Any], expected: float | None, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels(1), **facts)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.microns_per_pixel == expected


def test_the_scale_of_a_png(tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "a.png", dpi=(50_800, 50_800))
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.microns_per_pixel == pytest.approx(0.5, rel=1e-4)


def test_a_range_of_intensity_holds_for_the_whole_image(tmp_path: Path) -> None:
    values = (pixels(1, np.uint16) // 16).astype(np.uint16)  # 12 bits
    values[100:, :] //= 4
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, tile=(64, 48))
    expected = np.clip(np.round((values - 0.0) * 255 / 4095), 0, 255).astype(np.uint8)
    check(path, np.repeat(expected[None], 3, 0), TiffSlide, intensity=(0.0, 4095.0))
    low, high = np.percentile(values, (0.1, 99.9))
    expected = np.clip(np.round((values - low) * 255 / (high - low)), 0, 255).astype(np.uint8)
    check(path, np.repeat(expected[None], 3, 0), TiffSlide, intensity="auto")
    with pytest.raises(ValueError, match="a low and a higher value"):
        SlideOptions(intensity=(3.0, 3.0))


def test_floating_point_needs_a_range(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels(1).astype(np.float32), tile=(64, 48))
    with (
        open_slide(tmp_path / "a.tif") as slide,
        pytest.raises(ValueError, match="float32 values have no standard range"),
    ):
        slide.read(WINDOWS[0])
    check(tmp_path / "a.tif", np.repeat(pixels(1)[None], 3, 0), TiffSlide, intensity=(0.0, 255.0))


def test_what_tifffile_can_not_cut_is_decoded_whole(tmp_path: Path) -> None:
    for number, image in enumerate((Image.fromarray(pixels()).quantize(9), Image.fromarray(pixels()).convert("1"))):
        path = tmp_path / f"{number}.tif"
        image.save(path)
        check(path, read_image(path), WholeSlide)


def test_a_damaged_tile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels(), tile=(64, 48), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[8]
    with path.open("r+b") as opened:
        opened.seek(start)
        opened.write(b"nonsense")
    with open_slide(path) as slide:
        slide.read((0, 0, 48, 64))
        with pytest.raises(ValueError, match=r"a\.tif: part 8 can't be decoded"):
            slide.read((0, 0, 317, 203))


def test_damaged_tags_are_errors_in_a_sentence(tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole.tif", tmp_path / "damaged.tif"
    tifffile.imwrite(whole, pixels()[:48, :64], tile=(32, 32), photometric="rgb", compression="zlib")
    content, rng = whole.read_bytes(), np.random.default_rng(0)
    parts = [content[:length] for length in range(4, 200, 5)]
    for _ in range(80):
        part = bytearray(content)
        part[int(rng.integers(4, 300))] = int(rng.integers(256))
        parts.append(bytes(part))
    read, messages = 0, []
    for part in parts:
        damaged.write_bytes(part)
        try:
            with open_slide(damaged, SlideOptions(max_pixels=10**6)) as slide:
                slide.read((0, 0, *(min(side, 20) for side in slide.size[::-1])))
                read += 1
        except A2FPNError as error:
            messages.append(str(error))
    assert all("damaged.tif" in message for message in messages)
    assert read > 10
    assert len(messages) > 40


def write_png(path: Path, values: np.ndarray, bits: int, kind: int, *, chunk: int = 1000) -> None:
    """A PNG with all five filters in turns, its stream cut into many parts."""
    height, width = values.shape[:2]
    if bits == 16:
        data = values.astype(">u2").tobytes()
    elif bits < 8:
        spread = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :]
        data = np.packbits(spread.reshape(height, -1), axis=1).tobytes()
    else:
        data = values.tobytes()
    rows = np.frombuffer(data, np.uint8).reshape(height, -1).astype(int)
    step = max(1, bits * (1 if values.ndim == 2 else values.shape[2]) // 8)
    filtered = bytearray()
    for y, row in enumerate(rows):
        above = rows[y - 1] if y else np.zeros_like(row)
        left, corner = (np.concatenate([np.zeros(step, int), x[:-step]]) for x in (row, above))
        nearest = np.abs(above - corner), np.abs(left - corner), np.abs(left + above - 2 * corner)
        nearest_of = np.where((nearest[0] <= nearest[1]) & (nearest[0] <= nearest[2]), left, corner)
        nearest_of = np.where((nearest[0] > nearest[1]) & (nearest[1] <= nearest[2]), above, nearest_of)
        nearest_of = np.where((nearest[0] > nearest[2]) & (nearest[1] > nearest[2]), corner, nearest_of)
        guess = (0 * row, left, above, (left + above) // 2, nearest_of)[y % 5]
        filtered += bytes([y % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes()
    packed = zlib.compress(bytes(filtered))

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    text = part(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    if kind == 3:
        text += part(b"PLTE", np.random.default_rng(1).integers(0, 256, 3 << bits, dtype=np.uint8).tobytes())
    for start in range(0, len(packed), chunk):
        text += part(b"IDAT", packed[start : start + chunk])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + text + part(b"IEND", b""))


KINDS = [(1, 0, 1), (2, 0, 1), (4, 3, 1), (8, 0, 1), (8, 2, 3), (8, 3, 1), (8, 4, 2), (8, 6, 4), (16, 0, 1)]


@pytest.mark.parametrize(("bits", "kind", "channels"), KINDS)
def test_a_png_in_bands_is_the_png(
    bits: int, kind: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("a2fpn.data.slides.opening._SMALL", 100)
    monkeypatch.setattr("a2fpn.data.slides.png._ROWS", 32)
    values = np.random.default_rng(0).integers(0, 1 << bits, (*SIZE, channels) if channels > 1 else SIZE)
    write_png(tmp_path / "a.png", values.astype(np.uint16 if bits == 16 else np.uint8), bits, kind)
    check(tmp_path / "a.png", read_image(tmp_path / "a.png"), PngSlide)


def test_pngs_that_have_no_bands_are_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2fpn.data.slides.opening._SMALL", 100)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels().transpose(1, 0, 2)).save(tmp_path / "a.png", exif=turned)
    check(tmp_path / "a.png", read_image(tmp_path / "a.png"), WholeSlide)


def test_a_png_that_ends_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2fpn.data.slides.opening._SMALL", 100)
    path = tmp_path / "a.png"
    write_png(path, pixels(), 8, 2)
    path.write_bytes(path.read_bytes()[:-80_000])
    with open_slide(path) as slide, pytest.raises(ValueError, match=r"a\.png: damaged around row"):
        slide.read((0, 0, 317, 203))


def test_thumbnails_are_means(tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        small, side = slide.thumbnail(100)
        assert (small.shape, side) == ((51, 80, 3), 4)
        np.testing.assert_allclose(small[3, 5], pixels()[12:16, 20:24].mean((0, 1)), atol=0.51)
        np.testing.assert_allclose(small[-1, -1], pixels()[200:, 316:].mean((0, 1)), atol=0.51)
        whole, side = slide.thumbnail(317)
        assert side == 1
        np.testing.assert_array_equal(whole, pixels())


def test_other_formats_have_a_limit_and_no_choices(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels()).save(path)
    check(path, read_image(path), WholeSlide, max_pixels=203 * 317)
    with pytest.raises(ValueError, match="203 = 64351 pixels exceed the limit of 64350"):
        open_slide(path, SlideOptions(max_pixels=203 * 317 - 1))
    with pytest.raises(ValueError, match="channels and intensity are supported only for TIFF files"):
        open_slide(path, SlideOptions(channels=(0,)))
    with pytest.raises(ValueError, match=r"b\.jpg: no such file"):
        open_slide(tmp_path / "b.jpg")
    (tmp_path / "c.tif").write_bytes(b"II*\0nothing")
    with pytest.raises(ValueError, match=r"c\.tif: not a readable"):
        open_slide(tmp_path / "c.tif")
