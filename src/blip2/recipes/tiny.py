"""Recipes of the embedded pair: DINOv2-S, MiniLM-L6, SmolLM2-135M. They need no hub.

blip2 train tiny/stage1 --out runs/s1
blip2 train tiny/stage2 --init runs/s1 --out runs/s2
"""

from __future__ import annotations

from dataclasses import replace

from blip2.configs import (
    DataConfig,
    EvalConfig,
    LanguageConfig,
    LossConfig,
    OptimConfig,
    QFormerConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)


def stage1() -> RunConfig:
    """Representation learning on Flickr8k: 380 steps of 64 pairs (4 epochs).

    `blip2 train tiny/stage1 --out runs/s1`; about 45 minutes on 2 cores without AVX512, after 12
    minutes of encoding every image once.
    """
    return RunConfig(
        recipe="tiny/stage1",
        stage="stage1",
        vision=VisionConfig(name="dinov2-s", pool=2),
        qformer=QFormerConfig(init="minilm-l6", queries=16, dropout=0.0),
        language=LanguageConfig(name="smollm2-135m"),
        data=DataConfig(cache_features=True, clean=True),
        optim=OptimConfig(lr=3e-4, min_lr=1e-5, warmup=50),
        train=TrainConfig(steps=380, batch=64, eval_every=95, save_every=50),
        eval=EvalConfig(images=250, samples=8),
    )


def stage2() -> RunConfig:
    """Generative learning on Flickr8k: 760 steps of 32 pairs (4 epochs).

    `blip2 train tiny/stage2 --init runs/s1 --out runs/s2`; about an hour on 2 cores without AVX512.
    Twice the steps of half the batch cost the same and learn more.
    """
    base = stage1()
    return replace(
        base,
        recipe="tiny/stage2",
        stage="stage2",
        optim=OptimConfig(lr=4e-4, min_lr=2e-5, warmup=40),
        train=TrainConfig(steps=760, batch=32, eval_every=190, save_every=25),
    )


def caption() -> RunConfig:
    """Captioning from a stage-2 run: the image encoder trains too; the best of dev by CIDEr is kept.

    The image encoder, which costs as much as the language model here, runs once for two captions of an
    image. It learns at a fifth of the Q-Former's rate: at one rate of 1e-4 for both the loss rises.

    `blip2 train tiny/caption --init runs/s2 --out runs/caption`; about an hour of one core.
    """
    base = stage2()
    return replace(
        base,
        recipe="tiny/caption",
        vision=replace(base.vision, train=True),
        data=replace(base.data, cache_features=False, texts_per_image=2),
        optim=OptimConfig(lr=2e-5, min_lr=0.0, warmup=20, qformer_scale=5.0, layer_decay=0.8, betas=(0.9, 0.999)),
        train=replace(base.train, steps=180, batch=16, eval_every=60, save_every=30),
        eval=replace(base.eval, best="cider"),
    )


def vqa() -> RunConfig:
    """Visual question answering from a stage-2 run, the question in the Q-Former too; easy-VQA by default.

    What shape and colour is learned in 320 steps, yes and no only after twice as many.

    `blip2 train tiny/vqa --init runs/s2 --out runs/vqa`; 300 steps took 37 minutes of one core.
    """
    base = stage2()
    return replace(
        base,
        recipe="tiny/vqa",
        qformer=replace(base.qformer, instruction="question"),
        data=replace(base.data, train="easy-vqa:train", dev="easy-vqa:dev", texts="questions"),
        optim=OptimConfig(lr=3e-4, min_lr=1e-5, warmup=40, betas=(0.9, 0.999)),
        train=replace(base.train, steps=860, batch=24, eval_every=215, save_every=43),
        eval=replace(base.eval, best="accuracy"),
    )


def retrieval() -> RunConfig:
    """Retrieval from a stage-1 run: ITC + ITM; the best of dev by re-ranked R@1 is kept.

    ITM meets ever harder negatives, and ITG, which `--loss.itg 1` brings back, leaves it the time.

    `blip2 train tiny/retrieval --init runs/s1 --out runs/retrieval`
    """
    base = stage1()
    return replace(
        base,
        recipe="tiny/retrieval",
        loss=LossConfig(itg=0.0, itm_ramp=500),
        optim=OptimConfig(lr=2e-4, min_lr=1e-5, warmup=40),
        train=replace(base.train, steps=640, batch=32, eval_every=200),
        eval=replace(base.eval, best="recall"),
    )


def search() -> RunConfig:
    """Embeddings for search: ITC alone against MiniLM's own sentence embeddings, kept as they are.

    `blip2 train tiny/search --out runs/search`; 20 minutes on one core, after every image was encoded once.
    """
    base = stage1()
    return replace(
        base,
        recipe="tiny/search",
        vision=replace(base.vision, token_drop=0.3),
        qformer=replace(base.qformer, text_pool="mean", lock_text=True),
        loss=LossConfig(itm=0.0, itg=0.0),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup=30),
        train=TrainConfig(steps=420, batch=96, eval_every=70, save_every=70),
    )


def answers() -> RunConfig:
    """Captions and questions about the same images, from a stage-2 run: four texts of an image in one step.

    `blip2 train tiny/answers --init runs/s2 --out runs/answers`; about 50 minutes on 2 cores.
    """
    base = stage2()
    return replace(
        base,
        recipe="tiny/answers",
        vision=replace(base.vision, token_drop=0.25),
        data=replace(base.data, texts="both", texts_per_image=4),
        optim=OptimConfig(lr=1e-3, min_lr=2e-5, warmup=30, qformer_scale=0.3),
        train=TrainConfig(steps=420, batch=20, eval_every=140, save_every=50),
    )


def instruct() -> RunConfig:
    """Instruction tuning from a stage-2 run: the prompt of a caption or a question enters the Q-Former too.

    `blip2 train tiny/instruct --init runs/s2 --out runs/instruct`; the text branch is that of the run's stage 1.
    """
    base = answers()
    return replace(
        base,
        recipe="tiny/instruct",
        qformer=replace(base.qformer, instruction="prompt", max_text=64),
        data=replace(base.data, texts_per_image=2),
        optim=OptimConfig(lr=5e-4, min_lr=1e-5, warmup=30, betas=(0.9, 0.999), qformer_scale=0.5),
        eval=replace(base.eval, best="loss"),
    )


def demo_stage1() -> RunConfig:
    """The first of `make demo`: a taste of stage 1 on 960 images, with 8 queries.

    Without ITM, which begins to learn long after this is over and takes half of the time.
    """
    base = stage1()
    return replace(
        base,
        recipe="tiny/demo-stage1",
        qformer=replace(base.qformer, queries=8),
        data=replace(base.data, limit=960, dev_limit=64),
        loss=LossConfig(itm=0.0),
        optim=replace(base.optim, lr=4e-4, warmup=10),
        train=TrainConfig(steps=90, batch=32, eval_every=45, save_every=30),
        eval=EvalConfig(images=64, samples=6),
    )


def demo_stage2() -> RunConfig:
    """The second of `make demo`: from there to the first sentences, in many small steps.

    The projection learns fast and the Q-Former slowly: in so few steps that ends lower (dev loss 3.14
    after 150 steps, 3.24 with one rate for both), but what differs between images needs more of them.
    """
    base = demo_stage1()
    return replace(
        base,
        recipe="tiny/demo-stage2",
        stage="stage2",
        optim=OptimConfig(lr=3e-3, min_lr=1e-4, warmup=20, qformer_scale=0.05),
        train=TrainConfig(steps=180, batch=16, eval_every=60, save_every=30),
    )
