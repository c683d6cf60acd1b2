"""The log of a run: `metrics.jsonl`, TensorBoard where it is installed, and a progress line."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from blip2.errors import RunError, os_error_as
from blip2.io.atomic import write_text


class RunLog:
    """Numbers of one run; only the first process has one.

    Args:
        folder: the run folder.
        step: steps already done; lines beyond them (of a run killed after its last checkpoint)
            are dropped, so that the file reads as if the run had never stopped.
        steps: of the whole run, for the ETA.

    Attributes:
        line: the progress line, and lines above it.
    """

    def __init__(self, folder: Path, step: int, steps: int) -> None:
        self.path, self.steps = folder / "metrics.jsonl", steps
        self._drop_lines_after(step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder, step)
        self.line = ProgressLine(step, steps)

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        """Append one line (`kind` is `train` or `dev`) and mirror its numbers in TensorBoard."""
        with os_error_as(RunError, f"{self.path}: cannot be written"):
            self._file.write(json.dumps({"kind": kind, "step": step, **numbers}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close everything; what could not be written to a full disk is lost (`write` has reported it)."""
        self.line.close()
        for output in (self._file, self._board):
            if output is not None:
                with contextlib.suppress(OSError):
                    output.close()

    def _drop_lines_after(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text("utf-8").splitlines() if step else []
        write_text(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


class ProgressLine:
    """One line that is rewritten on a terminal, and printed every 20 seconds elsewhere."""

    INTERVAL = 20.0

    def __init__(self, step: int, steps: int) -> None:
        self.first, self.steps, self.began = step, steps, time.monotonic()
        self.terminal = sys.stderr.isatty()
        self._printed, self._width = -self.INTERVAL, 0

    def show(self, step: int, numbers: dict[str, float]) -> None:
        now = time.monotonic()
        last = step >= self.steps
        if not self.terminal and now - self._printed < self.INTERVAL and not last:
            return
        self._printed = now
        losses = "  ".join(f"{k} {v:.3f}" for k, v in numbers.items() if k not in ("pairs_per_s", "data_wait"))
        eta = (now - self.began) / max(step - self.first, 1) * (self.steps - step)
        text = (
            f"step {step}/{self.steps}  {losses}  {numbers.get('pairs_per_s', 0):.1f} pairs/s  "
            f"data wait {100 * numbers.get('data_wait', 0):.0f}%  ETA {format_seconds(eta)}"
        )
        end = "" if self.terminal else "\n"
        print("\r" * self.terminal + text.ljust(self._width * self.terminal), end=end, file=sys.stderr, flush=True)
        self._width = len(text)

    def say(self, text: str) -> None:
        if self.terminal and self._width:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr)
            self._width = 0
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal and self._width:
            print(file=sys.stderr, flush=True)
        self._width = 0


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`, `4000` -> `1h06m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # type: ignore[no-untyped-call]
