"""Which images a folder or a tar file holds, and what of it is left out."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import posixpath
import re
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

from PIL import Image
from timm.utils import natural_key

from singer.errors import MAX_NAMES_SHOWN, SingerError, first_names, is_exhaustion, one_line

_logger = logging.getLogger("singer")

_READ = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".gif"),
    *(".tif", ".tiff", ".bmp", ".dib", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
)

EXTENSIONS = tuple(name for name in _READ if name in Image.registered_extensions())
"""Of the images that are read; Pillow's older versions know no ``.avif``."""

_UNREAD = {
    "images in formats that are not read": (
        *_READ,
        *(".heic", ".heif", ".hif", ".jxl", ".svg", ".psd", ".tga", ".qoi", ".exr", ".hdr", ".pfm"),
        *(".ico", ".pcx", ".sgi", ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),
    ),
    "compressed archives": (
        *(".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"),
        *(".zip", ".7z", ".rar"),
    ),
}

_MAX_LINKS = 40
"""Symbolic links that are followed in one path, as on Linux."""

_MAX_PATHS = 1_000_000
"""Paths that the braces of a pattern may stand for."""

FOUND_BEFORE = "folders and tars that were found before"

_NO_TARGET = "links to nothing in the tar"
_SPECIAL = "named pipes, sockets and devices"


class LeftOut:
    """What an image source leaves out: numbers and first names by reason, for a line in the log."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count something under a reason, which is in the plural: ``hidden folders``."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        names = self._names.setdefault(reason, [])
        if len(names) < MAX_NAMES_SHOWN:
            names.append(name)

    def __contains__(self, reason: str) -> bool:
        """Return whether something was left out for a reason."""
        return reason in self._counts

    def log(self, where: str) -> None:
        """Warn, in one line, of what was left out of a source, if anything was."""
        reasons = [
            f"{reason}: {count} ({first_names(self._names[reason], count)})"
            for reason, count in self._counts.items()
        ]
        if reasons:
            _logger.warning("data.source: %s: left out: %s", where, "; ".join(reasons))


def in_natural_order(paths: Iterable[str], where: str) -> list[str]:
    """Sort paths: numbers in them by value, equal ones as text.

    Raises:
        SingerError: a digit in a name has no value.
    """
    try:
        return sorted(paths, key=lambda path: (natural_key(path), path))
    except ValueError as error:  # timm takes superscripts and the like for digits
        raise SingerError(
            f"data.source: {where!r} has a file name that can't be put in order "
            f"({one_line(error)}); rename it"
        ) from error


def _expand_braces(pattern: str) -> Iterator[str]:
    braces = re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{}]*,[^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    first, last, choices = braces.groups()
    names: Iterable[str]
    if choices is not None:
        names = choices.split(",")
    elif int(first) > int(last):
        raise SingerError(
            f"data.source: got the range {braces.group()} in {pattern!r}, expected one that "
            f"ascends: {{{last}..{first}}}"
        )
    else:
        names = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    for name in names:
        yield from _expand_braces(f"{before}{name}{after}")


def _matches(pattern: str, left_out: LeftOut) -> list[str]:
    """Return what :func:`glob.glob` does; ``**`` meets each real folder once.

    Two links to a folder in itself would make 2 ** 40 paths of it.
    """
    recursive = re.fullmatch(r"((?:[^/]*/)*?)\*\*(?:/(.*))?", pattern)
    if recursive is None:
        return glob.glob(pattern)
    base, rest = recursive.groups()
    searched: set[tuple[int, int]] = set()
    found: list[str] = []
    for start in glob.glob(base) if base else [os.curdir]:
        for folder, _ in _folders(start, left_out, searched):
            below = os.path.join(folder, "").removeprefix("" if base else "./")
            if below and (rest == "" or (rest is None and folder == start)):
                found.append(below)
            if rest != "":
                found += _matches(glob.escape(below) + (rest or "*"), left_out)
    return list(dict.fromkeys(found))


def expand_pattern(pattern: str, left_out: LeftOut) -> list[str]:
    """Return the paths that a pattern stands for; what exists under its very name is no pattern.

    Args:
        pattern: with ``*``, ``?``, ``[abc]`` and ``**`` of :mod:`glob`, ``{000..127}``, ``{a,b}``.
        left_out: counts the folders that ``**`` leaves out, see :func:`images_in_folder`.

    Returns:
        What the braces give, in their order; of each with wildcards the matches in natural order.

    Raises:
        SingerError: wildcards match nothing, a range descends, or the braces stand for too much.
    """
    if os.path.lexists(pattern):
        return [pattern]
    expanded = list(itertools.islice(_expand_braces(pattern), _MAX_PATHS + 1))
    if len(expanded) > _MAX_PATHS:
        raise SingerError(f"data.source: {pattern!r} stands for more than {_MAX_PATHS:,} paths")
    paths: list[str] = []
    for path in expanded:
        if glob.escape(path) == path:
            paths.append(path)
        elif matches := _matches(path, left_out):
            paths += in_natural_order(matches, path)
        else:
            raise SingerError(f"data.source: nothing matches {path!r}")
    return paths


def has_extension(name: str, extensions: str | tuple[str, ...]) -> bool:
    """Return whether a name has one of the extensions and is none of macOS's ``._x.jpg`` files."""
    return name.lower().endswith(extensions) and not os.path.basename(name).startswith("._")


