"""The plan for a web-scale run: storage, CapFilt, pretraining and network, counted and multiplied out.

What is counted: parameters and floating-point operations of every preset, on the meta device, and the bytes of the
tensors that travel. What is measured: bytes per sample of given shards, and seconds a pair where a result file says
them. All else is one of the assumptions below, printed with its source.

    python -m benchmarks.experiments.scale_plan [--images 129e6] [--cards 64] [--shards DIR] > plan.md
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blip2.configs import LanguageConfig, RunConfig
from blip2.data.shards.reader import read_shards
from blip2.estimate.kernels import DeviceKernels, Machine
from blip2.estimate.measure import build_on_meta
from blip2.estimate.step_memory import PROMPT_TOKENS, run_step
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder
from blip2.recipes import recipe

PRESETS = ("vitl-opt2.7b", "vitg-opt2.7b", "vitg-flant5xl")
TEXT_TOKENS = 12 + 1  # natural captions average 12 tokens (docs/performance.md), and an end
DRAWN, CAPTION_TOKENS = 10, 14  # captions per image of CapFilt; tokens of one
KEPT, TOGETHER = 2, 32  # captions kept; images of a batch
BATCH = 4  # pairs that are counted together: FLOPs grow linearly with it, but for ITC's tiny matrix


@dataclass(frozen=True)
class Assumption:
    """A number that was not measured here, and where it is from."""

    value: float
    unit: str
    source: str


ASSUMED = {
    "H200 bf16 peak": Assumption(989e12, "FLOP/s", "NVIDIA's data sheet, dense"),
    "H200 memory": Assumption(4.8e12, "B/s", "NVIDIA's data sheet"),
    "A100 bf16 peak": Assumption(312e12, "FLOP/s", "NVIDIA's data sheet, dense"),
    "share of the peak, tuned": Assumption(0.4, "", "assumed: what large trainings report for transformers on H100"),
    "share of the bandwidth when decoding": Assumption(0.5, "", "assumed"),
    "paper, stage 1 ViT-g": Assumption(16 * 6 * 86400, "A100 s", "arXiv 2301.12597, section 4: under six days on 16"),
    "paper, stage 2 ViT-g": Assumption(16 * 3 * 86400, "A100 s", "arXiv 2301.12597, section 4: under three days on 16"),
    "web image at 256 px": Assumption(25e3, "B", "assumed: img2dataset's JPEGs, shorter side 256, quality 95"),
    "web image at 384 px": Assumption(56e3, "B", "assumed: the former by area"),
}


# What was measured on 2 cores of an AMD EPYC (AVX2, float32), and the file that says so.
MEASURED = {
    "tiny/stage1, seconds a pair": Assumption(
        5.93 / 64, "s", "docs/results/flickr8k-tiny.md: 5.93 s a step of 64 pairs"
    ),
    "tiny/stage2, seconds a pair": Assumption(
        4.69 / 32, "s", "docs/results/flickr8k-tiny.md: 4.69 s a step of 32 pairs"
    ),
    "tiny CapFilt": Assumption(
        0.443, "images/s a core", "benchmarks.experiments.capfilt_rate, ten captions drawn, all ranked"
    ),
    "decode and augment": Assumption(
        295, "images/s a core", "docs/data.md: benchmarks.experiments.stream_rate, 224 px sources"
    ),
    "index": Assumption(7300, "samples/s a core", "docs/data.md: benchmarks.experiments.stream_rate"),
    "index in memory": Assumption(970, "B a sample", "benchmarks.experiments.stream_rate, five captions each"),
}


class CountedKernels(DeviceKernels):
    """Float32 kernels of a CPU, with attention as the products that it is made of."""

    def __init__(self) -> None:
        super().__init__(Machine(accelerator=False, autocast=False, frozen=torch.float32))

    def attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """As torch has it on the meta device."""
        return F.scaled_dot_product_attention(*args, **kwargs)


@dataclass(frozen=True)
class Counts:
    """Of one pair: FLOPs of the frozen encoder, and of forward and backward behind it; of the model: weights."""

    encoder: float
    rest: float
    trained: int
    image_tokens: int
    image_width: int
    queries: int

    @property
    def pair(self) -> float:
        return self.encoder + self.rest


def flops(work: Callable[[], Any]) -> float:
    """Floating-point operations (two per multiply-add) of what `work` runs."""
    with FlopCounterMode(display=False) as counter, CountedKernels():
        work()
    return float(counter.get_total_flops())


@functools.cache
def count(config: RunConfig) -> Counts:
    """What a step of a run costs, per pair."""
    plain = replace(config, recipe="", language=LanguageConfig()) if config.stage == "stage1" else config
    if plain != config:
        return count(plain)  # presets of one image encoder share a stage 1
    model = build_on_meta(config)
    vision = model.vision
    assert isinstance(vision, VisionEncoder)
    side = vision.size
    pixels = torch.empty(BATCH, 3, side, side, device="meta")
    on_features = replace(
        config,
        data=replace(config.data, cache_features=True, texts_per_image=1),
        train=replace(config.train, early_backward=False, accumulate=1),
    )
    length = TEXT_TOKENS + (PROMPT_TOKENS if config.stage == "stage2" else 1)

    def step() -> None:
        run_step(model, on_features, torch.full((BATCH,), length), CountedKernels())

    def encode() -> None:
        with torch.no_grad():
            vision(pixels)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    made = Counts(
        *(flops(encode) / BATCH, flops(step) / BATCH, trained),
        *(vision.tokens, vision.width, config.qformer.queries),
    )
    return made


def writing(config: RunConfig) -> tuple[float, float, float, int]:
    """FLOPs of one image's soft prompts, of a token that is read and of one that is written; weights of the latter."""
    model = build_on_meta(config)
    assert isinstance(model, Stage2)
    vision = model.vision
    assert isinstance(vision, VisionEncoder)
    features = torch.empty(BATCH, vision.tokens, vision.width, device="meta")
    soft = flops(lambda: _quiet(lambda: model.soft_prompts(features))) / BATCH
    language = model.language_model
    sizes = {name: p.numel() for name, p in language.model.named_parameters()}
    encoder = sum(size for name, size in sizes.items() if language.encoder_decoder and name.startswith("encoder."))
    weights = sum(sizes.values()) - encoder
    return soft, 2.0 * (encoder or weights), 2.0 * weights, weights


