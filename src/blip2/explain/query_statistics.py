"""What the queries of a model specialise in over a data set: where each looks, and which captions it wins.

    found = specialisation(model, open_collection("flickr8k:dev").limited(200).samples)
    found.wins          # [Q] share of the captions for which a query gives their image's ITC score
    found.words[3]      # words that captions won by query 3 have more often than the others

Shape letters: Q queries, P tokens of the image encoder, L cross-attention layers, N captions, C image-encoder
channels, E contrastive width.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from blip2.data.collection import BadSample, BadSampleError, Sample
from blip2.data.images import decode_image
from blip2.errors import DataError
from blip2.explain.attention import cross_layers, grid_of, qformer_of
from blip2.explain.attention_maps import recording
from blip2.explain.types import Explainable
from blip2.ops.devices import to_host, to_list

WORDS, LEAST_Z, LEAST_IMAGES = 8, 3.0, 3  # of a query's words: how many, how sure, in how many images
_PRIOR = 100.0  # words of the data set as a whole that stand for what is known of a query before it is seen
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


@dataclass(frozen=True)
class Word:
    """A word that is over-represented in the captions that a query wins.

    Args:
        z: log-odds ratio against the captions of all other queries, in standard errors.
        images: in whose won captions it stands.
    """

    word: str
    z: float
    images: int


@dataclass(frozen=True)
class Example:
    """A caption for which a query stands out.

    Args:
        z: its cosine against the query's own over the data set, in standard deviations.
        attention: [P] where the query looks, mean over layers.
    """

    sample: Sample
    caption: str
    cosine: float
    z: float
    attention: Tensor


@dataclass
class Specialisation:
    """What `specialisation` found; tensors are float32 on the CPU.

    A query wins a text when its cosine with it is the largest of the image's: it gives the ITC score. Where one query
    wins nearly everything, what the others are after shows only against what is usual for them: a query stands out for
    a text when its cosine, in standard deviations from its mean over all texts, is the largest of the image's.

    Args:
        grid: rows and columns of patches.
        prefix: image tokens in front of the patches, part of P.
        layers: numbers of the layers with cross-attention.
        images, texts: that were read.
        maps: [L, Q, P] attention of each query, mean over images and heads; sums to one over P.
        on_prefix: [Q] share of the attention that is on the prefix, mean over layers.
        spread: [Q] patches that a query attends to in one image: exp of the entropy over patches, mean over images.
            From 1 (one patch) to all of them (everywhere alike).
        places: [Q] the same of the mean map. Near `spread` where a query looks at the same place in every image; larger
            where the place follows the picture.
        wins, stands_out: [Q] shares of the texts; each sums to one.
        mean_query_cosine: mean cosine between two queries of an image.
        words, own_words: per query, of the texts that it wins and of those for which it stands out; most sure first.
        examples: per query, for which it stands out most first, each of another image.
        bad: samples that could not be read.
    """

    grid: tuple[int, int]
    prefix: int
    layers: list[int]
    images: int
    texts: int
    maps: Tensor
    on_prefix: Tensor
    spread: Tensor
    places: Tensor
    wins: Tensor
    stands_out: Tensor
    mean_query_cosine: float
    words: list[list[Word]]
    own_words: list[list[Word]]
    examples: list[list[Example]]
    bad: list[BadSample] = field(default_factory=list)

    @property
    def winners(self) -> float:
        """Queries that win, as an effective number: exp of the entropy of `wins`."""
        return float(effective(self.wins))


@dataclass(frozen=True)
class _Look:
    """One image: its attention [L, Q, P], and the cosines [N, Q] of its captions with its queries."""

    sample: Sample
    maps: Tensor
    cosines: Tensor
    mean_query_cosine: float


def specialisation(
    model: Explainable, samples: Sequence[Sample], *, examples: int = 4, progress: bool = False
) -> Specialisation:
    """Look at every image of a data set, and at which query wins each of its captions.

    Attention is kept for all images until the end, in half precision: 16 MB for 1,000 at the paper's sizes.

    Raises:
        ConfigError: the model has no stage 1, or no Q-Former.
        DataError: not one image with a caption could be read.
    """
    layers, prefix = cross_layers(qformer_of(model.stage1)), model.vision.prefix
    kept: list[Sample] = []
    cosines: list[Tensor] = []
    attention: list[Tensor] = []
    bad: list[BadSample] = []
    maps_LQP, spread_Q, mean_query_cosine = torch.zeros(()), torch.zeros(()), 0.0
    with tqdm(total=len(samples), unit="image", desc="looking", disable=not progress) as bar:
        for start in range(0, len(samples), model.batch):
            chunk = samples[start : start + model.batch]
            for look in _looked(model, chunk, bad):
                mean_QP = look.maps.mean(dim=0)
                kept.append(look.sample)
                cosines.append(look.cosines)
                attention.append(mean_QP.half())
                maps_LQP = maps_LQP + look.maps
                spread_Q = spread_Q + effective(_on_patches(mean_QP, prefix))
                mean_query_cosine += look.mean_query_cosine
            bar.update(len(chunk))
    if not kept:
        raise DataError("no image with a caption" + (f", the first: {bad[0].key}: {bad[0].reason}" if bad else ""))
    count, cosines_NQ = len(kept), torch.cat(cosines)
    mean_QP = maps_LQP.mean(dim=0) / count
    z_NQ = (cosines_NQ - cosines_NQ.mean(dim=0)) / cosines_NQ.std(dim=0, correction=0).clamp(min=1e-9)
    wins, own = _Won(kept, cosines_NQ), _Won(kept, z_NQ)
    return Specialisation(
        grid_of(model),
        prefix,
        layers,
        count,
        len(cosines_NQ),
        maps_LQP / count,
        mean_QP[:, :prefix].sum(dim=1),
        spread_Q / count,
        effective(_on_patches(mean_QP, prefix)),
        wins.shares(),
        own.shares(),
        mean_query_cosine / count,
        over_represented(wins.words()),
        over_represented(own.words()),
        own.examples(cosines_NQ, attention, examples),
        bad,
    )


def over_represented(groups: Sequence[Counter[str]]) -> list[list[Word]]:
    """Words of each group that it has more often than all others together.

    Log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations
    16 and 20-22): the prior is the words of all groups, scaled to 100 of them, so that rare words prove little.
    """
    whole: Counter[str] = sum(groups, Counter())
    total = sum(whole.values())
    if len(whole) < 2:  # one word is everywhere alike
        return [[] for _ in groups]
    found = []
    for group in groups:
        size = sum(group.values())
        words = [
            Word(word, _z(count, size, whole[word] - count, total - size, _PRIOR * whole[word] / total), count)
            for word, count in group.items()
            if count >= LEAST_IMAGES
        ]
        sure = [word for word in words if word.z >= LEAST_Z]
        found.append(sorted(sure, key=lambda word: (-word.z, word.word))[:WORDS])
    return found


def _z(here: int, size: int, elsewhere: int, rest: int, prior: float) -> float:
    one, other = here + prior, elsewhere + prior
    difference = math.log(one / (size + _PRIOR - one)) - math.log(other / (rest + _PRIOR - other))
    return difference / math.sqrt(1 / one + 1 / other)


def effective(shares: Tensor) -> Tensor:
    """exp of the entropy [...] of distributions [..., P]: how many equal shares they are worth."""
    return torch.special.entr(shares).sum(dim=-1).exp()


class _Won:
    """Which query has the largest score for each text.

    Args:
        samples: their captions are the N texts, in order.
        scores_NQ: of the texts' own images.
    """

    def __init__(self, samples: list[Sample], scores_NQ: Tensor) -> None:
        self.texts = [(image, caption) for image, sample in enumerate(samples) for caption in sample.captions]
        self.samples, self.scores_NQ = samples, scores_NQ
        self.queries: list[int] = to_list(scores_NQ.argmax(dim=1))

    def shares(self) -> Tensor:
        """[Q] share of the texts."""
        counts_Q = torch.bincount(torch.tensor(self.queries), minlength=self.scores_NQ.shape[1])
        return counts_Q / len(self.queries)

    def words(self) -> list[Counter[str]]:
        """Words per query; once per image, whose captions repeat each other."""
        said: dict[tuple[int, int], set[str]] = {}
        for (image, caption), query in zip(self.texts, self.queries, strict=True):
            said.setdefault((query, image), set()).update(words_of(caption))
        found: list[Counter[str]] = [Counter() for _ in range(self.scores_NQ.shape[1])]
        for (query, _), words in said.items():
            found[query].update(words)
        return found

    def examples(self, cosines_NQ: Tensor, attention: list[Tensor], count: int) -> list[list[Example]]:
        """Per query the texts that it has with the largest scores, each of another image."""
        found: list[list[Example]] = [[] for _ in range(self.scores_NQ.shape[1])]
        best_N = self.scores_NQ.amax(dim=1)
        shown: set[tuple[int, int]] = set()
        for n in to_list(best_N.argsort(descending=True, stable=True)):
            query, (image, caption) = self.queries[n], self.texts[n]
            if len(found[query]) < count and (query, image) not in shown:
                shown.add((query, image))
                cosine, looked = float(cosines_NQ[n, query]), attention[image][query].float()
                found[query].append(Example(self.samples[image], caption, cosine, float(best_N[n]), looked))
        return found


def words_of(caption: str) -> list[str]:
    """Words in lower case, without figures and punctuation."""
    return _WORD.findall(caption.lower())


def _on_patches(maps_QP: Tensor, prefix: int) -> Tensor:
    """Maps over the patches alone, each summing to one."""
    patches = maps_QP[..., prefix:]
    return patches / patches.sum(dim=-1, keepdim=True).clamp(min=1e-12)


def _alike(queries_QE: Tensor) -> Tensor:
    """Mean cosine of two different rows of unit norm."""
    Q = len(queries_QE)
    return ((queries_QE @ queries_QE.T).sum() - Q) / max(Q * (Q - 1), 1)


def _looked(model: Explainable, samples: Sequence[Sample], bad: list[BadSample]) -> Iterator[_Look]:
    """Every image that can be read and has captions."""
    good: list[Sample] = []
    pictures: list[Image.Image] = []
    for sample in samples:
        try:
            if not sample.captions:
                raise BadSampleError("no caption")
            pictures.append(decode_image(sample.read()))
            good.append(sample)
        except BadSampleError as error:
            bad.append(BadSample(sample.key, sample.path, error.reason))
    if not good:
        return
    features_BPC = model.features(pictures)
    texts = model.embed_texts([caption for sample in good for caption in sample.captions])
    for n, (sample, texts_NE) in enumerate(zip(good, texts.split([len(s.captions) for s in good]), strict=True)):
        maps_LQP, queries_QE = _attended(model, features_BPC[n : n + 1])
        yield _Look(sample, maps_LQP, texts_NE @ queries_QE.T, float(_alike(queries_QE)))


@torch.no_grad()
def _attended(model: Explainable, features_1PC: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [L, Q, P] and query embeddings [Q, E] of one image."""
    stage1 = model.stage1
    shadow, recorded = recording(qformer_of(stage1))
    queries_1QD, _ = shadow.encode_queries(stage1.project_image(features_1PC))
    queries_QE = stage1.image_embeddings(queries_1QD)[0]
    return recorded.maps(), to_host(queries_QE)