def is_special(path: str, left_out: LeftOut) -> bool:
    """Return whether a path is a named pipe, socket or device, and count it if so.

    Opening one may wait for ever. A path without a file is none: reading it names it.
    """
    special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    if special:
        left_out.add(_SPECIAL, path)
    return special


def was_found(path: str, found: set[tuple[int, int]], left_out: LeftOut) -> bool:
    """Return whether a file was found before under any name, and count it if so; else note it.

    Args:
        path: the file. One that is not there was not found.
        found: device and inode number of what was found.
        left_out: counts it.
    """
    try:
        status = os.stat(path)
    except OSError:
        return False
    key = (status.st_dev, status.st_ino)
    if key in found:
        left_out.add(FOUND_BEFORE, path)
        return True
    found.add(key)
    return False


def _count_unread(name: str, path: str, left_out: LeftOut) -> None:
    """Count a file that is no image and no tar, if it may hold images."""
    for reason, extensions in _UNREAD.items():
        if has_extension(name, extensions):
            left_out.add(reason, path)


def _is_above(link: str, folders: Iterable[str]) -> bool:
    """Return whether a link leads to a folder that holds one of some folders."""
    target = os.path.realpath(link)
    real = map(os.path.realpath, folders)
    return any(os.path.commonpath([target, folder]) == target for folder in real)


