"""Load on `blip2 serve`: throughput and latency of many clients against one at a time, and memory over many requests.

    python benchmarks/experiments/serve_load.py --model tiny               # 64 clients for 60 s, then 2,000 requests
    python benchmarks/experiments/serve_load.py --model tiny --clients 8 --seconds 5 --requests 40

A real server process on a free port, real HTTP on loopback. In turn: every image once, which is what is right; one
client alone; `--clients` at once; `--requests` requests, the server's memory read before and after each quarter; last,
a burst of twice as many clients as it holds. Requests ask for captions (--ask: answers) of a few images. An answer
that is not the first one of its image counts as wrong; `asked` less answers, 429s and errors is what was lost. Larger
batches round differently: in bf16 a beam may go another way, so take float32 to count wrong ones. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

QUESTION = "what is in the picture?"


def main() -> None:
    options = _options()
    images = _images(options.data, options.images)
    path = "/ask" if options.ask else "/caption"
    fields: dict[str, Any] = {"beams": options.beams, "max_tokens": options.tokens}
    fields |= {"question": QUESTION} if options.ask else {"min_tokens": min(8, options.tokens)}
    bodies = [json.dumps({**fields, "image": image}).encode() for image in images]
    with serving(options) as (address, server):
        client = Client(address + path, bodies)
        asyncio.run(client.run(1, requests=len(bodies)))
        alone = asyncio.run(client.run(1, seconds=options.seconds))
        many = asyncio.run(client.run(options.clients, seconds=options.seconds))
        long, resident = Result(), [memory(server.pid)]
        for _ in range(4 if options.requests else 0):
            long.add(asyncio.run(client.run(options.clients, requests=options.requests // 4)))
            resident.append(memory(server.pid))
        crowd = 2 * (options.queue + options.max_batch)
        burst = asyncio.run(client.run(crowd, requests=2 * crowd, patient=False))
        metrics = httpx.get(f"{address}/metrics", timeout=30).text
    record = {
        "date": date.today().isoformat(),
        "model": options.model,
        "path": path,
        "beams": options.beams,
        "max_tokens": options.tokens,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "alone": alone.summary(),
        "clients": {"clients": options.clients, **many.summary()},
        "speedup": round(many.rate / alone.rate, 2) if alone.rate else None,
        "long": {"requests": options.requests, "rss_mib": resident, **long.summary()},
        "burst": burst.summary(),
        "mean_batch": _mean_batch(metrics),
    }
    print(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="flickr8k:dev", help="images; noise where it is not there")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one client alone, and of all at once")
    parser.add_argument("--requests", type=int, default=2000, help="while memory is watched")
    parser.add_argument("--ask", action="store_true", help="questions instead of captions")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=16)
    return parser.parse_args()


@dataclass
class Result:
    """What came of a run."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    wrong: int = 0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.times) / self.seconds if self.seconds else 0.0

    def add(self, other: Result) -> None:
        """Count another run in."""
        self.seconds += other.seconds
        self.asked += other.asked
        self.wrong += other.wrong
        self.times += other.times
        self.statuses += other.statuses

    def summary(self) -> dict[str, Any]:
        times = np.array(self.times) if self.times else np.zeros(1)
        others = {status: count for status, count in self.statuses.items() if status not in ("200", "429")}
        return {
            "asked": self.asked,
            "answers": len(self.times),
            "per_second": round(self.rate, 2),
            "p50_s": round(float(np.percentile(times, 50)), 3),
            "p95_s": round(float(np.percentile(times, 95)), 3),
            "busy_429": self.statuses["429"],
            "errors": others,
            "wrong": self.wrong,
        }


class Client:
    """Asks about images in turn and compares answers.

    Args:
        bodies: one request per image.
    """

    def __init__(self, url: str, bodies: list[bytes]) -> None:
        self.url, self.bodies = url, bodies
        self.right: dict[int, Any] = {}

    async def run(
        self, clients: int, *, seconds: float | None = None, requests: int | None = None, patient: bool = True
    ) -> Result:
        """Ask from several clients at once, for a time or a number of requests.

        Args:
            patient: come again after a 429, when the server says; else count it and go on.
        """
        result, begun = Result(), time.monotonic()
        numbers = iter(range(requests)) if requests is not None else iter(int, 1)
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx.AsyncClient(limits=limits, timeout=120, trust_env=False) as http:

            async def one(start: int) -> None:
                for place, _ in enumerate(numbers, start):
                    if seconds is not None and time.monotonic() - begun >= seconds:
                        break
                    await self._ask(http, place % len(self.bodies), result, patient)

            await asyncio.gather(*(one(n) for n in range(clients)))
        result.seconds = time.monotonic() - begun
        return result

    async def _ask(self, http: httpx.AsyncClient, image: int, result: Result, patient: bool) -> None:
        begun = time.monotonic()
        while True:
            result.asked += 1
            try:
                headers = {"content-type": "application/json"}
                answer = await http.post(self.url, content=self.bodies[image], headers=headers)
            except httpx.HTTPError as error:
                result.statuses[type(error).__name__] += 1
                return
            result.statuses[str(answer.status_code)] += 1
            if answer.status_code != 429 or not patient:
                break
            await asyncio.sleep(float(answer.headers["retry-after"]))
        if answer.status_code != 200:
            return
        result.times.append(time.monotonic() - begun)
        body = answer.json()
        said = body.get("answer") or [caption["text"] for caption in body.get("captions", [])]
        result.wrong += said != self.right.setdefault(image, said)


@contextmanager
def serving(options: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process of this machine: its address."""
    command = [sys.executable, "-m", "blip2", "serve", "--model", options.model, "--port", "0"]
    command += ["--queue", str(options.queue), "--max-batch", str(options.max_batch), "--timeout", "110"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                addresses = [word for word in line.split() if word.startswith("http://")]
                if addresses:
                    break
            else:
                raise SystemExit("the server did not start")
            _wait(addresses[0])
            yield addresses[0], server
        finally:
            server.terminate()
            server.wait(150)


def _wait(address: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{address}/healthz", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit("the server does not answer")


def memory(process: int) -> float:
    """Resident MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _mean_batch(metrics: str) -> float | None:
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    count = float(values.get("blip2_batch_size_count", 0))
    return round(float(values["blip2_batch_size_sum"]) / count, 2) if count else None


def _images(data: str, count: int) -> list[str]:
    """Data URLs of images of a data set, of noise where there is none."""
    from blip2.data.sources import open_collection
    from blip2.errors import DataError

    try:
        raw = [sample.read() for sample in open_collection(data).samples[:count]]
    except DataError as error:
        print(f"{error}: noise instead", file=sys.stderr)
        rng = np.random.default_rng(0)
        raw = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(buffer, "JPEG")
            raw.append(buffer.getvalue())
    return [f"data:image/jpeg;base64,{base64.b64encode(each).decode()}" for each in raw]


if __name__ == "__main__":
    main()
