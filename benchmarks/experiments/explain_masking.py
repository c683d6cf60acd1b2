"""Do the maps show what counts? Hide the patches that a map puts first, or as many at random.

    python benchmarks/experiments/explain_masking.py --model runs/s1 --images 150

For every image of Flickr8k dev and its first caption, a share of the patches is set to the mean
colour before the image encoder sees them, chosen by: the ITM gradient map, the ITC gradient map, the
plain attention of the queries, and at random (mean over draws). Printed is how far the score of the
pair falls; a map that means something makes it fall further than chance does. Standard errors are
over images; `wins` is the share of images where the map beats the mean of the random draws.
"""

from __future__ import annotations

import argparse
import json
from datetime import date

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import blip2
from blip2.data.images import decode_image, plain_view
from blip2.data.sources import open_collection
from blip2.inference import Blip2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="flickr8k:dev")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--share", type=float, default=0.25, help="of the patches that is hidden")
    parser.add_argument("--draws", type=int, default=3)
    options = parser.parse_args()
    model = blip2.load(options.model)
    samples = open_collection(options.data).samples
    chosen = np.random.default_rng(0).permutation(len(samples))[: options.images]
    falls: dict[str, list[dict[str, float]]] = {"itm": [], "itc": []}
    for n in tqdm(chosen, unit="image", mininterval=20):
        for score, row in one(model, samples[n].read(), samples[n].captions[0], options.share, options.draws).items():
            falls[score].append(row)
    result = {score: summary(rows) for score, rows in falls.items()}
    about = {"date": date.today().isoformat(), "model": options.model, "data": options.data, "images": len(chosen)}
    print(json.dumps(about | {"share": options.share, "draws": options.draws, **result}, indent=1))


def one(model: Blip2, data: bytes, text: str, share: float, draws: int) -> dict[str, dict[str, float]]:
    """Score as it is and its fall by what is hidden, for ITM (logit of a match minus no match) and ITC."""
    attention = model.attend(data, text)
    if attention.itm_maps is None:
        raise SystemExit("this model never learned ITM: choose one that did")
    assert attention.itc_maps is not None
    count = round(share * attention.grid[0] * attention.grid[1])
    rng = np.random.default_rng(0)
    hidden = {
        "itm map": top(attention.heatmap(attention.itm_maps.sum(0)), count),
        "itc map": top(attention.heatmap(attention.itc_maps.sum(0)), count),
        "attention": top(attention.heatmap(attention.queries.mean(dim=(0, 1))), count),
    }
    for draw in range(draws):
        hidden[f"random {draw}"] = rng.permutation(attention.grid[0] * attention.grid[1])[:count]
    view = plain_view(decode_image(data), model.image_spec)
    views = torch.stack([view, *(masked(view, patches, attention.grid[0]) for patches in hidden.values())])
    with torch.no_grad():
        kv = model.image_kv(model.vision(views.to(model.device)))
        queries = model.stage1.embed_images(kv)[0].cpu()
    logits = model.match_logits(kv, [text] * len(views))
    scores = {
        "itm": logits[:, 1] - logits[:, 0],
        "itc": (queries @ model.embed_texts(text)[0]).amax(dim=1),
    }
    return {name: falls(values, list(hidden)) for name, values in scores.items()}


def falls(scores: Tensor, names: list[str]) -> dict[str, float]:
    by_name = {name: float(scores[0] - value) for name, value in zip(names, scores[1:], strict=True)}
    random = [fall for name, fall in by_name.items() if name.startswith("random")]
    maps = {name: fall for name, fall in by_name.items() if not name.startswith("random")}
    return {"score": float(scores[0]), **maps, "random": float(np.mean(random))}


def top(heat: Tensor, count: int) -> np.ndarray:
    return heat.flatten().argsort(descending=True)[:count].numpy()


def masked(view: Tensor, patches: np.ndarray, grid: int) -> Tensor:
    """A normalised view with some cells of a grid at zero, which is the mean colour."""
    keep = torch.ones(grid * grid)
    keep[torch.from_numpy(np.asarray(patches))] = 0
    size = view.shape[-1]
    cells = torch.nn.functional.interpolate(keep.view(1, 1, grid, grid), size=(size, size), mode="nearest")
    return view * cells[0]


def summary(rows: list[dict[str, float]]) -> dict[str, object]:
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    summary: dict[str, object] = {"score": round(float(table["score"].mean()), 4)}
    for name, values in table.items():
        if name == "score":
            continue
        entry = {"falls": round(float(values.mean()), 4), "se": round(float(values.std() / len(values) ** 0.5), 4)}
        if name != "random":
            more = values - table["random"]
            entry |= {
                "beyond_random": round(float(more.mean()), 4),
                "beyond_se": round(float(more.std() / len(more) ** 0.5), 4),
                "wins": round(float((more > 0).mean()), 3),
            }
        summary[name] = entry
    return summary


if __name__ == "__main__":
    main()