def _folders(
    folder: str, left_out: LeftOut, found: set[tuple[int, int]]
) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield a folder and those in it, each once, with what they hold, as `images_in_folder`."""
    folders, links = [folder], deque[str]()
    own: set[tuple[int, int]] = set()
    while folders or links:
        is_link = not folders
        path = links.popleft() if is_link else folders.pop()
        try:
            status = os.stat(path)
            with os.scandir(path) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            if is_exhaustion(error):
                raise
            left_out.add("folders that can't be read", path)
            continue
        key = (status.st_dev, status.st_ino)
        if key in own:
            left_out.add("links to folders that are searched anyway", path)
        elif key in found:
            left_out.add(FOUND_BEFORE, path)
        elif is_link and _is_above(path, (folder, os.path.dirname(path))):
            left_out.add("links to folders that hold the source", path)
        else:
            own.add(key)
            found.add(key)
            files = []
            for entry in entries:
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself
                    is_folder = False
                if not is_folder:
                    files.append(entry)
                elif entry.name.startswith("."):
                    left_out.add("hidden folders", entry.path)
                else:
                    (links if entry.is_symlink() else folders).append(entry.path)
            yield path, files


def images_in_folder(
    folder: str, left_out: LeftOut, found: set[tuple[int, int]] | None = None
) -> list[str]:
    """Return the paths of the image files in a folder and its subfolders, in no special order.

    Symbolic links are followed, but not to folders that hold ``folder`` or the link. A folder that
    several paths lead to is searched once: under its own path, if it lies in ``folder``.

    Args:
        folder: the folder.
        left_out: counts hidden subfolders (a dot begins their names), subfolders found again or
            that can't be read, links to folders above, named pipes, sockets and devices, images in
            formats that are not read, compressed archives, and tars in subfolders.
        found: device and inode number of folders that are not searched again; those that are
            searched are added.
    """
    images: list[str] = []
    for path, files in _folders(folder, left_out, set() if found is None else found):
        for entry in files:
            try:
                is_file = entry.is_file()
            except OSError:  # a link to itself: named when it is read
                is_file = True
            if has_extension(entry.name, EXTENSIONS):
                if is_file or not is_special(entry.path, left_out):
                    images.append(entry.path)
            elif path != folder and has_extension(entry.name, ".tar"):
                left_out.add("tars in subfolders", entry.path)
            else:
                _count_unread(entry.name, entry.path, left_out)
    return images


class TarImage(NamedTuple):
    """An image in a tar.

    Attributes:
        name: of the member, after those of the tars around it: ``class0.tar:1.png``.
        position: of its first byte in the outermost file.
        size: in bytes.
    """

    name: str
    position: int
    size: int


class _Link(NamedTuple):
    target: str


# What a path of a tar holds after extraction: a file as an unnamed image, a tar as the images in
# it, a link, or why it can't be read.
_Content = TarImage | list[TarImage] | _Link | str


def _follow(path: str, contents: Mapping[str, tuple[str, _Content]]) -> _Content:
    """Return what a path leads to, through links to files and to folders."""
    for _ in range(_MAX_LINKS):
        parts = path.split("/")
        for length in range(1, len(parts) + 1):
            link = contents.get("/".join(parts[:length]), ("", ""))[1]
            if isinstance(link, _Link):
                rest = (link.target, *parts[length:])
                path = posixpath.normpath(posixpath.join(*parts[: length - 1], *rest))
                break
        else:
            if path in contents:
                return contents[path][1]
            is_folder = any(other.startswith(f"{path}/") for other in contents)
            return [] if is_folder or path == "." else _NO_TARGET
    return _NO_TARGET


def images_in_tar(file: BinaryIO, where: str, left_out: LeftOut, start: int = 0) -> list[TarImage]:
    """Return the images that extracting a tar gives, those of tars in it too, in no special order.

    A leading slash of a name does not count, as when it is extracted; members whose names lead out
    of the tar by ``..`` are read, too. Of members with one name the last counts. A hard link is the
    member before it that it names; a symbolic link may name any member, by way of other links.

    Args:
        file: an uncompressed tar.
        where: its name, for ``left_out``.
        left_out: counts images that can't be read (links to nothing in the tar, sparse files,
            named pipes and devices), that a later member replaces, in hidden folders or in formats
            that are not read, and compressed archives.
        start: where the tar begins in the outermost file.

    Raises:
        tarfile.TarError: the file is no such tar, or is corrupt.
    """
    contents: dict[str, tuple[str, _Content]] = {}  # path: name of the member, content
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep a kilobyte of each
            path = posixpath.normpath(member.name.lstrip("/"))
            content: _Content
            if member.isdir():
                continue
            if member.issym():
                content = _Link(member.linkname)
            elif member.islnk():
                target = posixpath.normpath(member.linkname.lstrip("/"))
                content = contents.get(target, ("", _NO_TARGET))[1]
            elif member.issparse():
                content = "sparse files"
            elif member.type in tarfile.SUPPORTED_TYPES and not member.isreg():
                content = _SPECIAL
            elif has_extension(member.name, ".tar"):
                content = images_in_tar(
                    tar.extractfile(member),
                    f"{where}:{member.name}",
                    left_out,
                    start + member.offset_data,
                )
            else:
                content = TarImage("", start + member.offset_data, member.size)
            replaced = contents.get(path, (path, content))[1] != content
            if replaced and has_extension(path, EXTENSIONS):
                left_out.add("members that a later one replaces", f"{where}:{member.name}")
            contents[path] = (member.name, content)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes garbage for the end
            raise tarfile.ReadError(f"damaged or cut off at byte {start + tar.offset}")
    images: list[TarImage] = []
    for path, (name, content) in contents.items():
        is_image, is_tar = has_extension(path, EXTENSIONS), has_extension(path, ".tar")
        is_link = isinstance(content, _Link)
        if is_link:
            content = _follow(path, contents)
        # A link that leads out of the tar may be to a folder of images.
        if not (is_image or is_tar or (is_link and "." not in posixpath.basename(path))):
            _count_unread(path, f"{where}:{name}", left_out)
            continue
        if isinstance(content, str):
            left_out.add(content, f"{where}:{name}")
        elif any(part[0] == "." for part in path.split("/")[:-1] if part != ".."):
            left_out.add("images in hidden folders", f"{where}:{name}")
        elif is_image and isinstance(content, TarImage):
            images.append(content._replace(name=name))
        elif is_tar and isinstance(content, list):
            images += [image._replace(name=f"{name}:{image.name}") for image in content]
        elif is_image or is_tar:
            left_out.add("links to files of another kind", f"{where}:{name}")
    return images
