"""Claim: projecting an image's keys/values once beats projecting them for every text of it.

One image is matched with k texts (re-ranking, section 6 of the design): once through one `ImageKV`
that all texts read in place, once with the image's features repeated for every pair, as LAVIS and
transformers do it. Same module, same random weights.

    python -m benchmarks.claims.project_once [--size tiny] [--repeats 5]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.common import (
    Peer,
    captions,
    compare,
    features,
    parse,
    precision_of,
    run_script,
    settings_of,
    show,
    sized,
)
from benchmarks.harness.worker import Side
from benchmarks.sides import ids
from benchmarks.sides.models import read_stage1, size_of, write_stage1
from benchmarks.sides.ours import load_batch
from blip2.ops.devices import autocast

TEXTS = 32


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(__doc__)
    size = sized(options)
    with tempfile.TemporaryDirectory() as folder:
        write_stage1(folder, size)
        inputs = {"features": features(1, size).numpy(), "captions": captions(TEXTS, size)}
        np.savez(Path(folder) / "inputs.npz", **inputs)
        claim = {
            "claim": "match one image with k texts: project once against project per pair",
            "target": 1.0,
            "size": f"{size}, k={TEXTS}",
        }
        settings = settings_of(options, size, folder, once=True)
        side = "benchmarks.claims.project_once:match"
        peers = {"the same Q-Former, features repeated per pair": Peer(side, settings={"once": False})}
        tolerance = 1e-4 if precision_of(options) == "fp32" else 5e-2
        show(compare(claim, Peer(side), peers, settings, repeats=options.repeats, tolerance=tolerance))


def match(settings: dict[str, Any]) -> Side:
    """ITM logits of one image with all texts."""
    size, batch = size_of(settings), load_batch(settings)
    model = read_stage1(settings["folder"], size).to(settings["device"]).eval()
    token_ids, mask = (x.to(settings["device"]) for x in ids.QFormerIds(size.words, size.max_text)(batch.captions))
    assert batch.features is not None
    image = batch.features

    @torch.inference_mode()
    def run() -> Tensor:
        with autocast(torch.device(settings["device"]), settings["precision"]):
            kv = model.project_image(image if settings["once"] else image.expand(len(token_ids), -1, -1))
            return model.match_logits(token_ids, mask, kv)

    return Side(run, lambda: {"logits": run().float().cpu().numpy()})


if __name__ == "__main__":
    run_script(main)
