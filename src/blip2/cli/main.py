"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from blip2 import __version__
from blip2.cli import capfilt, completion, data, evaluate, explain, index, serve
from blip2.errors import Blip2Error

EXAMPLES = """\
examples:
  blip2 demo                                        the packaged tiny model on a few photographs
  blip2 caption photos/                             captions by that model
  blip2 train tiny/stage1 --out runs/s1
  blip2 train tiny/stage2 --init runs/s1 --out runs/s2 --optim.lr 2e-4
  blip2 caption photos/ --model runs/s2 --out captions.jsonl
  blip2 caption dog.jpg --model Salesforce/blip2-opt-2.7b
  blip2 evaluate caption --model runs/s2 --data flickr8k:dev
  blip2 convert runs/s2 bridge-hf --to hf
  blip2 index build photos/ --out photos.index --model runs/s1
  blip2 search photos.index "two dogs in the snow"
  blip2 explain dog.jpg "a dog in the grass" --model runs/s1 --out report.html
  blip2 serve --model runs/s2 --index photos.index
  blip2 ask dog.jpg "What is the dog doing?" --model runs/s2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (2 for anything the user can mend)."""
    # transformers imports torchao where it is installed, and that tells of kernels it could not load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("train", "estimate"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(options.run(options, rest))
    except Blip2Error as error:
        print(f"blip2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("blip2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip2",
        description="Pretrain, evaluate and use BLIP-2 (arXiv 2301.12597).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"blip2 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_use(commands)
    evaluate.add_command(commands, _add_model)
    _add_ablate(commands)
    _add_convert(commands)
    _add_average(commands)
    data.add_command(commands)
    capfilt.add_command(commands)
    index.add_commands(commands, _add_model)
    explain.add_command(commands, _add_model)
    doctor = commands.add_parser("doctor", help="versions, devices, memory, and what is missing for which feature")
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")
    doctor.set_defaults(run=_doctor)
    serve.add_command(commands, _add_model)
    demo = commands.add_parser("demo", help="caption, question and search photographs with the packaged tiny model")
    demo.add_argument("photos", nargs="*", metavar="PHOTOS", help="folders or files (default: those in scikit-image)")
    demo.add_argument("--out", default="runs/demo", help="folder of report and index (default: %(default)s)")
    demo.set_defaults(run=_demo)
    demo_train = commands.add_parser("demo-train", help="train both stages on embedded defaults (about 10 minutes)")
    demo_train.add_argument("--out", default="runs/demo-train", help="folder of the two runs (default: %(default)s)")
    demo_train.set_defaults(run=_demo_train)
    completion.add_command(commands, parser)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        add_help=False,
        help="train a recipe, or resume a run",
        usage="blip2 train RECIPE|CONFIG.yaml|RUN [--data D] [--out RUN] [--init RUN] [--steps N] [--batch N] "
        "[--SETTING VALUE ...]",
        description="Train a recipe (see `blip2 recipes`), the config.yaml of an earlier run, or resume a run folder. "
        "Every setting can be changed by its dotted name; `blip2 train RECIPE --help` lists them.",
    )
    train.add_argument("recipe", nargs="?", help="recipe, config.yaml or run folder")
    train.add_argument("-h", "--help", action="store_true", help="with a recipe: list all its settings")
    train.set_defaults(run=_train, parser=train)
    estimate = commands.add_parser(
        "estimate", help="parameters and memory of a recipe, without any weights; takes --SETTING VALUE too"
    )
    estimate.add_argument("recipe", help="recipe, config.yaml or run folder")
    estimate.add_argument("--json", action="store_true", help="one JSON object on stdout")
    estimate.set_defaults(run=_estimate)
    recipes = commands.add_parser("recipes", help="list the recipes")
    recipes.set_defaults(run=_recipes)


