"""What each part is worth: variants of the tiny runs on equal budgets (`blip2 ablate tiny`).

The paper asks the same of its own sizes: Figure 5 (stage 2 without stage 1) and Table 6 (stage 1
without ITG).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from blip2.configs import LossConfig, OptimConfig, RunConfig, TrainConfig
from blip2.recipes import tiny


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        asks: what it is there to show.
        stage1: None where stage 2 starts from BERT, or without a Q-Former.
        stage2: without `init`, which is the run of `stage1`.
    """

    name: str
    asks: str
    stage1: RunConfig | None
    stage2: RunConfig


# Texts of a step in either stage: 32 pairs in stage 1, 8 images with 4 captions each in stage 2.
PAIRS = 32
CAPTIONS = 4


def variants(*, steps1: int = 128, steps2: int = 128, images: int = 250) -> list[Variant]:
    """Every variant, on `steps1` steps of stage 1 and `steps2` of stage 2, 32 pairs of image and text each.

    One without stage 1 is there twice: with the same stage 2, and with stage 1's steps added to it.
    """
    first, second = _bases(steps1, steps2, images)
    longer = replace(second, train=replace(second.train, steps=steps1 + steps2))
    linear = replace(second, qformer=replace(second.qformer, bridge="linear"))
    fewer = [replace(run, qformer=replace(run.qformer, queries=4)) for run in (first, second)]

    def weighted(loss: LossConfig) -> RunConfig:
        return replace(first, loss=loss)

    return [
        Variant("full", "ITC + ITM + ITG, then stage 2", first, second),
        Variant("no-itg", "is ITG worth its time?", weighted(LossConfig(itg=0.0)), second),
        Variant("no-itm", "is ITM?", weighted(LossConfig(itm=0.0)), second),
        Variant("no-stage1", "why two stages: the same stage 2 from BERT", None, second),
        Variant("no-stage1-longer", "the same pairs in all, every one in stage 2", None, longer),
        Variant("linear", "why a Q-Former: a linear layer on averaged patches", None, linear),
        Variant("4-queries", "a quarter of the queries", *fewer),
    ]


def _bases(steps1: int, steps2: int, images: int) -> tuple[RunConfig, RunConfig]:
    """Stage 1 and stage 2 of all variants: the tiny recipes, with what learned fastest in docs/results/tiny.md."""

    def short(run: RunConfig, steps: int, batch: int, optim: OptimConfig) -> RunConfig:
        often = max(steps // 2, 1)
        train = TrainConfig(steps=steps, batch=batch, eval_every=often, save_every=often, keep=1)
        qformer = replace(run.qformer, text_pool="mean")
        return replace(run, qformer=qformer, optim=optim, train=train, eval=replace(run.eval, images=images))

    first = short(tiny.stage1(), steps1, PAIRS, OptimConfig(lr=4e-4, min_lr=1e-5, warmup=15))
    optim = OptimConfig(lr=1e-3, min_lr=2e-5, warmup=15, qformer_scale=0.3)
    second = short(tiny.stage2(), steps2, PAIRS // CAPTIONS, optim)
    several = replace(second.data, texts_per_image=CAPTIONS)
    return first, replace(second, data=several, eval=replace(second.eval, best="cider"))
