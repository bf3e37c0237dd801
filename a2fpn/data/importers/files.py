"""Lenient access to files of data sets: search by imprecise names, any encoding."""

from __future__ import annotations

import io
import itertools
import os
import struct
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from a2fpn._registry import natural_key
from a2fpn.config import MAX_PIXELS
from a2fpn.data.images import is_image, open_image, shown_size
from a2fpn.data.labeled import LossLog, split_name
from a2fpn.data.text_files import read_bytes as read_bytes
from a2fpn.data.text_files import read_json as read_json
from a2fpn.data.text_files import read_text as read_text
from a2fpn.errors import DataError

_HEAD = 2**12  # bytes of a JPEG that contain its size if it has no EXIF
_IMAGE_FOLDERS = frozenset(
    (
        "images",
        "jpegimages",
        "imgs",
        "img",
        "data",
        "obj_train_data",
        "obj_valid_data",
        "obj_validation_data",
        "obj_test_data",
    )
)

LABEL_FOLDERS = frozenset(("labels", "masks", "label_images", "label", "mask", "gt", "instances"))
"""Names of folders, lower case, whose images are labels."""


class ImageIndex:
    """Index of the image files below a folder, for lookup by the names in label files.

    Args:
        root: The folder.
        skip: Names of folders, lower case, whose images are masks.
    """

    def __init__(self, root: Path, skip: frozenset[str] = frozenset()) -> None:
        self.root = root
        self._prefix = os.path.join(root, "")
        found = []
        for folder, folders, names in walk(root):
            folders[:] = [name for name in folders if name.lower() not in skip]
            found += [Path(folder, name) for name in names if is_image(name)]
        self.files = sorted(found, key=lambda path: natural_key(str(path)))
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path in self.files:
            self._by_name.setdefault(_folded(path.name), []).append(path)
            self._by_stem.setdefault(_folded(path.stem), []).append(path)

    def find(self, name: str, near: Path | None = None, *, split: str = "") -> Path | None:
        """Find the image named in a label file, perhaps by a path of another machine.

        The name as written is preferred, as files may have any name; then the one that it encodes as a URL or path.

        Args:
            name: A name, a path with slashes or backslashes, or a stem.
            near: The preferred folder, or that of the label file.
            split: The split of the labels, if any; images in the folder of another one are others.

        Returns:
            The file; None if there is none, or several that match equally well; see :meth:`reason`.
        """
        placed = _is_relative(name)
        for parts, files in self._named(name):
            found = [path for path in files if not self._elsewhere(path, parts if placed else parts[-1:], split)]
            if len(found) > 1:
                found = [path for path in found if path.parent.name.lower() not in LABEL_FOLDERS] or found
            if (path := _closest(found, parts, near)) is not None:
                return path
        return None

    def reason(self, name: str) -> str:
        """Return why :meth:`find` found nothing."""
        files = list(dict.fromkeys(path for _, files in self._named(name) for path in files))
        shown = ", ".join(self._relative(path) for path in files[:3]) + (", ..." if len(files) > 3 else "")
        if len(files) > 1:
            return f"matches several images: {shown}"
        return f"not found; {shown} is in another folder, or has labels of its own" if files else "not found"

    def _named(self, name: str) -> list[tuple[list[str], list[Path]]]:
        """Return the readings of a name as parts of a path, each with the files of that name."""
        meanings = dict.fromkeys((name, _local_path(name), clean_path(name)))
        split = [[part for part in path.split("/") if part not in ("", ".", "..")] for path in meanings]
        for known, key in ((self._by_name, str), (self._by_stem, str), (self._by_stem, _stem)):
            alike = [(parts, known.get(_folded(key(parts[-1])), [])) for parts in split if parts]
            if any(files for _, files in alike):  # a stem is no way out if a name is ambiguous
                return alike
        return []

    def _elsewhere(self, path: Path, parts: Sequence[str], split: str) -> bool:
        """Return whether an image is in the folder of another split, or in a folder of another name, than stated."""
        if len(parts) < 2 and not split:
            return False
        own, own_splits = _place(self._relative(path))
        stated, stated_splits = _place("/".join(parts))
        wanted = {split} if split else stated_splits
        return bool((own_splits and wanted and not own_splits & wanted) or (own and stated and own != stated))

    def by_stem(self, parts: list[str], near: Path | None = None) -> Path | None:
        """Find an image by its stem and its folders."""
        found = [p for p in self._by_stem.get(_folded(parts[-1]), []) if not self._elsewhere(p, parts, "")]
        return _closest(found, parts, near)

    def name_and_split(self, path: Path) -> tuple[str, str]:
        """Return the name of an image in a data set, and the split named by its folders.

        Folders called "images" or after the split are not part of the name.

        Example:
            >>> index = ImageIndex(Path("no such folder"))
            >>> index.name_and_split(Path("no such folder/images/valid/site 1/a.png"))
            ('site 1/a.png', 'val')
        """
        return name_and_split(self._relative(path))

    def _relative(self, path: Path) -> str:
        """Return the path from the root, with slashes."""
        text = str(path)
        inside = text.startswith(self._prefix)
        return (text[len(self._prefix) :] if inside else os.path.relpath(text, self.root)).replace(os.sep, "/")

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


