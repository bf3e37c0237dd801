"""JPEGs take a faster way where it gives the same pixels; PIL decides what the same is."""

import io
import os
import re
import struct
import subprocess
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin, features
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from a2fpn.data import ImageError, read_image
from a2fpn.data import images as reading
from a2fpn.data.importers.files import image_size
from a2fpn.data.slides import open_slide
from a2fpn.data.slides.png import PngSlide, UnreadablePngError


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    """Smooth colors with some noise."""
    rng = np.random.default_rng(0)
    bands = len(mode) if mode in ("RGB", "CMYK") else 1
    pixels = np.linspace(0, 200, size[0] * size[1] * bands).reshape(size[1], size[0], bands)
    pixels = (pixels + rng.integers(0, 50, pixels.shape)).astype(np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if bands == 1 else pixels, mode)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg", **options)
    return file.getvalue()


def by_pil(content: bytes) -> Tensor:
    """What PIL makes of it, turned as EXIF says."""
    with Image.open(io.BytesIO(content)) as image:
        return F.to_image(reading.to_rgb(ImageOps.exif_transpose(image)))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each JPEG that is read, whether it took the faster way to the end."""
    taken: list[bool] = []
    decode = reading._decode_plain_jpeg

    def watched(*args: Any) -> Tensor | None:
        pixels = decode(*args)
        taken.append(pixels is not None)
        return pixels

    monkeypatch.setattr(reading, "_decode_plain_jpeg", watched)
    return taken


ORIENTATION = 0x0112
PLAIN = {
    "rgb": jpeg(picture()),
    "rgb without subsampling": jpeg(picture(), subsampling=0, quality=95),
    "progressive": jpeg(picture(), progressive=True),
    "restart markers": jpeg(picture(), restart_marker_blocks=1),
    "gray": jpeg(picture("L")),
    "kept as rgb": jpeg(picture(), keep_rgb=True),
    "with a comment and a profile": jpeg(picture(), comment=b"\xff\xd8" * 9, icc_profile=b"\xff\xc0" * 99),
    "one pixel": jpeg(picture(size=(1, 1))),
    "fill bytes": jpeg(picture()).replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),  # before the tables
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_are_what_pil_makes_of_them(name: str, tmp_path: Path, fast: list[bool]) -> None:
    content = PLAIN[name]
    expected = by_pil(content)
    size = (int(expected.shape[1]), int(expected.shape[2]))
    (tmp_path / "a.jpg").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (read_image(tmp_path / "a.jpg"), read_image(content), read_image(content, size=size)):
            assert image.dtype == torch.uint8
            assert torch.equal(image, expected)
    assert fast == [True] * 3
    assert image_size(tmp_path / "a.jpg") == size


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return jpeg(picture(), exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_obeyed_with_and_without_a_size(orientation: int, fast: list[bool]) -> None:
    content = turned(orientation)
    expected = by_pil(content)
    assert torch.equal(read_image(content), expected)
    assert torch.equal(read_image(content, size=(int(expected.shape[1]), int(expected.shape[2]))), expected)
    assert fast == [orientation == 1] * 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_exif_is_obeyed_in_every_format(kind: str, orientation: int, tmp_path: Path) -> None:
    """PIL says the size of a TIFF as it is shown, that of others as stored."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{kind}"
    picture().save(path, kind, exif=exif)
    expected = by_pil(path.read_bytes())
    size = (int(expected.shape[1]), int(expected.shape[2]))
    assert size == ((37, 23) if orientation > 4 else (23, 37))
    assert image_size(path) == size
    assert torch.equal(read_image(path, size=size), expected)
    assert open_slide(path).size == size
    message = "the size without its EXIF" if orientation > 4 else "the annotations give 23 x 37"
    with pytest.raises(ImageError, match=message):
        read_image(path, size=size[::-1])


def test_annotations_of_the_picture_as_stored_are_an_error(fast: list[bool]) -> None:
    content = turned(6)
    assert torch.equal(read_image(content, size=(37, 23)), by_pil(content))
    with pytest.raises(ImageError, match="annotations give 37 x 23, the size without its EXIF"):
        read_image(content, size=(23, 37))
    with pytest.raises(
        ImageError, match=r"the image has 23 x 37 pixels \(width x height\), the annotations give 40 x 23"
    ):
        read_image(content, size=(23, 40))
    assert fast == [False]


