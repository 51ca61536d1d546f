"""The command line: ``singer distill`` and ``singer demo``."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

from singer.errors import (
    DEBUG_HINT,
    DEBUG_VARIABLE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    SharedError,
    SingerError,
    StoppedError,
    typed_line,
)
from singer.io import optional_output
from singer_kernels import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="singer",
        description="Distil a big Vision Transformer into a small one with SiNGER.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    distill = commands.add_parser(
        "distill", help="train one or several students", allow_abbrev=False
    )
    distill.add_argument(
        "--config",
        required=True,
        action="append",
        metavar="FILE",
        help="YAML file; may be given several times: later files override earlier ones",
    )
    distill.add_argument(
        "--resume",
        action="store_true",
        help="resume from the newest checkpoint in the output directory; start if there is none",
    )
    distill.add_argument(
        "--force",
        action="store_true",
        help="with --resume: even if the configuration, the images or the number of processes "
        "changed",
    )
    distill.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides the files, for example train.lr=3e-4",
    )

    demo = commands.add_parser(
        "demo", help="DINOv2 ViT-S/14 teaches a ViT-Tiny, in minutes", allow_abbrev=False
    )
    demo.add_argument("--steps", type=int, default=150, metavar="N", help="default: %(default)s")
    demo.add_argument(
        "--output", default="runs/demo", metavar="DIR", help="a new directory; default: %(default)s"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument(
        "--compare",
        action="store_true",
        help="also train FitNet, on the same data in the same order",
    )
    demo.add_argument(
        "--teacher", metavar="NAME", help="a timm model with pretrained weights (needs its hub)"
    )
    return parser


def _distill(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from singer.config.loading import load_config
    from singer.engine.progress import summary_table
    from singer.engine.run import train

    if arguments.force and not arguments.resume:
        raise SingerError("--force: goes with --resume")
    config = load_config(arguments.config, arguments.overrides)
    console = Console()
    results = train(config, console, resume=arguments.resume, force=arguments.force)
    if not _is_main_process():
        return
    for result in results:
        rows = {name: f"{value:.5g}" for name, value in result.losses.items()}
        rows["steps"] = f"{result.steps}, in {result.seconds:.1f} s"
        rows["images per second"] = f"{result.images_per_second:.1f}"
        rows["student"] = str(result.folder / "student.safetensors")
        console.print(summary_table("losses are means over the last tenth of the steps", rows))


def _demo(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from singer.demo import DemoOptions, run_demo

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    run_demo(DemoOptions(**options), Console())


def _without_dashes(options: Sequence[str]) -> str:
    """Return how to write options that are keys of the configuration."""
    from singer.config.schema import Config

    keys = [option.lstrip("-").partition("=") for option in options]
    written = [
        f"{key}={value if equals else 'VALUE'}"
        for key, equals, value in keys
        if key.partition(".")[0] in Config.model_fields
    ]
    return f"; write {' '.join(written)}" if written else ""


def _missing_requirements() -> list[str]:
    """Return the required packages that are not installed, as after ``pip install --no-deps``."""
    missing = []
    try:
        requirements = metadata.requires("singer-kernels") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        return missing
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        if name is None or "extra ==" in requirement:
            continue
        try:
            metadata.version(name.group())
        except metadata.PackageNotFoundError:
            missing.append(name.group())
    return missing


def _leave_group() -> None:
    """Destroy the process group, where all ranks end; otherwise torch warns."""
    torch = sys.modules.get("torch")  # not loaded before the configuration is read
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _print_traceback() -> None:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()


def _is_main_process() -> bool:
    return (os.environ.get("RANK") or "0").strip() in ("0", "-1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0; 2 for an error; 75 when a signal of ``STOP_SIGNALS`` stopped a run that
        can be resumed; 130 after Ctrl-C. (70: another rank of the run has died.)
    """
    with optional_output():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    if missing := _missing_requirements():
        print(
            f"singer: error: not installed: {', '.join(missing)}; pip install . without --no-deps "
            "installs them (singer_kernels alone needs only torch)",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)  # argparse takes only consecutive overrides
    is_distill = arguments.command == "distill"
    unknown = [text for text in rest if text.startswith("-") or not is_distill]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_without_dashes(unknown)}")
    if is_distill:
        arguments.overrides += rest
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("singer").setLevel(logging.INFO)
    logging.getLogger("singer_kernels").setLevel(logging.INFO)
    try:
        {"distill": _distill, "demo": _demo}[arguments.command](arguments)
    except SingerError as error:
        if _is_main_process() or not isinstance(error, SharedError):
            print(f"singer: error: {error}", file=sys.stderr)
            _print_traceback()
        if isinstance(error, SharedError):
            _leave_group()
        return EXIT_USER_ERROR
    except StoppedError as stopped:
        if _is_main_process() or not stopped.is_shared:
            advice = "; go on with the same command and --resume"
            print(
                f"singer: {stopped}{advice if arguments.command == 'distill' else ''}",
                file=sys.stderr,
            )
        if stopped.is_shared:
            _leave_group()
        return EXIT_INTERRUPTED if stopped.signal == "SIGINT" else EXIT_STOPPED
    except KeyboardInterrupt:
        print("singer: interrupted; what was saved before stays", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        print(f"singer: error: {typed_line(error)} ({DEBUG_HINT})", file=sys.stderr)
        _print_traceback()
        return EXIT_USER_ERROR
    _leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
