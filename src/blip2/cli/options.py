"""Options that several commands share, declared once."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
MODEL = "run folder, preset, Hugging Face folder or hub id, or LAVIS .pth"
DEFAULT_MODEL = "$BLIP2_MODEL, else the newest in runs/, else tiny, which comes with the package"


def add_model(command: argparse.ArgumentParser, default: str = DEFAULT_MODEL) -> None:
    """`--model` and how it is loaded.

    Args:
        default: the model used without `--model`, as the help says it.
    """
    command.add_argument("--model", help=f"{MODEL} (default: {default})")
    add_loading(command)


def add_loading(command: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    add_towers(command)
    command.add_argument(
        "--quantize", choices=("int8", "nf4", "none"), help="weights of the language model (default: as it was trained)"
    )
    command.add_argument("--batch", type=int, default=16, help="images at a time (default: %(default)s)")
    add_device(command)


def add_device(command: argparse.ArgumentParser) -> None:
    """`--dtype` and `--device`."""
    command.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: bf16 where it is fast)"
    )
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def add_towers(command: argparse.ArgumentParser) -> None:
    """`--vision` and `--language`."""
    for option, tower in (("--vision", "image encoder"), ("--language", "language model")):
        command.add_argument(option, metavar="NAME", help=f"{tower} in place of the one that the checkpoint names")


def add_json(command: argparse._ActionsContainer, printed: str = "one JSON object") -> None:
    """`--json`."""
    command.add_argument("--json", action="store_true", help=f"{printed} on stdout")


def add_beams(command: argparse.ArgumentParser) -> None:
    """`--beams`."""
    command.add_argument("--beams", type=int, default=5, help="beam width (default: %(default)s)")


def add_frames(command: argparse.ArgumentParser) -> None:
    """`--frames`."""
    command.add_argument(
        "--frames", type=int, metavar="N", help="images of a film (default: the run's vision.frames, else 4)"
    )


def add_shots(command: argparse.ArgumentParser) -> None:
    """`--shots`, examples from a file."""
    command.add_argument(
        "--shots",
        metavar="FILE.jsonl",
        help="examples to go by, a line each: image (relative to the file) with caption, or question and answer",
    )