def test_exif_behind_the_frame_counts(tmp_path: Path, fast: list[bool]) -> None:
    content = turned(6)
    start = content.index(b"\xff\xe1")
    length = 2 + int.from_bytes(content[start + 2 : start + 4], "big")
    segment, rest = content[start : start + length], content[:start] + content[start + length :]
    scan = rest.index(b"\xff\xda")
    moved = rest[:scan] + segment + rest[scan:]
    assert torch.equal(read_image(moved), by_pil(moved))
    (tmp_path / "a.jpg").write_bytes(moved)
    assert image_size(tmp_path / "a.jpg") == tuple(by_pil(moved).shape[1:])
    assert fast == [False]


XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


def turned_png(tag: str, *, behind: bool) -> bytes:
    """A PNG of 37 x 23 pixels that is shown upright, by a tag before its pixels or behind them."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    chunks = {
        "eXIf": chunk(b"eXIf", exif.tobytes()[6:]),
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode()),
        "ImageMagick": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(_hexadecimal(exif.tobytes()))),
    }
    picture().save(file := io.BytesIO(), "png")
    content = file.getvalue()
    place = content.index(b"IEND") - 4 if behind else content.index(b"IDAT") - 4
    dates = chunk(b"tEXt", b"date:create\x002026-01-01")
    return content[:place] + dates + chunks[tag] + content[place:]


def _hexadecimal(content: bytes) -> bytes:
    return f"\nexif\n{len(content):8d}\n{content.hex()}\n".encode()


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("tag", ["eXIf", "xmp", "ImageMagick"])
def test_a_png_is_turned_by_any_tag_wherever_it_stands(tag: str, behind: bool, tmp_path: Path) -> None:
    content = turned_png(tag, behind=behind)
    expected = by_pil(content)
    assert expected.shape == (3, 37, 23)
    assert torch.equal(read_image(content, size=(37, 23)), expected)
    with pytest.raises(ImageError, match="the size without its EXIF orientation"):
        read_image(content, size=(23, 37))
    (tmp_path / "a.png").write_bytes(content)
    assert image_size(tmp_path / "a.png") == (37, 23)
    with pytest.raises(UnreadablePngError, match="rotated"):
        PngSlide(tmp_path / "a.png")


@pytest.mark.parametrize("late", [b"", chunk(b"tEXt", b"date:create\x002026-01-01"), chunk(b"eXI", b"")[:9]])
def test_looking_for_a_tag_decodes_no_png(late: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a picture that is read in bands would be in memory as a whole."""
    picture().save(file := io.BytesIO(), "png")
    content = file.getvalue()
    place = content.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(content[:place] + late + content[place:])
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    assert image_size(tmp_path / "a.png") == (23, 37)
    with reading.open_image(tmp_path / "a.png") as image:
        assert reading.orientation(image) == 1


@pytest.mark.parametrize("image", [picture("CMYK"), picture("L").convert("1").convert("L").convert("CMYK")])
def test_what_has_four_channels_is_left_to_pil(image: Image.Image, fast: list[bool]) -> None:
    content = jpeg(image)
    assert torch.equal(read_image(content), by_pil(content))
    assert fast == [False]


def test_other_formats_are_left_to_pil(fast: list[bool]) -> None:
    for kind in ("png", "bmp", "tiff", "webp"):
        file = io.BytesIO()
        picture().save(file, kind, **({"lossless": True} if kind == "webp" else {}))
        assert torch.equal(read_image(file.getvalue()), F.to_image(picture()))
    assert fast == [False] * 4


@pytest.mark.parametrize("name", ["rgb", "progressive", "gray"])
def test_a_cut_off_jpeg_is_what_it_is_to_pil(name: str) -> None:
    """At any length: an error with PIL's reason, or the same pixels."""
    content, outcomes = PLAIN[name], set()
    for length in [*range(0, len(content) - 20, 41), *range(len(content) - 20, len(content))]:
        part = content[:length]
        try:
            expected = by_pil(part)
        except Exception as error:
            outcomes.add("error")
            reason = re.split(r"[\n<]| \(", str(error))[0].rstrip(".")  # without numbers of bytes and addresses
            own = "(expected one of|damaged)" if reason.startswith("cannot identify") else re.escape(reason)
            with pytest.raises(ImageError, match=rf"^cut\.jpg: not a readable image \({own}"):
                read_image(part, name="cut.jpg")
        else:
            outcomes.add("pixels")
            assert torch.equal(read_image(part), expected)
    assert "error" in outcomes


def test_damage_inside_is_what_it_is_to_pil() -> None:
    rng = np.random.default_rng(1)
    content = jpeg(picture(size=(90, 70)))
    start = content.index(b"\xff\xda") + 20
    for position in rng.integers(start, len(content) - 2, 60).tolist():
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 255))
        try:
            expected = by_pil(bytes(damaged))
        except Exception:
            with pytest.raises(ImageError):
                read_image(bytes(damaged))
        else:
            assert torch.equal(read_image(bytes(damaged)), expected)


