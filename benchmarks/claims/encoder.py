"""Claims: our frozen encoder is as fast as the fastest of transformers' own ways to run it, and a feature
cache gives features ten times as fast again.

Seconds are per image. `--what cache` compares re-reads of the cache (bf16 on disk) with our encoder; `--ours compiled`
runs ours as `train.compile` does.

    python -m benchmarks.claims.encoder [--what cache] [--ours compiled] [--precision bf16] [--size tiny] [--repeats 5]
"""

from __future__ import annotations

import tempfile

from benchmarks.harness.common import Peer, compare, parse, precision_of, run_script, settings_of, show, sized


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(__doc__, what=("encoder", "cache"), ours=("plain", "compiled"), precision=("fp32", "bf16"))
    bf16 = options.precision == "bf16"
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(options, sized(options), folder, **({"weights": "bf16"} if bf16 else {}))
        shape = "shaped as ViT-L/14 to its second-last block, 224 pixels, batch 8"
        claim = {"size": shape if options.size == "paper" else "3 blocks, 64 wide, 224 pixels, batch 4"}
        ours = Peer("benchmarks.sides.encoder:ours", settings={"compiled": options.ours == "compiled"})
        if options.what == "cache":
            claim |= {"claim": "feature cache re-read against encoding", "target": 10.0}
            ours, peers = Peer("benchmarks.sides.encoder:cache"), {"our encoder": ours}
        else:
            compiled = ", ours compiled" if options.ours == "compiled" else ""
            claim |= {"claim": f"frozen encoder forward{compiled}" + (", bf16" if bf16 else ""), "target": 1.0}
            ways = ("eager", "sdpa", "compiled")
            peers = {
                f"transformers {way}": Peer("benchmarks.sides.encoder:transformers", settings={"attention": way})
                for way in ways
            }
        exact = options.what == "encoder" and not bf16 and precision_of(options) == "fp32"
        record = compare(claim, ours, peers, settings, repeats=options.repeats, tolerance=1e-4 if exact else 5e-2)
        show(record)


if __name__ == "__main__":
    run_script(main)
