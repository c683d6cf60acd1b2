"""Claim: JPEGs are decoded and augmented faster than by torchvision's published recipe, written with PIL.

Seconds are per image on one core; both draw the same crops. Images have 1024 x 768 pixels, as web
collections keep them, or `--pixels 640x480` (COCO), of which only the largest crops can be reduced.

    python -m benchmarks.claims.data [--pixels 640x480] [--size tiny] [--repeats 9]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness.common import Peer, compare, parse, run_script, settings_of, show, sized
from benchmarks.sides import images


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(__doc__, repeats=9, pixels=("1024x768", "640x480"))
    options.threads, options.device = 1, "cpu"
    width, height = map(int, options.pixels.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        images.write(Path(folder), width, height)
        claim = {
            "claim": f"decode and augment, {options.pixels}",
            "target": 2.0 if options.pixels == "1024x768" else 1.5,
            "size": f"{images.COUNT} JPEGs of {width} x {height} to 224 x 224, crops of {images.CROP_MIN} to 1",
        }
        peers = {"torchvision's recipe in PIL": Peer("benchmarks.sides.images:torchvision_recipe")}
        settings = settings_of(options, sized(options), folder)
        ours = Peer("benchmarks.sides.images:ours")
        show(compare(claim, ours, peers, settings, repeats=options.repeats, tolerance=5e-2))


if __name__ == "__main__":
    run_script(main)
