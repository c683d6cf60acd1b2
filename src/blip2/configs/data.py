"""What a run learns from and how it is read."""

from __future__ import annotations

from dataclasses import dataclass

from blip2.configs.checks import require

TEXTS = ("captions", "questions", "both")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how.

    Args:
        train, dev: a named set (`flickr8k:train`), tar shards (path, glob or brace range), a folder
            of images with sidecar texts, or a JSONL file; or a weighted mixture (`a.tar*2+b.tar`).
        limit, dev_limit: use only the first N usable images (of each part of a mixture); None uses all.
        texts: what is learned: `captions`, `questions` with their answers, or `both`, every fifth a
            question (stage 2). One of an image's is drawn at each step, and of a question's answers one,
            as often as people gave it. Of an image without questions `both` asks what its captions
            agree on (`blip2.data.question_generation`).
        texts_per_image: draw so many of an image's texts at each step instead (stage 2). Encoder,
            Q-Former and soft prompts are computed once for all of them.
        clean: captions as LAVIS cleans them, here and in use: lower case, without marks but the comma.
        shots: stage 2: pairs go to the language model in sequences of `shots` + 1, image, text, image,
            text, ..., so that it learns to read examples; 0 gives it one pair at a time.
        augment: random resized crop and horizontal flip (needs the images: with a feature cache
            it takes effect through `cache_views`).
        crop_min: smallest share of the image's area that a random crop keeps.
        cache_features: encode every image once and keep the features on disk (memory-mapped).
        cache_views: views per image in the cache; view 0 is plain, further ones are augmented.
        workers: loader processes; None picks 0 with a feature cache, else the cores but one.
    """

    train: str = "flickr8k:train"
    dev: str | None = "flickr8k:dev"
    limit: int | None = None
    dev_limit: int | None = None
    texts: str = "captions"
    texts_per_image: int = 1
    clean: bool = False
    shots: int = 0
    augment: bool = True
    crop_min: float = 0.5
    cache_features: bool = False
    cache_views: int = 1
    workers: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", self.train, "a data set")
        for name in ("limit", "dev_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}", value, "1 or more")
        require(self.texts in TEXTS, "data.texts", self.texts, f"one of {', '.join(TEXTS)}")
        require(self.texts_per_image >= 1, "data.texts_per_image", self.texts_per_image, "1 or more")
        require(self.shots >= 0, "data.shots", self.shots, "0 or more")
        require(0 < self.crop_min <= 1, "data.crop_min", self.crop_min, "in (0, 1]")
        require(self.cache_views >= 1, "data.cache_views", self.cache_views, "1 or more")
        require(self.workers is None or self.workers >= 0, "data.workers", self.workers, "0 or more")
