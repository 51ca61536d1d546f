"""The setuptools command that compiles the extension, and the wheel's platform tag."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import setuptools
from setuptools.command.build import build
from setuptools.errors import SetupError

from singer_build import compiling
from singer_build.hashing import build_hash
from singer_build.plan import VARIABLE, BuildNotPossible, Kind, Plan, Toolchain, plan_build
from singer_build.toolchain import detect_toolchain

ROOT = Path(__file__).parents[2]
PACKAGE = "singer_kernels"
RECORD = "_install.json"


@functools.cache
def _toolchain() -> Toolchain:
    return detect_toolchain(ROOT)


def _requested() -> str:
    return os.environ.get(VARIABLE) or "auto"


class Distribution(setuptools.Distribution):
    """A distribution whose wheel has a platform tag only if something is compiled."""

    def has_ext_modules(self) -> bool:
        """Return whether anything is to be compiled."""
        try:
            return plan_build(_toolchain(), _requested()).kind != "none"
        except BuildNotPossible:
            return True  # BuildKernels reports it; an sdist needs no compiler


def _compile(plan: Plan, requested: str, temp: Path) -> tuple[Plan, tuple[Path, ...]]:
    """Compile; under ``auto`` a failed build falls back from cuda to cpu to none."""
    kinds: list[Kind] = ["cuda", "cpu"] if plan.kind == "cuda" else ["cpu"]
    reasons = [plan.reason] if plan.reason else []
    for kind in kinds:
        try:
            built = compiling.build(ROOT, temp, _toolchain(), kind)
        except compiling.CompileError as error:
            if requested != "auto":
                raise SetupError(f"{VARIABLE}: got {requested!r}, which failed: {error}") from error
            reasons.append(f"the build for {kind} failed: {error}")
        else:
            return Plan(kind, "; ".join(filter(None, [*reasons, built.reason]))), built.files
    return Plan("none", "; ".join(reasons)), ()


class BuildKernels(setuptools.Command):
    """Compile the extension if possible; record the result and reason in the package."""

    description = "compile the C++ and CUDA part of singer_kernels"
    user_options: ClassVar[list[Any]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        """Declare the options."""
        self.build_lib: str | None = None
        self.build_temp: str | None = None
        self.written: list[str] = []

    def finalize_options(self) -> None:
        """Take the directories from the ``build`` command."""
        self.set_undefined_options(
            "build", ("build_lib", "build_lib"), ("build_temp", "build_temp")
        )

    def _folder(self) -> Path:
        return (ROOT if self.editable_mode else Path(self.build_lib or "").absolute()) / PACKAGE

    def run(self) -> None:
        """Build into the wheel, or into the source tree for an editable install."""
        requested = _requested()
        try:
            plan = plan_build(_toolchain(), requested)
        except BuildNotPossible as error:
            raise SetupError(str(error)) from error
        files: tuple[Path, ...] = ()
        if plan.kind != "none":
            temp = Path(self.build_temp or "").absolute()
            plan, files = _compile(plan, requested, temp / PACKAGE)
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [folder / compiling.LIBRARY, folder / RECORD, *folder.glob("_build.*")]:
            stale.unlink(missing_ok=True)
        for path in files:
            shutil.move(path, folder / path.name)
        record = {"requested": requested, "built": plan.kind, "reason": plan.reason}
        record["sources"] = build_hash(ROOT, [])
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self.written = [*(path.name for path in files), RECORD]
        note = f"; {plan.reason}" if plan.reason else ""
        print(f"{PACKAGE} extension: built {plan.kind} (requested {requested}){note}", flush=True)

    def get_source_files(self) -> list[str]:
        """Return no files: MANIFEST.in lists the sources."""
        return []

    def get_outputs(self) -> list[str]:
        """Return the paths of the built files in the wheel's directory."""
        return [str(Path(self.build_lib or "", PACKAGE, name)) for name in self.written]

    def get_output_mapping(self) -> dict[str, str]:
        """Map the built files to the source tree, for an editable install."""
        if not self.editable_mode:
            return {}
        names = [str(Path(PACKAGE, name)) for name in self.written]
        return dict(zip(self.get_outputs(), names, strict=True))


class Build(build):
    """The ``build`` command, with ``build_kernels`` added."""

    sub_commands: ClassVar[list[Any]] = [*build.sub_commands, ("build_kernels", None)]
