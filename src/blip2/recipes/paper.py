"""Recipes at the paper's sizes, with its hyper-parameters (arXiv 2301.12597, appendix, table 7).

They want a cluster and a hub (or local folders) for the towers; `blip2 estimate NAME` shows what
they are made of without either. One node of eight cards:

    torchrun --nproc-per-node 8 -m blip2 train vitg-opt2.7b/stage1 --data 'shards/{00000..12345}.tar'
"""

from __future__ import annotations

from dataclasses import replace

from blip2.configs import (
    DataConfig,
    EvalConfig,
    LanguageConfig,
    OptimConfig,
    QFormerConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)

VIT_G = VisionConfig(name="vitg", layer=-1)  # its 39 blocks end at the second-last of EVA's 40
VIT_L = VisionConfig(name="vitl", layer=-2)
OPT = LanguageConfig(name="opt-2.7b", prompt="a photo of", end="\n")
VICUNA = LanguageConfig(name="vicuna-7b", prompt="a photo of", start="</s>")
FLAN_T5 = LanguageConfig(name="flan-t5-xl", prompt="a photo of", question="Question: {} Short answer:")


def _stage1(name: str, vision: VisionConfig, language: LanguageConfig, batch: int) -> RunConfig:
    return RunConfig(
        recipe=name,
        stage="stage1",
        vision=vision,
        qformer=QFormerConfig(init="bert-base", attention_dropout=0.1),
        language=language,
        data=DataConfig(train="shards/train-*.tar", dev="shards/dev-*.tar", clean=True),
        optim=OptimConfig(lr=1e-4, min_lr=1e-5, warmup=2000),
        train=TrainConfig(steps=250_000, batch=batch, eval_every=5000, save_every=1000),
        eval=EvalConfig(images=1000, beams=5, min_tokens=8, max_tokens=30),
    )


def _stage2(name: str, first: RunConfig, batch: int) -> RunConfig:
    return replace(
        first,
        recipe=name,
        stage="stage2",
        optim=replace(first.optim, min_lr=5e-5),
        train=replace(first.train, steps=80_000, batch=batch),
    )


# An epoch counts every caption of COCO's Karpathy train and restval, every question of VQAv2's train and val.
COCO_CAPTIONS, VQA_QUESTIONS = 566_747, 658_111


