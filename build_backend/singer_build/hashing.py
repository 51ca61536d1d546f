"""The hash of the extension's sources; ``singer_kernels.extension`` runs this file in a clone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def build_hash(root: Path, flags: Iterable[str]) -> str:
    """Return the SHA-256 of all sources in ``csrc`` (names and bytes, sorted) and the flags."""
    digest = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in {".cpp", ".h", ".cu", ".cuh"}:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update("\0".join(flags).encode())
    return digest.hexdigest()
