"""Which images a folder or a tar file holds, and what of it is left out."""

from __future__ import annotations

import logging
import os
from collections import deque

_logger = logging.getLogger("singer")

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")

_MAX_NAMES_SHOWN = 5

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
        if len(names) < _MAX_NAMES_SHOWN:
            names.append(name)

    def log(self, where: str) -> None:
        """Warn, in one line, of what was left out of a source, if anything was."""
        reasons = []
        for reason, count in self._counts.items():
            more = ", …" if count > _MAX_NAMES_SHOWN else ""
            reasons.append(f"{reason}: {count} ({', '.join(self._names[reason])}{more})")
        if reasons:
            _logger.warning("data.source: %s: left out: %s", where, "; ".join(reasons))


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


def images_in_folder(folder: str, left_out: LeftOut) -> list[str]:
    """Return the paths of the image files in a folder and its subfolders, in no special order.

    Symbolic links are followed. A folder that several paths lead to is searched once: under its
    own path, if it lies in ``folder``.

    Args:
        folder: the folder.
        left_out: counts hidden subfolders (a dot begins their names), subfolders found again or
            that can't be read, named pipes, sockets and devices.
    """
    images: list[str] = []
    searched: set[tuple[int, int]] = set()
    folders, links = [folder], deque[str]()
    while folders or links:
        path = folders.pop() if folders else links.popleft()
        try:
            status = os.stat(path)
            with os.scandir(path) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError:
            left_out.add("folders that can't be read", path)
            continue
        if (status.st_dev, status.st_ino) in searched:
            left_out.add("links to folders that are searched anyway", path)
            continue
        searched.add((status.st_dev, status.st_ino))
        for entry in entries:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder, is_file = False, True
            if is_folder and entry.name.startswith("."):
                left_out.add("hidden folders", entry.path)
            elif is_folder:
                (links if entry.is_symlink() else folders).append(entry.path)
            elif has_extension(entry.name, EXTENSIONS) and (
                is_file or not is_special(entry.path, left_out)
            ):
                images.append(entry.path)
    return images