def _place(relative: str) -> tuple[str, set[str]]:
    """Return the last folder of a path that is not one of any images or a split, and the splits among its folders.

    Example:
        >>> _place("train/site 1/images/a.png"), _place("images/a.png")
        (('site 1', {'train'}), ('', set()))
    """
    folders = [folder for folder in relative.split("/")[:-1] if folder.lower() not in _IMAGE_FOLDERS]
    splits = {split for folder in folders if (split := split_name(folder))}
    names = [folder for folder in folders if not split_name(folder)]
    return _folded(names[-1]) if names else "", splits


def _is_relative(name: str) -> bool:
    """Return whether a name is a path from the root of the data, not one of another machine or of a label file."""
    away = name.startswith(("/", "\\")) or "://" in name or name[1:2] == ":"
    return not away and ".." not in name.replace("\\", "/").split("/")


def common_folders(first: Path, second: Path) -> int:
    """Return the number of folders of one path that are also folders of another."""
    return len({*first.parent.parts} & {*second.parent.parts})


def _closest(found: list[Path], parts: list[str], near: Path | None) -> Path | None:
    """Return the path that shares the most folders with the requested one, then with that nearby, if it is unique."""
    if near is not None and len(found) > 1:
        found = [path for path in found if near in path.parents] or found
    if len(found) < 2:
        return found[0] if found else None

    def likeness(path: Path) -> tuple[list[tuple[bool, int]], int]:
        """Compare the name, and count the same folders; first ignoring case."""
        shared = [
            (key(parts[-1]) in (key(path.name), key(path.stem)), _shared_end(path.parts[:-1], parts[:-1], key))
            for key in (_folded, str)
        ]
        return shared, 0 if near is None else common_folders(path, near / path.name)

    best, second, *_ = sorted(found, key=likeness, reverse=True)
    return best if likeness(best) > likeness(second) else None


def _shared_end(first: Sequence[str], second: Sequence[str], key: Callable[[str], str]) -> int:
    pairs = zip(map(key, reversed(first)), map(key, reversed(second)), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _folded(name: str) -> str:
    """Return a name without differences of case and of Unicode composition, in which macOS renames files."""
    return unicodedata.normalize("NFC", name).lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def clean_path(name: str) -> str:
    r"""Return a path with forward slashes and without a drive, a scheme or a query.

    Example:
        >>> clean_path(r"C:\\data\\a.png"), clean_path("/data/local-files/?d=set/a%20b.png")
        ('data/a.png', 'set/a b.png')
    """
    return unquote(_local_path(name)).strip().lstrip("/")


def _local_path(name: str) -> str:
    """Return the part of a URL or of a path of any system that can be a path below a folder, still encoded."""
    if "?d=" in name:
        name = name.partition("?d=")[2]
    if "://" in name:
        name = name.partition("://")[2].partition("/")[2].partition("?")[0]
    if "\\" in name or name[1:2] == ":":
        path = PureWindowsPath(name)
        name = path.relative_to(path.anchor).as_posix() if path.anchor else path.as_posix()
    return name


def walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder like :func:`os.walk`, without hidden folders, also through links, but into each folder only once.

    Links are followed last, so that a file is found under its own path if it has one below the root.
    """
    # The folders that contain the root count as seen: a link to one of them would add unrelated files.
    seen = {_identity(parent) for parent in Path(root).resolve().parents}
    pending = [os.fspath(root)]
    while pending:
        for folder, folders, names in os.walk(pending.pop(0)):
            identity = _identity(folder)
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield folder, folders, names
            pending += filter(os.path.islink, (os.path.join(folder, name) for name in folders))


def folders_named(root: Path, name: str) -> list[Path]:
    """Return the folders with a name at or below a folder, through links."""
    return sorted(Path(folder) for folder, *_ in walk(root) if os.path.basename(folder) == name)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """Return the displayed height and width of an image, after its EXIF orientation.

    Args:
        source: The path, or the content of the file.

    Raises:
        Exception: Any exception of PIL for a file that is not an image.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
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


def xml_bytes(path: Path) -> bytes:
    """Read a file of XML; custom entities, which can expand small files to huge ones, are refused.

    Raises:
        DataError: If it defines entities, or can't be read.
    """
    content = read_bytes(path)
    if b"<!ENTITY" in content.replace(b"\0", b""):  # in UTF-16, zeros are between the letters
        raise DataError(f"{path}: the file defines XML entities, which are not supported.")
    return content


def read_xml(path: Path) -> ET.Element:
    """Read XML as a tree.

    Raises:
        DataError: If it can't be read; the message names the line.
    """
    content = xml_bytes(path)
    if not content.strip():
        raise DataError(f"{path}: the file is empty.")
    try:
        return ET.fromstring(content)
    except ET.ParseError as error:
        raise DataError(f"{path}, line {error.position[0]}: invalid XML ({error}).") from None