def _add_use(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    caption = commands.add_parser("caption", help="caption images or folders of images")
    caption.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    caption.add_argument("--prompt", help="text that the caption continues (default: the run's)")
    caption.add_argument("--num", type=int, default=1, help="captions per image (default: %(default)s)")
    caption.add_argument("--min-tokens", type=int, default=8, help="of a caption (default: %(default)s)")
    caption.add_argument("--max-tokens", type=int, default=30, help="of a caption (default: %(default)s)")
    caption.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is none (default: %(default)s)")
    caption.add_argument("--sample", action="store_true", help="nucleus sampling instead of beam search")
    caption.add_argument("--top-p", type=float, default=0.9, help="of the sampling (default: %(default)s)")
    caption.add_argument("--rerank", type=int, default=0, metavar="N", help="of N captions the most similar by ITC")
    where = caption.add_mutually_exclusive_group()
    where.add_argument("--json", action="store_true", help="one JSON object per image on stdout")
    where.add_argument("--out", metavar="FILE.jsonl", help="append to a file; images already in it are skipped")
    where.add_argument("--sidecar", action="store_true", help="write IMAGE.txt beside each image that has none")
    caption.set_defaults(run=_caption)
    ask = commands.add_parser("ask", help="ask a question about an image")
    ask.add_argument("image")
    ask.add_argument("question")
    ask.add_argument("--json", action="store_true", help="one JSON object on stdout")
    ask.set_defaults(run=_ask)
    chat = commands.add_parser("chat", help="ask about an image, question after question")
    chat.add_argument("image")
    chat.add_argument("--beams", type=int, default=5, help="beam width (default: %(default)s)")
    chat.add_argument("--max-tokens", type=int, default=20, help="of an answer (default: %(default)s)")
    chat.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is none (default: %(default)s)")
    chat.set_defaults(run=_chat)
    _add_model(chat)
    for command in (caption, ask):
        command.add_argument("--beams", type=int, default=5, help="beam width (default: %(default)s)")
        command.add_argument(
            "--shots",
            metavar="FILE.jsonl",
            help="examples to go by, a line each: image (relative to the file) with caption, or question and answer",
        )
        _add_model(command)


def _add_model(command: argparse.ArgumentParser, *, named: bool = True) -> None:
    """Which model and how it is loaded; `named`: with `--model` itself."""
    if named:
        command.add_argument(
            "--model",
            help="run folder, preset, Hugging Face folder or hub id, or LAVIS .pth "
            "(default: $BLIP2_MODEL, else the newest in runs/, else tiny, which comes with the package)",
        )
    _add_towers(command)
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the frozen towers")
    command.add_argument(
        "--quantize", choices=("int8", "nf4", "none"), help="weights of the language model (default: as it was trained)"
    )
    command.add_argument("--batch", type=int, default=16, help="images at a time (default: %(default)s)")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def _add_ablate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ablate = commands.add_parser("ablate", help="what stage 1, ITM, ITG and the Q-Former are worth: a table and a plot")
    ablate.add_argument("base", help="whose recipes: tiny")
    ablate.add_argument(
        "--data", default="flickr8k", help="named set, or folder with train/ and dev/ (default: %(default)s)"
    )
    ablate.add_argument(
        "--out", default="runs/ablate", metavar="DIR", help="resumed where it is (default: %(default)s)"
    )
    ablate.add_argument(
        "--steps1", type=int, default=128, help="steps of stage 1, 32 pairs each (default: %(default)s)"
    )
    ablate.add_argument(
        "--steps2", type=int, default=128, help="steps of stage 2, 32 pairs each (default: %(default)s)"
    )
    ablate.add_argument("--images", type=int, default=250, help="dev images (default: %(default)s)")
    ablate.add_argument("--only", metavar="NAME,NAME", help="only these variants")
    ablate.add_argument("--json", action="store_true", help="one JSON list last on stdout")
    ablate.set_defaults(run=_ablate)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser(
        "convert",
        help="write a checkpoint as a run of ours, for transformers, or for LAVIS",
        description="Reads a run of ours, a Hugging Face folder or hub id, or a LAVIS .pth; writes any of the three, "
        "reads it back and compares every tensor.",
    )
    convert.add_argument("source", metavar="SRC", help="run, Hugging Face folder or hub id, preset, or LAVIS .pth")
    convert.add_argument("target", metavar="DST", help="new folder (.pth file for lavis)")
    convert.add_argument(
        "--to", required=True, choices=("blip2", "hf", "lavis", "slim"), help="slim: a run of ours to hand on, in bf16"
    )
    convert.add_argument(
        "--words", metavar="DATA", help="slim: only embeddings of words that recur in the captions of DATA"
    )
    convert.add_argument(
        "--stage1", metavar="NAME", help="slim: folder beside it that embeddings and matches come from"
    )
    convert.add_argument("--json", action="store_true", help="one JSON object on stdout")
    _add_towers(convert)
    convert.set_defaults(run=_convert)


def _add_average(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    average = commands.add_parser("average", help="the mean of runs of one model, as one run (model soups)")
    average.add_argument("target", metavar="DST", help="new folder")
    average.add_argument("runs", nargs="+", metavar="RUN", help="two or more")
    average.add_argument("--weights", nargs="+", type=float, metavar="W", help="how much each counts (default: alike)")
    average.set_defaults(run=_average)


def _add_towers(command: argparse.ArgumentParser) -> None:
    for option, what in (("--vision", "image encoder"), ("--language", "language model")):
        command.add_argument(option, metavar="NAME", help=f"{what} in place of the one that the checkpoint names")


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import replace
    from pathlib import Path

    from blip2.cli.overrides import base_config, help_text, with_overrides

    if options.recipe is None:
        options.parser.print_help()
        return 0 if options.help else 2
    base = base_config(options.recipe)
    if Path(options.recipe).is_dir():
        base = replace(base, out=options.recipe)
    if options.help:
        print(help_text(base))
        return 0
    config = with_overrides(base, rest)
    from blip2.training.run import train

    return train(config)


def _estimate(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.cli.overrides import base_config, with_overrides
    from blip2.estimate.measure import estimate

    print(estimate(with_overrides(base_config(options.recipe), rest), as_json=options.json))
    return 0


def _recipes(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.recipes import RECIPES

    for name, function in RECIPES.items():
        print(f"{name:<22} {(function.__doc__ or '').strip().splitlines()[0]}")
    return 0


def _caption(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.cli.caption import caption_command

    return caption_command(options)


def _ask(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.cli.caption import ask_command

    return ask_command(options)


def _chat(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.cli.chat import chat_command

    return chat_command(options)


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.cli.doctor import doctor_command

    return doctor_command(options)


def _ablate(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.training.ablate import ablate_command

    return ablate_command(options)


def _convert(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.weights.convert.pipeline import convert_command

    return convert_command(options)


def _average(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.weights.convert.average import average_command

    return average_command(options)


def _demo(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.cli.demo import demo

    return demo(options.photos, options.out)


def _demo_train(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.cli.demo_train import demo_train

    return demo_train(options.out)


if __name__ == "__main__":
    sys.exit(main())