def _quiet(work: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return work()


# -- tables ----------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, tuple("---" for _ in head), *rows])


def given(numbers: dict[str, Assumption], what: str) -> str:
    rows = [(name, f"{a.value:.4g} {a.unit}".strip(), a.source) for name, a in numbers.items()]
    return table((what, "value", "source"), rows)


def on_a_cpu(images: float) -> str:
    """Core-hours of one pass over all images by the tiny pair, and what every process does at its start."""
    cores, core_hours = 2, []
    for name in ("tiny/stage1, seconds a pair", "tiny/stage2, seconds a pair"):
        core_hours.append((f"a pass of {name.partition(',')[0]}", images * MEASURED[name].value * cores / 3600))
    drawn = images / MEASURED["tiny CapFilt"].value / 3600
    core_hours.append((f"CapFilt: {DRAWN} captions an image drawn, all ranked", drawn))
    core_hours.append(("decode and augment once", images / MEASURED["decode and augment"].value / 3600))
    core_hours.append(("index, in every process", images / MEASURED["index"].value / 3600))
    rows = [(name, f"{hours:,.0f}") for name, hours in core_hours]
    held = images * MEASURED["index in memory"].value / 1e9
    return table(("work on all images", "core-hours"), rows) + f"\n\nThe index takes {held:,.0f} GB in every process."


def feeding(shard_bytes: float) -> str:
    """What a card at the tuned share wants of its node: cores that decode, and bytes."""
    peak, share = ASSUMED["H200 bf16 peak"].value, ASSUMED["share of the peak, tuned"].value
    rows = []
    for preset in PRESETS:
        for stage in ("stage1", "stage2"):
            rate = peak * share / count(recipe(f"{preset}/{stage}")).pair
            cores = rate / MEASURED["decode and augment"].value
            rows.append((f"{preset}/{stage}", f"{rate:,.0f}", f"{cores:.1f}", f"{rate * shard_bytes / 1e6:,.0f}"))
    return table(("run", "pairs/s a card", "cores that decode, a card", "MB/s of shards, a card"), rows)


def storage(images: float, folder: Path | None) -> str:
    """TB of images and their JSON in shards, before and after CapFilt."""
    sizes = {name: ASSUMED[name].value for name in ASSUMED if name.startswith("web image")}
    if folder is not None:
        collection = read_shards("", sorted(folder.glob("*.tar")))
        mean = sum(sample.size for sample in collection.samples) / len(collection.samples)
        sizes[f"as {folder.name} (measured: mean of {len(collection.samples)} images)"] = mean
    rows = []
    for name, size in sizes.items():
        web, kept = (member(size) + member(_json_bytes(texts)) for texts in (1, KEPT))
        rows.append((name, f"{size / 1e3:.1f}", f"{images * web / 1e12:.2f}", f"{images * (web + kept) / 1e12:.2f}"))
    return table(("images", "kB each", "TB with web text", "TB, with the CapFilt copy beside"), rows)


def member(size: float) -> float:
    """Bytes of a file in a tar: a header, and the content in blocks of 512."""
    return 512 + 512 * -(-size // 512)


def _json_bytes(texts: int) -> float:
    """`{"image_id", "captions"}` of 60-byte captions; CapFilt adds provenance and what it rejected."""
    plain = 60 + texts * 64
    return plain if texts == 1 else plain + texts * 48 + (DRAWN + 1 - texts) * 120


def capfilt(images: float) -> str:
    """Card-hours of drawing and ranking, by part of the work."""
    peak, share = ASSUMED["H200 bf16 peak"].value, ASSUMED["share of the peak, tuned"].value
    bandwidth = ASSUMED["H200 memory"].value * ASSUMED["share of the bandwidth when decoding"].value
    rows = []
    for preset in PRESETS:
        stage1, stage2 = count(recipe(f"{preset}/stage1")), recipe(f"{preset}/stage2")
        soft, reading, token, weights = writing(stage2)
        encode = stage1.encoder + soft
        read = (stage2.qformer.queries + PROMPT_TOKENS) * reading
        write = DRAWN * CAPTION_TOKENS * token
        # every token written reads all weights once, in bf16, for the images that go together
        moved = CAPTION_TOKENS * 2.0 * weights / TOGETHER
        # ITC of 11 texts: about a text pass each, far below the rest (docs/performance.md: 1.02 GMAC of 12 tokens)
        rank = soft + 2 * 1.02e9 * (DRAWN + 1)
        seconds = (encode + read + rank) / (peak * share) + max(write / (peak * share), moved / bandwidth)
        rows.append(
            (
                preset,
                *(f"{part / 1e9:,.0f}" for part in (encode, read, write, rank)),
                f"{1e6 * seconds / 3600:.2f}",
                f"{images * seconds / 3600:,.0f}",
            )
        )
    head = ("captioner", "encode", "read prompt", f"write {DRAWN} captions", "rank (own ITC)")
    return table((*head, "card-hours per million", "card-hours in all"), rows)


def pretraining(cards: int) -> str:
    """Card-hours of both stages of every preset, at the paper's efficiency and at a tuned one."""
    a100, h200 = ASSUMED["A100 bf16 peak"].value, ASSUMED["H200 bf16 peak"].value
    tuned = ASSUMED["share of the peak, tuned"].value
    implied = {}
    for stage in ("stage1", "stage2"):
        config = recipe(f"vitg-opt2.7b/{stage}")
        spent = ASSUMED[f"paper, stage {stage[-1]} ViT-g"].value * a100
        implied[stage] = config.train.steps * config.train.batch * count(config).pair / spent
    rows = []
    for preset in PRESETS:
        for stage in ("stage1", "stage2"):
            config = recipe(f"{preset}/{stage}")
            made = count(config)
            pairs = config.train.steps * config.train.batch
            hours = [pairs * made.pair / (h200 * share) / 3600 for share in (implied[stage], tuned)]
            rows.append(
                (
                    f"{preset}/{stage}",
                    *(f"{made.trained / 1e6:.0f}", f"{pairs / 1e6:,.0f}"),
                    *(f"{made.encoder / 1e9:,.0f}", f"{made.rest / 1e9:,.0f}"),
                    *(f"{h:,.0f} ({h / 24 / cards:.1f} days)" for h in hours),
                )
            )
    head = ("run", "trained, M", "M pairs", "GFLOP a pair: encoder", "the rest")
    shares = f"{implied['stage1']:.0%} (stage 1) and {implied['stage2']:.0%} (stage 2)"
    return table((*head, f"card-hours at {shares}", f"at {tuned:.0%}"), rows)


def network(cards: int) -> str:
    """MB that a process sends in a step, ring collectives, float32 weights and gradients, bf16 features."""
    rows = []
    share = (cards - 1) / cards
    for preset in PRESETS:
        for stage in ("stage1", "stage2"):
            config = recipe(f"{preset}/{stage}")
            made, local = count(config), config.train.batch / cards
            weights = 2 * share * made.trained * 4
            vectors = fetched = 0.0
            if stage == "stage1":
                row = (made.queries + 1) * config.qformer.embed_dim * 4
                vectors = 2 * local * row * (cards - 1)  # gathered, and the gradient of what was gathered
                fetched = local * share * made.image_tokens * made.image_width * 2
            total = weights + vectors + fetched
            rows.append(
                (f"{preset}/{stage}", f"{local:.0f}", *(f"{x / 1e6:,.0f}" for x in (weights, vectors, fetched, total)))
            )
    head = ("run", "pairs a card", "gradients (DDP)", "ITC vectors", "ITM negatives", "MB sent a step and card")
    return table(head, rows)


def main() -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, default=129e6, help="in all (default: %(default)g)")
    parser.add_argument("--cards", type=int, default=64, help="of the runs (default: %(default)s)")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="measure bytes per image here too")
    options = parser.parse_args()
    print(f"`python -m benchmarks.experiments.scale_plan --images {options.images:g} --cards {options.cards}`\n")
    for title, text in (
        ("Measured", given(MEASURED, "measured")),
        ("Assumed", given(ASSUMED, "assumed")),
        ("Storage", storage(options.images, options.shards)),
        ("CapFilt: GFLOP per image, and card-hours", capfilt(options.images)),
        ("Pretraining", pretraining(options.cards)),
        ("Feeding a card, images at 256 px", feeding(ASSUMED["web image at 256 px"].value)),
        ("Network, MB", network(options.cards)),
        ("Without a card: the tiny pair", on_a_cpu(options.images)),
    ):
        print(f"## {title}\n\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
