"""Command-line options of `blip2 evaluate`; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Parsers = argparse._SubParsersAction


def add_command(commands: Parsers[argparse.ArgumentParser], add_model: Callable[..., None]) -> None:
    """`blip2 evaluate TASK`; `add_model(parser, named=...)` adds what says which model."""
    evaluate = commands.add_parser("evaluate", help="captioning, VQA or retrieval on a data set, as the paper measures")
    tasks = evaluate.add_subparsers(dest="task", metavar="TASK", required=True)
    caption = tasks.add_parser("caption", help="BLEU, METEOR, ROUGE-L, CIDEr, SPICE against all references")
    vqa = tasks.add_parser("vqa", help="VQA accuracy over people's answers, or exact match")
    retrieval = tasks.add_parser("retrieval", help="recall by ITC, and re-ranked by ITM, both ways")
    prompts = tasks.add_parser("prompts", help="instructed generation: prompts of a file, side by side over models")
    prompts.add_argument("--prompts", required=True, metavar="FILE", help="one prompt per line")
    prompts.add_argument(
        "--models", required=True, nargs="+", metavar="MODEL", help="one or more, as --model elsewhere"
    )
    for task in (caption, vqa, retrieval, prompts):
        task.add_argument("--data", required=True, help="named set, shards, folder or JSONL file")
        task.add_argument("--split", help="of a named set")
        task.add_argument("--limit", type=int, help="first N images only")
        task.add_argument("--out", metavar="DIR", help="default: runs/evaluate/TASK-MODEL-DATA; resumed where it is")
        task.add_argument("--json", action="store_true", help="one JSON object last on stdout")
        add_model(task, named=task is not prompts)
        task.set_defaults(run=_run)
    for task in (caption, vqa, retrieval):
        task.add_argument("--skip-bad", action="store_true", help="evaluate without the samples that cannot be used")
    for task in (caption, vqa, prompts):
        for option, kind in (
            ("beams", int),
            ("min-tokens", int),
            ("max-tokens", int),
            ("length-penalty", float),
            ("repetition-penalty", float),
        ):
            task.add_argument(f"--{option}", type=kind, help="default: the paper's")
    caption.add_argument("--rerank", type=int, metavar="N", help="of N captions the most similar by ITC (default: 0)")
    caption.add_argument("--prompt", help="text that the caption continues (default: the run's)")
    for task in (caption, vqa):
        task.add_argument("--shots", type=int, default=0, metavar="K", help="put K examples in front of every image")
        task.add_argument(
            "--shots-data", metavar="DATA", help="where they are drawn from (default: the train split of a named set)"
        )
        task.add_argument("--shots-seed", type=int, default=0, metavar="N", help="of the draw (default: %(default)s)")
    vqa.add_argument("--questions", type=int, metavar="N", help="first N questions only")
    vqa.add_argument("--shuffle", action="store_true", help="ask about another image: what the language alone knows")
    vqa.add_argument("--candidates", metavar="FILE|data", help="rank these answers (one per line) instead of writing")
    vqa.add_argument(
        "--lemmas",
        choices=("auto", "on", "off"),
        default="auto",
        help="compare base forms of words; auto does for OK-VQA, whose answers are such (default: %(default)s)",
    )
    retrieval.add_argument("-k", type=int, default=128, help="candidates re-ranked per query (default: %(default)s)")
    retrieval.add_argument(
        "--itc-weight",
        default="1",
        metavar="W|auto",
        help="of the ITC similarity beside the ITM logit; 1 as LAVIS, auto is 1 / temperature (default: %(default)s)",
    )


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    if options.task == "prompts":
        from blip2.evaluation.prompts import prompts_command

        return prompts_command(options)
    from blip2.evaluation.command import evaluate_command

    return evaluate_command(options)
