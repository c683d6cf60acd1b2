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


def variants(*, steps1: int = 240, steps2: int = 240, images: int = 250) -> list[Variant]:
    """Every variant, on `steps1` steps of stage 1 and `steps2` of stage 2, 16 pairs each.

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
    """Stage 1 and stage 2 of all variants: the tiny recipes in many small steps."""

    def short(run: RunConfig, steps: int, optim: OptimConfig) -> RunConfig:
        train = TrainConfig(steps=steps, batch=16, eval_every=max(steps // 4, 1), save_every=max(steps // 4, 1), keep=1)
        return replace(run, optim=optim, train=train, eval=replace(run.eval, images=images))

    first = short(tiny.stage1(), steps1, OptimConfig(lr=3e-4, min_lr=1e-5, warmup=20))
    second = short(tiny.stage2(), steps2, OptimConfig(lr=4e-4, min_lr=2e-5, warmup=20))
    return first, replace(second, eval=replace(second.eval, best="cider"))
