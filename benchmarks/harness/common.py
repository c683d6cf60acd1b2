"""What the scripts share: sizes, random weights, sides that take turns, and the JSON line.

A script names its sides; each runs in a process of its own (`benchmarks.harness.worker`). They read the same
weights and inputs, their outputs are compared, then they are timed in turn: A, B, A, B, ...

Shape letters: B images, P patches, C channels, T text tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
SKIP = 77  # exit status of a script whose peer is not here, as in automake
MEAN_TOKENS = 12


class BenchmarkError(Exception):
    """A claim that cannot be measured; the message says why."""


@dataclass(frozen=True)
class Size:
    """Sizes of the Q-Former and its inputs; the defaults are the paper's."""

    name: str = "paper"
    width: int = 768
    depth: int = 12
    heads: int = 12
    inner: int = 3072
    queries: int = 32
    patches: int = 257
    channels: int = 1408
    words: int = 30522
    positions: int = 512
    embed_dim: int = 256
    batch: int = 16
    max_text: int = 32
    mean_text: int = MEAN_TOKENS

    def __str__(self) -> str:
        return (
            f"Q-Former of {self.depth} layers, {self.width} wide, {self.queries} queries, "
            f"{self.patches} x {self.channels} features, batch {self.batch}"
        )


SIZES = {
    "paper": Size(),
    "tiny": Size("tiny", 64, 4, 4, 128, 8, 17, 48, 1000, 64, 16, batch=4),
}


@dataclass(frozen=True)
class Peer:
    """One side as the parent sees it.

    Args:
        side: `module:function` that builds it.
        python: interpreter of its environment; None takes this one.
        settings: over those of all sides.
    """

    side: str
    python: str | None = None
    settings: dict[str, Any] | None = None


