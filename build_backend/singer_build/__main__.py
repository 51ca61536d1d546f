"""``PYTHONPATH=build_backend python -m singer_build``: compile beside the sources.

For work on ``csrc/``: without setuptools, without installing. ``SINGER_BUILD_EXT`` and the other
variables hold as in an installation, but nothing falls back on less.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from singer_build import compiling
from singer_build.decision import VARIABLE, ImpossibleError, decide
from singer_build.discovery import look_around

ROOT = Path(__file__).parents[2]


def main() -> str | None:
    """Build; return what went wrong, or None."""
    requested = os.environ.get(VARIABLE) or "auto"
    found = look_around(ROOT)
    try:
        plan = decide(found, requested)
        if plan.kind == "none":
            return plan.reason
        with tempfile.TemporaryDirectory() as folder:
            built = compiling.build(ROOT, Path(folder), found, plan.kind)
            for path in built.files:
                shutil.move(path, ROOT / "singer_kernels" / path.name)
    except (ImpossibleError, compiling.CompileError) as error:
        return str(error)
    reason = "; ".join(filter(None, [plan.reason, built.reason]))
    record = {"requested": requested, "built": plan.kind, "reason": reason}
    text = json.dumps(record, indent=2) + "\n"
    (ROOT / "singer_kernels" / "_install.json").write_text(text, encoding="utf-8")
    print(f"built {plan.kind}{'; ' if reason else ''}{reason}")
    return None


if __name__ == "__main__":
    sys.exit(main())
