"""``PYTHONPATH=build_backend python -m singer_build``: compile in the source tree.

For development of ``csrc/``, without setuptools or an installation. ``SINGER_BUILD_EXT`` and the
other variables apply as in an installation, but a failed build does not fall back.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from singer_build import compiling
from singer_build.hashing import build_hash
from singer_build.plan import VARIABLE, BuildNotPossible, plan_build
from singer_build.toolchain import detect_toolchain

ROOT = Path(__file__).parents[2]


def main() -> str | None:
    """Build; return the error message, or None."""
    requested = os.environ.get(VARIABLE) or "auto"
    toolchain = detect_toolchain(ROOT)
    try:
        plan = plan_build(toolchain, requested)
        if plan.kind == "none":
            return plan.reason
        with tempfile.TemporaryDirectory() as folder:
            built = compiling.build(ROOT, Path(folder), toolchain, plan.kind)
            for path in built.files:
                shutil.move(path, ROOT / "singer_kernels" / path.name)
    except (BuildNotPossible, compiling.CompileError) as error:
        return str(error)
    reason = "; ".join(filter(None, [plan.reason, built.reason]))
    record = {"requested": requested, "built": plan.kind, "reason": reason}
    record["sources"] = build_hash(ROOT, [])
    text = json.dumps(record, indent=2) + "\n"
    (ROOT / "singer_kernels" / "_install.json").write_text(text, encoding="utf-8")
    print(f"built {plan.kind}{'; ' if reason else ''}{reason}")
    return None


if __name__ == "__main__":
    sys.exit(main())