def parse(description: str, *, repeats: int = 5, **choices: Sequence[str]) -> argparse.Namespace:
    """Options that every script takes; `choices` are its own, the first of each is the default."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="paper")
    parser.add_argument("--repeats", type=int, default=repeats, help="pairs that are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="add where time and memory of both sides go (CPU)")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    return parser.parse_args()


def precision_of(options: argparse.Namespace) -> str:
    """The precision of both sides: bf16 autocast on a GPU, float32 on a CPU."""
    return "bf16" if options.device == "cuda" else "fp32"


# -- inputs, the same for every side --------------------------------------------------------------


def text_lengths(count: int, size: Size, seed: int = 0) -> np.ndarray:
    """Token counts as captions have them: mean `size.mean_text` with both marks, 7 to `size.max_text`.

    A long right tail: most are short, a few long. The mean is exact.
    """
    rng = np.random.default_rng(seed)
    drawn = np.clip(np.round(7 + rng.gamma(2.5, 2.0, count)), 7, size.max_text).astype(np.int64)
    while drawn.sum() != size.mean_text * count:
        step = 1 if drawn.sum() < size.mean_text * count else -1
        open_ = np.flatnonzero((drawn + step >= 4) & (drawn + step <= size.max_text))
        drawn[rng.choice(open_)] += step
    return drawn


def captions(count: int, size: Size, seed: int = 0) -> list[str]:
    """Random token ids, written as text: `101 ... 102` for every tokenizer of `benchmarks.sides.ids`."""
    rng = np.random.default_rng([seed, 1])
    first, last = 1, 2
    rows = [[first, *rng.integers(5, size.words, n - 2).tolist(), last] for n in text_lengths(count, size, seed)]
    return [" ".join(map(str, row)) for row in rows]


def features(count: int, size: Size, seed: int = 0) -> torch.Tensor:
    """Random image features [count, P, C]."""
    return torch.randn(count, size.patches, size.channels, generator=torch.Generator().manual_seed(seed))


# -- sides ----------------------------------------------------------------------------------------


class Worker:
    """A side at work in its own process."""

    def __init__(self, peer: Peer, settings: dict[str, Any]) -> None:
        threads = str(settings["threads"])
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [peer.python or sys.executable, "-m", "benchmarks.harness.worker", peer.side, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._what = peer.side
        try:
            self._read()
        except BenchmarkError:
            self.close()
            raise

    def ask(self, **command: Any) -> dict[str, Any]:
        """Give one command and wait for its answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it ended: `_read` says why
            print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise BenchmarkError(f"{self._what} ended: {self._errors.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()


@contextmanager
def working(peers: dict[str, Peer], settings: dict[str, Any]) -> Iterator[dict[str, Worker]]:
    """The sides, built one after the other."""
    with ExitStack() as stack:
        workers = {}
        for name, peer in peers.items():
            workers[name] = Worker(peer, settings | (peer.settings or {}))
            stack.callback(workers[name].close)
        yield workers


def settings_of(options: argparse.Namespace, size: Size, folder: str | Path, **more: Any) -> dict[str, Any]:
    """What every side gets."""
    return {
        "size": asdict(size),
        "folder": str(folder),
        "device": options.device,
        "threads": options.threads,
        "precision": precision_of(options),
        "profile": options.profile,
        **more,
    }


def compare(
    claim: dict[str, Any],
    ours: Peer,
    peers: dict[str, Peer],
    settings: dict[str, Any],
    *,
    repeats: int,
    tolerance: float | None,
    warm: bool = True,
) -> dict[str, Any]:
    """Check that all sides agree, time them in turn, and return the record of the claim.

    Args:
        claim: fields to begin the record with: `claim`, `target`, `size`, ...
        peers: by name; with several the fastest counts, and `peers_s` names all.
        tolerance: largest difference allowed, in shares of the largest value of an output; None compares nothing.
        warm: run each side once before it is timed; False where the check did the same work.

    Raises:
        BenchmarkError: outputs differ, or a side failed.
    """
    with working({"ours": ours, **peers}, settings) as workers:
        compared = {} if tolerance is None else dict.fromkeys(peers, tolerance)
        gaps = [_difference(workers, name, Path(settings["folder"]), allowed) for name, allowed in compared.items()]
        for worker in workers.values():
            if warm:
                worker.ask(do="time")
            worker.ask(do="forget")
        times = {name: [] for name in workers}
        for _ in range(repeats):
            for name, worker in workers.items():
                times[name].append(worker.ask(do="time")["seconds"])
        peaks = {name: worker.ask(do="peak")["peak_mb"] for name, worker in workers.items()}
        profiles = {name: worker.ask(do="profile") for name, worker in workers.items()} if settings["profile"] else {}
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(peers, key=lambda name: medians[name])
    ratios = [theirs / mine for theirs, mine in zip(times[fastest], times["ours"], strict=True)]
    several = {"peers_s": {name: _round(medians[name]) for name in peers}} if len(peers) > 1 else {}
    return {
        **claim,
        "ratio": _round(statistics.median(ratios)),
        "ours_s": _round(medians["ours"]),
        "peer_s": _round(medians[fastest]),
        "peer": fastest,
        **several,
        "threads": settings["threads"],
        "device": settings["device"],
        "precision": _precision(ours, settings),
        "max_abs_diff": float(f"{max(gaps):.3g}") if gaps else None,
        "ours_peak_mb": round(peaks["ours"]),
        "peer_peak_mb": round(peaks[fastest]),
        "peak_ratio": _round(peaks["ours"] / peaks[fastest]),
        "repeats": repeats,
        **({"profiles": profiles} if profiles else {}),
    }


def _difference(workers: dict[str, Worker], peer: str, folder: Path, tolerance: float) -> float:
    """Largest absolute difference between the outputs of ours and of a peer."""
    outputs = []
    for name in ("ours", peer):
        path = folder / f"{name.replace(' ', '-')}.npz"
        workers[name].ask(do="check", to=str(path))
        with np.load(path) as stored:
            outputs.append({key: stored[key].astype(np.float64) for key in stored.files})
    mine, theirs = outputs
    if mine.keys() != theirs.keys():
        raise BenchmarkError(f"ours gives {sorted(mine)}, {peer} {sorted(theirs)}")
    largest = 0.0
    for key, value in theirs.items():
        if mine[key].shape != value.shape:
            raise BenchmarkError(f"{key} is {mine[key].shape} in ours, {value.shape} in {peer}")
        both = np.isfinite(mine[key]) & np.isfinite(value)  # what only one side computes is not compared
        gap = float(np.abs(mine[key] - value)[both].max(initial=0.0))
        if not both.any() or gap > tolerance * float(np.abs(value[both]).max(initial=0.0)):
            raise BenchmarkError(f"{key} differs between ours and {peer} by {gap:.3g}")
        largest = max(largest, gap)
    return largest


def _precision(ours: Peer, settings: dict[str, Any]) -> str:
    """Of both sides, or of each where they differ."""
    theirs = settings.get("weights") or settings["precision"]
    mine = (ours.settings or {}).get("weights") or (ours.settings or {}).get("precision", theirs)
    return str(theirs) if mine == theirs else f"ours {mine}, peer {theirs}"


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def show(record: dict[str, Any]) -> None:
    """Print the JSON line of a claim."""
    print(json.dumps(record), flush=True)


def run_script(main: Any) -> None:
    """Call a script's `main`; one line and exit status 1 where a claim cannot be measured, 77 without its peer."""
    try:
        main()
    except PeerMissingError as error:
        print(error, file=sys.stderr)
        sys.exit(SKIP)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


class PeerMissingError(BenchmarkError):
    """The peer cannot be had here."""


def lavis_python() -> str:
    """The interpreter of LAVIS's environment (`make bench-peers`; `LAVIS_PYTHON` names another).

    Raises:
        PeerMissingError: there is none.
    """
    path = Path(os.environ.get("LAVIS_PYTHON", ROOT / ".venv-lavis" / "bin" / "python"))
    if not path.exists():
        raise PeerMissingError("LAVIS is not installed: run `make bench-peers`, or set LAVIS_PYTHON")
    return str(path)


def sized(options: argparse.Namespace, **changes: Any) -> Size:
    """The size that the options name, with changes."""
    return replace(SIZES[options.size], **changes)
