"""Claim: greedy captions of a folder of images come faster than from the same parts put together from transformers.

`tiny` on 200 JPEGs of 640 x 480, in batches of 16, float32 on both sides: `Blip2.caption` on the paths, and
`Blip2ForConditionalGeneration` with DINOv2 and SmolLM2 as towers, the image processor and tokenizer of their folders
and `generate`. Seconds are per image, from the file to the text, and the texts are the same.

    python -m benchmarks.claims.folder [--size tiny] [--repeats 3]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness.common import Peer, compare, parse, run_script, settings_of, show, sized
from benchmarks.sides import images

IMAGES = {"paper": 200, "tiny": 4}


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(__doc__, repeats=3)
    count = IMAGES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        images.write(Path(folder), 640, 480, count)
        claim = {"claim": "greedy captions of a folder", "target": 2.0, "size": f"tiny, {count} JPEGs of 640 x 480"}
        settings = settings_of(options, sized(options), folder)
        peers = {"transformers generate": Peer("benchmarks.sides.folder:captions_transformers")}
        ours = Peer("benchmarks.sides.folder:captions_ours")  # the check is the job itself: both are warm after it
        show(compare(claim, ours, peers, settings, repeats=options.repeats, tolerance=0.0, warm=False))


if __name__ == "__main__":
    run_script(main)
