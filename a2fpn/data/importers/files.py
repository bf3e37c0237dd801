"""Lenient access to files of data sets: search by imprecise names, any encoding."""

from __future__ import annotations

import os
import struct
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from a2fpn._registry import natural_key
from a2fpn.config import MAX_PIXELS
from a2fpn.data.images import open_image, shown_size
from a2fpn.data.labeled import LossLog, split_name
from a2fpn.data.text_files import read_bytes as read_bytes
from a2fpn.data.text_files import read_json as read_json
from a2fpn.data.text_files import read_text as read_text
from a2fpn.errors import DataError

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
_HEAD = 2**12  # bytes of a JPEG that contain its size if it has no EXIF
_IMAGE_FOLDERS = frozenset(("images", "jpegimages", "imgs", "img", "data", "obj_train_data", "obj_valid_data"))


class ImageIndex:
    """Index of the image files below a folder, for lookup by the names in label files.

    Args:
        root: The folder.
        skip: Names of folders, lower case, whose images are masks.
    """

    def __init__(self, root: Path, skip: frozenset[str] = frozenset()) -> None:
        self.root = root
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name.lower() not in skip and not name.startswith(".")]
            found += [Path(folder, name) for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        self.files = sorted(found, key=lambda path: natural_key(str(path)))
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path in self.files:
            self._by_name.setdefault(path.name.lower(), []).append(path)
            self._by_stem.setdefault(path.stem.lower(), []).append(path)

    def find(self, name: str, near: Path | None = None) -> Path | None:
        """Find the image named in a label file, perhaps by a path of another machine.

        Args:
            name: A name, a path with slashes or backslashes, or a stem.
            near: A preferred folder.

        Returns:
            The file; None if there is none, or several that match equally well.
        """
        parts = [part.lower() for part in clean_path(name).split("/") if part not in ("", ".", "..")]
        if not parts:
            return None
        found = self._by_name.get(parts[-1]) or self._by_stem.get(parts[-1]) or self._by_stem.get(_stem(parts[-1]), [])
        return _closest(found, parts, near)

    def by_stem(self, parts: list[str], near: Path | None = None) -> Path | None:
        """Find an image by its stem and its folders."""
        lowered = [part.lower() for part in parts]
        return _closest(self._by_stem.get(lowered[-1], []), lowered, near)

    def name_and_split(self, path: Path) -> tuple[str, str]:
        """Return the name of an image in a data set, and the split named by its folders.

        Folders called "images" or after the split are not part of the name.

        Example:
            >>> index = ImageIndex(Path("no such folder"))
            >>> index.name_and_split(Path("no such folder/images/valid/site 1/a.png"))
            ('site 1/a.png', 'val')
        """
        return name_and_split(os.path.relpath(path, self.root).replace(os.sep, "/"))

    def size(self, path: Path, log: LossLog) -> tuple[int, int] | None:
        """Return the displayed height and width of an image; None, with a logged loss, if it is not an image."""
        try:
            return image_size(path)
        except Exception as error:  # PIL raises almost anything on a corrupt file
            log.add("unreadable-image", path, f"not a readable image ({str(error) or type(error).__name__}); skipped")
            return None


def name_and_split(relative: str) -> tuple[str, str]:
    """Split the path of an image within a data set into its name and its split.

    Example:
        >>> name_and_split("train/images/a.png"), name_and_split("cats/a.png")
        (('a.png', 'train'), ('cats/a.png', ''))
    """
    *folders, name = relative.split("/")
    split = ""
    while folders:
        if not split and split_name(folders[0]):
            split = split_name(folders[0])
        elif folders[0].lower() not in _IMAGE_FOLDERS:
            break
        folders = folders[1:]
    return "/".join([*folders, name]), split


def _closest(found: list[Path], parts: list[str], near: Path | None) -> Path | None:
    """Return the path that shares the most folders with the requested one, if it is unique."""
    if len(found) < 2:
        return found[0] if found else None
    if near is not None and len(close := [path for path in found if near in path.parents]) >= 1:
        found = close

    def shared(path: Path) -> int:
        count = 0
        for ours, theirs in zip(reversed(path.parts[:-1]), reversed(parts[:-1]), strict=False):
            if ours.lower() != theirs:
                break
            count += 1
        return count

    exact = [path for path in found if path.name.lower() == parts[-1]] or found
    ranked = sorted(exact, key=shared, reverse=True)
    return ranked[0] if len(ranked) == 1 or shared(ranked[0]) > shared(ranked[1]) else None


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def clean_path(name: str) -> str:
    r"""Return a path with forward slashes and without a drive, a scheme or a query.

    Example:
        >>> clean_path(r"C:\\data\\a.png"), clean_path("/data/local-files/?d=set/a%20b.png")
        ('data/a.png', 'set/a b.png')
    """
    if "?d=" in name:
        name = name.partition("?d=")[2]
    if "://" in name:
        name = name.partition("://")[2].partition("/")[2].partition("?")[0]
    if "\\" in name or name[1:2] == ":":
        path = PureWindowsPath(name)
        name = path.relative_to(path.anchor).as_posix() if path.anchor else path.as_posix()
    return unquote(name).strip().lstrip("/")


def image_size(path: str | Path) -> tuple[int, int]:
    """Return the displayed height and width of an image, after its EXIF orientation.

    Raises:
        Exception: Any exception of PIL for a file that is not an image.
    """
    with open(path, "rb") as file:
        size = _size_of_plain_jpeg(file.read(_HEAD))
        if size is not None:
            return size
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(file) as image:
                return shown_size(image)


def _size_of_plain_jpeg(head: bytes) -> tuple[int, int] | None:
    """Return height and width from the first bytes of a JPEG, ten times as fast as PIL.

    None if it is not a JPEG, or has anything before its pixels that PIL must read, such as EXIF.
    """
    size, place = None, 2
    while head.startswith(b"\xff\xd8") and place + 9 <= len(head) and head[place] == 0xFF:
        marker = head[place + 1]
        if marker == 0xDA:  # the pixels
            return size
        if marker in (0xC0, 0xC1, 0xC2):  # a frame: baseline, extended, progressive
            height, width = struct.unpack_from(">HH", head, place + 5)
            size = (height, width) if 0 < height * width <= MAX_PIXELS else None
        elif marker not in (0xC4, 0xDB, 0xDD, 0xE0, 0xFE):  # tables, intervals, JFIF, comments
            return None
        place += 2 + int.from_bytes(head[place + 2 : place + 4], "big")
    return None


def read_xml(path: Path) -> ET.Element:
    """Read XML; custom entities, which can expand small files to huge ones, are refused.

    Raises:
        DataError: If it can't be read; the message names the line.
    """
    content = read_bytes(path)
    if not content.strip():
        raise DataError(f"{path}: the file is empty.")
    if b"<!ENTITY" in content:
        raise DataError(f"{path}: the file defines XML entities, which are not supported.")
    try:
        return ET.fromstring(content)
    except ET.ParseError as error:
        raise DataError(f"{path}, line {error.position[0]}: invalid XML ({error}).") from None