def test_without_torchvisions_operator_everything_is_pils(monkeypatch: pytest.MonkeyPatch, fast: list[bool]) -> None:
    monkeypatch.setattr(torch.ops, "image", object())
    assert torch.equal(read_image(PLAIN["rgb"]), by_pil(PLAIN["rgb"]))
    assert fast == [False]


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_the_limit_of_pixels_is_an_option_and_not_pils(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    picture().save(file, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (37 * 23, None):
            assert read_image(file.getvalue(), max_pixels=limit).shape == (3, 23, 37)
    with pytest.raises(ImageError, match="37 x 23 = 851 pixels exceed the limit of 850; raise max_pixels"):
        read_image(file.getvalue(), max_pixels=37 * 23 - 1)


@pytest.mark.parametrize("kind", ["eps", "ppm", "tga", "pcx", "ico", "sgi", "jpeg2000"])
def test_formats_that_are_not_documented_are_never_opened(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    """An EPS would start Ghostscript, whatever the file is called."""
    Image.init()
    picture().save(tmp_path / f"photo.{kind}", kind)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program was started"))
    path = (tmp_path / f"photo.{kind}").rename(tmp_path / "photo.jpg")
    with pytest.raises(ImageError, match=r"photo\.jpg: not a readable image \(expected one of JPEG, PNG, TIFF"):
        read_image(path)
    with pytest.raises(ImageError, match="expected one of JPEG, PNG, TIFF"):
        reading.read_labels(path, (23, 37), name="photo.jpg")


@pytest.mark.skipif(not features.check("avif"), reason="needs PIL's decoder of AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.avif", quality=100)
    difference = read_image(tmp_path / "a.avif").int() - F.to_image(picture()).int()
    assert difference.abs().float().mean() < 10


@pytest.mark.parametrize("kind", ["gif", "tiff", "webp"])
def test_further_frames_are_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    image = read_image(file.getvalue(), name="moving")
    assert image[0].min() > 240
    assert image[2].max() < 15
    assert "moving: 2 frames or pages; only the first is read" in caplog.text
    caplog.clear()
    frames[0].save(file := io.BytesIO(), kind)
    read_image(file.getvalue())
    assert not caplog.text


@pytest.mark.skipif("A2FPN_DATA" not in os.environ, reason="A2FPN_DATA does not name a folder of COCO sets")
def test_photographs_are_what_pil_makes_of_them(fast: list[bool]) -> None:
    paths = sorted((Path(os.environ["A2FPN_DATA"]) / "coco128" / "images").rglob("*.jpg"))
    for path in paths:
        expected = by_pil(path.read_bytes())
        assert torch.equal(read_image(path, size=(int(expected.shape[1]), int(expected.shape[2]))), expected), path
    assert fast == [True] * len(paths)
    assert len(paths) > 100


# Values that PIL reads otherwise than they are meant


def tiff(values: np.ndarray[Any, Any], photometric: int, *, order: str = "<", kind: int = 1, extra: int = 0) -> bytes:
    """Return an uncompressed TIFF of one strip."""
    samples, bits = values.shape[2] if values.ndim == 3 else 1, values.itemsize * 8
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape[:2]
    tags = {256: [width], 257: [height], 258: [bits] * samples, 259: [1], 262: [photometric], 273: [0]}
    tags |= {277: [samples], 278: [height], 279: [len(data)]} | ({338: [extra]} if extra else {})
    tags |= {339: [kind] * samples}
    packed = {tag: struct.pack(f"{order}{len(value)}I", *value) for tag, value in tags.items()}
    start = 8 + 2 + 12 * len(tags) + 4
    end = start + sum(len(value) for value in packed.values() if len(value) > 4)
    packed[273] = struct.pack(f"{order}I", end)
    entries, blobs = b"", b""
    for tag, value in packed.items():
        place = value if len(value) == 4 else struct.pack(f"{order}I", start + len(blobs))
        blobs += value if len(value) > 4 else b""
        entries += struct.pack(f"{order}HHI", tag, 4, len(value) // 4) + place
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + blobs + data


CHANCE = np.random.default_rng(0)
GRAY16 = CHANCE.integers(0, 65536, (5, 7), dtype=np.uint16)
COLOR, ALPHA = CHANCE.integers(0, 256, (5, 7, 3), dtype=np.uint8), CHANCE.integers(0, 256, (5, 7), dtype=np.uint8)


def shown(source: bytes, folder: Path, **options: Any) -> list[np.ndarray[Any, Any]]:
    """Return the pixels (H, W, 3) that the whole file and, where it can be read so, its window give."""
    path = folder / "a"
    path.write_bytes(source)
    with open_slide(path) as slide:
        window = slide.read((0, 0, 7, 5))
    return [np.array(x.permute(1, 2, 0)).astype(int) for x in (read_image(source, **options), window)]


@pytest.mark.parametrize("values", [GRAY16, (GRAY16 >> 8).astype(np.uint8)], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("photometric", [0, 1], ids=["0 is white", "0 is black"])
def test_shades_of_a_tiff_may_be_upside_down(values: np.ndarray[Any, Any], photometric: int, tmp_path: Path) -> None:
    share = values / np.iinfo(values.dtype).max
    expected = np.round(255 * (share if photometric else 1 - share))[..., None].repeat(3, 2)
    for pixels in shown(tiff(values, photometric), tmp_path):
        np.testing.assert_array_equal(pixels, expected)


def test_upside_down_values_of_12_bits_are_so_too() -> None:
    pixels = np.array(read_image(tiff(GRAY16 >> 4, 0), gray_bits=12))[0]
    np.testing.assert_array_equal(pixels, np.round(255 * (1 - (GRAY16 >> 4) / 4095)))


def test_what_pil_turns_by_exif_stays_upside_down() -> None:
    content = bytearray(tiff(GRAY16, 0))
    place = content.index(struct.pack("<HHI", 277, 4, 1))  # SamplesPerPixel is 1 anyway
    content[place : place + 12] = struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    pixels = np.array(read_image(bytes(content)))[0]
    np.testing.assert_array_equal(pixels, np.rot90(np.round(255 * (1 - GRAY16 / 65535)), -1))


@pytest.mark.parametrize("multiplied", [False, True])
def test_transparency_of_a_tiff_lies_over_white_once(multiplied: bool, tmp_path: Path) -> None:
    pytest.importorskip("tifffile")
    alpha = ALPHA[..., None] / 255
    stored = np.floor(COLOR * alpha).astype(np.uint8) if multiplied else COLOR
    expected = (stored if multiplied else COLOR * alpha) + 255 * (1 - alpha)
    content = tiff(np.concatenate([stored, ALPHA[..., None]], 2), 2, extra=1 if multiplied else 2)
    for pixels in shown(content, tmp_path):
        np.testing.assert_allclose(pixels, expected, atol=1.01)


def png16(values: np.ndarray[Any, Any], key: tuple[int, ...] = ()) -> bytes:
    """Return a PNG of 16 bits, with a color that is transparent."""
    height, width, samples = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[samples], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if key:
        chunks.insert(1, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return made


@pytest.mark.parametrize("samples", [1, 3])
def test_a_transparent_color_of_16_bits_is_white(samples: int) -> None:
    values = CHANCE.integers(0, 65536, (5, 7, samples), dtype=np.uint16)
    pixels = np.array(read_image(png16(values, tuple(int(value) for value in values[2, 3])))).transpose(1, 2, 0)
    expected = np.broadcast_to(np.round(values / 257), (5, 7, 3)).copy()
    expected[2, 3] = 255
    assert np.abs(pixels - expected).max() <= (samples > 1)  # of colors the higher byte


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_bits_of_gray_are_not_asked_for_of_colors_in_silence(samples: int, caplog: pytest.LogCaptureFixture) -> None:
    values = CHANCE.integers(0, 4096, (5, 7, samples), dtype=np.uint16)
    values[..., 3 if samples > 2 else 1 :] = 65535
    with pytest.raises(ImageError, match=r"gray_bits=12 supports gray without alpha.*convert it to 8 bits"):
        read_image(png16(values), gray_bits=12)
    read_image(COLOR_PNG, gray_bits=12)  # of 8 bits: nothing to scale
    read_image(png16(values), name="dark")
    assert "dark: all 16-bit values are below 4096" in caplog.text


def color_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(COLOR).save(file, "PNG")
    return file.getvalue()


COLOR_PNG = color_png()


def test_signed_bytes_are_refused_and_what_is_not_read_is_not_called_damaged() -> None:
    with pytest.raises(ImageError, match="signed 8-bit values have no standard range; convert them to unsigned"):
        read_image(tiff(COLOR[..., 0].view(np.int8), 1, kind=2))
    for values in (GRAY16.astype(np.float64), np.stack([ALPHA, ALPHA], 2)):
        with pytest.raises(
            ImageError, match=r"not a readable image .its pixel format is not supported; convert it to 8-bit"
        ):
            read_image(tiff(values, 1, kind=3 if values.dtype == float else 1))
