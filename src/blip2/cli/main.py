"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from blip2 import __version__
from blip2.errors import Blip2Error, one_line

# Each is a module of this folder with `add_parser(commands)`; it imports what it runs inside its functions.
COMMANDS = (
    *("train", "estimate", "recipes", "caption", "ask", "chat", "evaluate", "ablate", "convert", "average", "data"),
    *("capfilt", "index", "search", "explain", "doctor", "serve", "demo", "demo_train", "completion"),
)
EXAMPLES = """\
examples:
  blip2 demo                                        the packaged tiny model on a few images
  blip2 caption photos/                             captions by that model
  blip2 train tiny/stage1 --out runs/s1
  blip2 train tiny/stage2 --init runs/s1 --out runs/s2 --optim.lr 2e-4
  blip2 caption photos/ --model runs/s2 --out captions.jsonl
  blip2 caption dog.jpg --model Salesforce/blip2-opt-2.7b
  blip2 evaluate caption --model runs/s2 --data flickr8k:dev
  blip2 convert runs/s2 s2-hf --to hf
  blip2 index build photos/ --out photos.index --model runs/s1
  blip2 search photos.index "two dogs in the snow"
  blip2 explain dog.jpg "a dog in the grass" --model runs/s1 --out report.html
  blip2 serve --model runs/s2 --index photos.index
  blip2 ask dog.jpg "What is the dog doing?" --model runs/s2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (2 for anything the user can correct)."""
    # transformers imports torchao where it is installed, and that warns of kernels it could not load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments = sys.argv[1:] if arguments is None else arguments
    named = [name for name in COMMANDS if arguments and arguments[0] == name.replace("_", "-")]
    parser = make_parser(named or COMMANDS)
    options, rest = parser.parse_known_args(arguments)
    if "settings" in options:  # of the commands that take any setting of a run
        options.settings = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if "model" in options:
        # what the imports make is kept: searching it for garbage is a fifth of a start, and `load_model` ends it
        gc.disable()
    try:
        return int(options.run(options))
    except Blip2Error as error:
        print(f"blip2: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("blip2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"blip2: {one_line(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
        return 2
    finally:
        gc.enable()


def make_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of these commands."""
    parser = argparse.ArgumentParser(
        prog="blip2",
        description="Pretrain, evaluate and use BLIP-2 (arXiv 2301.12597).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"blip2 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        importlib.import_module(f"blip2.cli.{name}").add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
