"""Does a model learn more after CapFilt? Half of the captions replaced by another image's, then equal budgets.

    python -m benchmarks.experiments.capfilt_training --work runs/capfilt-training [--steps 200] [--out FILE.json]

Every image of `--data` has several captions, and half of all captions are exchanged for another image's. A model is
trained on that (`noisy`). Its ITC then ranks the very data that it was trained on (`blip2 capfilt --samples 0`), as
BLIP's filter does: nothing that knows the clean pairs takes part, and no caption is drawn. A second model is trained
from scratch on what is left (`filtered`). Beside them `noisy, twice` has the steps of ranker and model together, and
`clean` shows what no noise would give. All have the same seed, recipe (`tiny/search`) and batch, and are measured on
dev images that no one trained on.

Can be stopped: finished runs and shards are not done again. Prints a table, and writes a JSON object with `--out`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip2.data.collection import RawSample
from blip2.data.shards.reader import read_raw
from blip2.data.shards.writer import write_shard
from blip2.data.sources import shard_paths

Captions = dict[str, tuple[str, ...]]  # by key
RECALLS = ("r1", "r5", "r10")


@dataclass(frozen=True)
class Arm:
    """A model to train: on which data, with how many times the budget."""

    name: str
    data: str
    budget: int = 1


def main() -> None:
    """Make the data, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of data and runs")
    parser.add_argument("--data", default="flickr8k:train", help="shards to spoil (default: %(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help="only the first N of them (default: all)")
    parser.add_argument("--dev", default="flickr8k:dev", help="default: %(default)s")
    parser.add_argument("--dev-images", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="of the budget (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="pairs a step (default: %(default)s)")
    parser.add_argument("--keep", type=int, default=2, help="captions that CapFilt keeps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a model for each (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="noisy, filtered, 'noisy, twice', clean")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    noisy, filtered = options.work / "noisy", options.work / "filtered"
    truth = make_noisy(options.data, noisy, options.images)
    arms = [
        Arm("noisy", str(noisy)),
        Arm("filtered", str(filtered)),
        Arm("noisy, twice", str(noisy), 2),
        Arm("clean", options.data),
    ]
    wanted = [arm for arm in arms if options.only is None or arm.name in options.only]
    ranker = folder_of(options.work, arms[0], options.seeds[0])
    results = []
    for arm in wanted:
        if arm.name == "filtered":
            train(arms[0], options, options.seeds[0])
            capfilt(noisy, filtered, ranker, options.keep)
        results += [{"arm": arm.name, "seed": seed, **train(arm, options, seed)} for seed in options.seeds]
    report = {
        "data": options.data,
        "images": len(truth),
        "steps": options.steps,
        "batch": options.batch,
        "keep": options.keep,
        "dev": options.dev,
        "dev_images": options.dev_images,
        "ranker": f"the ITC of `noisy`, seed {options.seeds[0]}",
        "noisy": quality(noisy, truth),
        "filtered": quality(filtered, truth) if filtered.is_dir() else None,
        "runs": results,
        "torch": torch.__version__,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))


def make_noisy(spec: str, out: Path, images: int | None = None, seed: int = 0) -> Captions:
    """Shards in which half of the captions are another image's; the true ones are returned.

    The spoilt captions change places in one cycle, so that every text stays as frequent as it was.
    """
    entries: dict[Path, list[RawSample]] = {}
    left = images if images is not None else sys.maxsize
    for path in shard_paths(spec):
        entries[path] = _samples(path)[:left]
        left -= len(entries[path])
    paths = [path for path in entries if entries[path]]
    rows = [one for path in paths for one in entries[path]]
    truth = {one.key: tuple(one.entry["captions"]) for one in rows}
    places = [(one.key, n) for one in rows for n in range(len(one.entry["captions"]))]
    rng = np.random.default_rng(seed)
    moved = [places[n] for n in rng.permutation(len(places))[: len(places) // 2]]
    texts = {key: list(own) for key, own in truth.items()}
    for (key, n), (other, m) in zip(moved, [*moved[1:], *moved[:1]], strict=True):
        texts[key][n] = truth[other][m]
    out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if not (out / path.name).exists():
            write_shard(
                out / path.name,
                (
                    (sample.key, sample.read(), {**sample.entry, "captions": texts[sample.key]})
                    for sample in entries[path]
                ),
            )
    return truth


def capfilt(source: Path, out: Path, ranker: Path, keep: int) -> None:
    """`blip2 capfilt` without a captioner: the best `keep` texts of every image."""
    settings = ["--captioner", str(ranker), "--samples", "0", "--keep", str(keep), "--batch", "32"]
    blip2("capfilt", str(source), str(out), *settings)


def folder_of(work: Path, arm: Arm, seed: int) -> Path:
    """Run folder of an arm."""
    return work / f"{arm.name.replace(', ', '-')}-{seed}"


def train(arm: Arm, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What the run says of dev at its end; trains where it is not done yet."""
    out, steps = folder_of(options.work, arm, seed), options.steps * arm.budget
    if last(out, steps) is None:
        blip2(
            *("train", "tiny/search", "--data", arm.data, "--data.dev", options.dev, "--out", str(out)),
            *("--steps", str(steps), "--batch", str(options.batch), "--train.seed", str(seed)),
            *("--train.eval_every", str(steps), "--train.save_every", "50"),
            *("--eval.images", str(options.dev_images), "--eval.samples", "0"),
            *(("--data.limit", str(options.images)) if options.images is not None else ()),
        )
    record = last(out, steps)
    assert record is not None, f"{out}: no dev line at step {steps}"
    return {"steps": steps, "pairs": steps * options.batch, **record}


def last(out: Path, step: int) -> dict[str, Any] | None:
    """Dev numbers of a run at a step."""
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    trained = [line for line in lines if line["kind"] == "train"]
    for line in lines:
        if line["kind"] == "dev" and line["step"] == step:
            numbers = {name: round(v, 3) for name, v in line.items() if isinstance(v, float)}
            return {**numbers, "step_seconds": round(float(np.median([t["time"] for t in trained])), 3)}
    return None


def _samples(shard: Path) -> list[RawSample]:
    return [sample for sample in read_raw(shard) if isinstance(sample, RawSample)]


def quality(folder: Path, truth: Captions) -> dict[str, Any]:
    """How many captions of shards are right; of those that a filter rejected, how many are wrong."""
    entries = [one for path in sorted(folder.glob("*.tar")) for one in _samples(path)]
    kept = [text in truth[one.key] for one in entries for text in one.entry["captions"]]
    thrown = [item["text"] in truth[one.key] for one in entries for item in one.entry.get("rejected", [])]
    result: dict[str, Any] = {"images": len(entries), "captions": len(kept), "right": round(float(np.mean(kept)), 4)}
    if thrown:
        wrong = len(kept) - sum(kept) + len(thrown) - sum(thrown)
        result["rejected"] = len(thrown)
        result["wrong_of_rejected"] = round(1 - float(np.mean(thrown)), 4)
        result["rejected_of_wrong"] = round((len(thrown) - sum(thrown)) / wrong, 4)
    return result


def table(report: dict[str, Any]) -> str:
    """Markdown: a row per run."""
    head = (
        f"| trained on | seed | pairs | dev loss | {report['dev_images']} dev images, image-to-text R@1 / R@5 / R@10 | "
    )
    lines = [head + "text-to-image |", "|---|---|---|---|---|---|"]
    for run in report["runs"]:
        both = (" / ".join(f"{run[f'{way}_{name}']:.1f}" for name in RECALLS) for way in ("i2t", "t2i"))
        lines.append(f"| {run['arm']} | {run['seed']} | {run['pairs']:,} | {run['loss']:.3f} | {' | '.join(both)} |")
    shown = {name: report[name] for name in ("noisy", "filtered")}
    return "\n".join([*lines, "", json.dumps(shown)])


def blip2(*arguments: str) -> None:
    """A command of ours, as people type it."""
    subprocess.run([sys.executable, "-m", "blip2", *arguments], check=True)


if __name__ == "__main__":
    main()