def _finetuned(
    name: str, base: RunConfig, *, texts: int, batch: int, size: int, lr: float, decay: float, beta2: float = 0.999
) -> RunConfig:
    """Five epochs with the image encoder unfrozen (tables 8 to 10 of the appendix)."""
    return replace(
        base,
        recipe=name,
        vision=replace(base.vision, train=True, image_size=size),
        data=replace(base.data, cache_features=False),
        optim=OptimConfig(lr=lr, min_lr=0.0, warmup_lr=1e-8, warmup=1000, layer_decay=decay, betas=(0.9, beta2)),
        train=replace(base.train, steps=5 * texts // batch, batch=batch, eval_every=texts // batch),
    )


def _caption(name: str, base: RunConfig, decay: float) -> RunConfig:
    run = _finetuned(name, base, texts=COCO_CAPTIONS, batch=256, size=364, lr=1e-5, decay=decay)
    return replace(run, eval=replace(run.eval, best="cider"))


def _vqa(name: str, base: RunConfig, decay: float) -> RunConfig:
    run = _finetuned(name, base, texts=VQA_QUESTIONS, batch=128, size=490, lr=1e-5, decay=decay)
    return replace(
        run,
        qformer=replace(run.qformer, instruction="question"),
        data=replace(run.data, texts="questions"),
        eval=replace(run.eval, best="accuracy"),
    )


def _retrieval(name: str, base: RunConfig, *, lr: float, decay: float, beta2: float) -> RunConfig:
    run = _finetuned(name, base, texts=COCO_CAPTIONS, batch=224, size=364, lr=lr, decay=decay, beta2=beta2)
    return replace(run, eval=replace(run.eval, best="recall"))


def _instruct(name: str, language: LanguageConfig, batch: int) -> RunConfig:
    """Instruction tuning as in InstructBLIP (arXiv 2305.06500, section 2.6): what is between the towers trains.

    The instruction, of up to 128 tokens, enters the Q-Former and the language model.
    """
    base = _stage2(name, _stage1(name, VIT_G, language, batch), batch)
    return replace(
        base,
        qformer=replace(base.qformer, instruction="prompt", max_text=128),
        language=replace(language, prompt="A short image description.", question="{}", max_text=256),
        data=replace(base.data, texts="both", clean=False),
        optim=OptimConfig(lr=1e-5, min_lr=0.0, warmup_lr=1e-8, warmup=1000, betas=(0.9, 0.999)),
        train=replace(base.train, steps=60_000, eval_every=3000),
        eval=replace(base.eval, best="loss"),
    )


def vitg_opt_stage1() -> RunConfig:
    """ViT-g stage 1: 250k steps of 1,680 pairs; under six days on 16 A100-40G (section 4)."""
    return _stage1("vitg-opt2.7b/stage1", VIT_G, OPT, 1680)


def vitg_opt_stage2() -> RunConfig:
    """ViT-g to OPT-2.7B: 80k steps of 1,920 pairs; under three days on 16 A100-40G."""
    return _stage2("vitg-opt2.7b/stage2", vitg_opt_stage1(), 1920)


def vitg_t5_stage1() -> RunConfig:
    """ViT-g stage 1, the same as for OPT: one stage 1 serves both."""
    return _stage1("vitg-flant5xl/stage1", VIT_G, FLAN_T5, 1680)


def vitg_t5_stage2() -> RunConfig:
    """ViT-g to FlanT5-XL: 80k steps of 1,520 pairs; under three days on 16 A100-40G."""
    return _stage2("vitg-flant5xl/stage2", vitg_t5_stage1(), 1520)


def vitl_opt_stage1() -> RunConfig:
    """CLIP ViT-L/14 stage 1: 250k steps of 2,320 pairs."""
    return _stage1("vitl-opt2.7b/stage1", VIT_L, OPT, 2320)


def vitl_opt_stage2() -> RunConfig:
    """CLIP ViT-L/14 to OPT-2.7B: 80k steps of 1,920 pairs."""
    return _stage2("vitl-opt2.7b/stage2", vitl_opt_stage1(), 1920)


def vitg_opt_caption() -> RunConfig:
    """COCO captioning of ViT-g and OPT-2.7B from stage 2, at 364 px (table 8)."""
    return _caption("vitg-opt2.7b/caption", vitg_opt_stage2(), decay=1.0)


def vitg_t5_caption() -> RunConfig:
    """COCO captioning of ViT-g and FlanT5-XL from stage 2, at 364 px (table 8)."""
    return _caption("vitg-flant5xl/caption", vitg_t5_stage2(), decay=0.95)


def vitg_opt_vqa() -> RunConfig:
    """VQA of ViT-g and OPT-2.7B from stage 2, at 490 px, the question in the Q-Former too (table 9)."""
    return _vqa("vitg-opt2.7b/vqa", vitg_opt_stage2(), decay=0.95)


def vitg_t5_vqa() -> RunConfig:
    """VQA of ViT-g and FlanT5-XL from stage 2, at 490 px, the question in the Q-Former too (table 9)."""
    return _vqa("vitg-flant5xl/vqa", vitg_t5_stage2(), decay=0.9)


def vitg_opt_retrieval() -> RunConfig:
    """COCO retrieval of ViT-g from stage 1, at 364 px (table 10)."""
    return _retrieval("vitg-opt2.7b/retrieval", vitg_opt_stage1(), lr=1e-5, decay=0.95, beta2=0.999)


def vitl_opt_retrieval() -> RunConfig:
    """COCO retrieval of ViT-L from stage 1, at 364 px (table 10)."""
    return _retrieval("vitl-opt2.7b/retrieval", vitl_opt_stage1(), lr=5e-6, decay=1.0, beta2=0.98)


def vitg_opt_instruct() -> RunConfig:
    """InstructBLIP with OPT-2.7B, which its paper does not have: settings of its 3B model."""
    return _instruct("vitg-opt2.7b/instruct", OPT, 192)


def vitg_t5_instruct() -> RunConfig:
    """InstructBLIP with FlanT5-XL: 60k steps of 192 samples; within 1.5 days on 16 A100-40G (section 2.6).

    `--init blip2_pretrained_flant5xl.pth --init_text blip2_pretrained.pth`
    """
    return _instruct("vitg-flant5xl/instruct", FLAN_T5, 192)


def vitg_t5xxl_instruct() -> RunConfig:
    """InstructBLIP with FlanT5-XXL: 60k steps of 64 samples."""
    return _instruct("vitg-flant5xxl/instruct", replace(FLAN_T5, name="flan-t5-xxl"), 64)


def vitg_vicuna7b_instruct() -> RunConfig:
    """InstructBLIP with Vicuna-7B: 60k steps of 128 samples."""
    return _instruct("vitg-vicuna7b/instruct", VICUNA, 128)


def vitg_vicuna13b_instruct() -> RunConfig:
    """InstructBLIP with Vicuna-13B: 60k steps of 64 samples."""
    return _instruct("vitg-vicuna13b/instruct", replace(VICUNA, name="vicuna-13b"), 64)
