"""What the queries of a model specialise in over a data set: where each looks, and which captions it wins.

    result = specialisation(model, open_collection("flickr8k:dev").limited(200).samples)
    result.wins         # [Q] share of the captions for which a query gives their image's ITC score
    result.words[3]     # words that captions won by query 3 have more often than the others

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
from blip2.explain.attention import PatchMaps, cross_layers, grid_of, qformer_of
from blip2.explain.attention_maps import recording
from blip2.ops.devices import to_host, to_list
from blip2.weights.loaded import LoadedModel

WORDS, MIN_Z, MIN_IMAGES = 8, 3.0, 3  # a query's words: at most so many, so significant, in so many images
_PRIOR = 100.0  # weight of the data set's word frequencies in those of a query, in words
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
class Specialisation(PatchMaps):
    """What `specialisation` returns; tensors are float32 on the CPU.

    A query wins a text when its cosine with it is the largest of the image's: it gives the ITC score. Where one query
    wins nearly all texts, the others are told apart by what is usual for each: a query stands out for a text when its
    cosine, in standard deviations from its mean over all texts, is the largest of the image's.

    Args:
        grid: rows and columns of patches.
        prefix: image tokens in front of the patches, part of P.
        layers: numbers of the layers with cross-attention.
        images, texts: that were read.
        maps: [L, Q, P] attention of each query, mean over images and heads; sums to one over P.
        on_prefix: [Q] share of the attention that is on the prefix, mean over layers.
        spread: [Q] patches that a query attends to in one image: exp of the entropy over patches, mean over images.
            From 1 (one patch) to all of them (evenly).
        places: [Q] the same of the mean map. Near `spread` where a query looks at the same place in every image; larger
            where the place depends on the image.
        wins, stands_out: [Q] shares of the texts; each sums to one.
        mean_query_cosine: mean cosine between two queries of an image.
        words, own_words: per query, of the texts that it wins and of those for which it stands out; highest z first.
        examples: per query, texts for which it stands out, highest z first, each of another image.
        bad: samples that could not be read.
    """

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
class _ImageStatistics:
    """Of one image.

    Args:
        cosines: [N, Q] of its N captions with its queries.
        attention: [Q, P] mean over layers, half precision.
        spread: [Q] patches that a query attends to.
        query_cosine: mean cosine of two of its queries.
    """

    sample: Sample
    cosines: Tensor
    attention: Tensor
    spread: Tensor
    query_cosine: float


def specialisation(
    model: LoadedModel, samples: Sequence[Sample], *, examples: int = 4, progress: bool = False
) -> Specialisation:
    """Look at every image of a data set, and at which query wins each of its captions.

    Attention is kept for all images until the end, in half precision: 16 MB for 1,000 at the paper's sizes.

    Raises:
        ConfigError: the model has no stage 1, or no Q-Former.
        DataError: not one image with a caption could be read.
    """
    layers, prefix = cross_layers(qformer_of(model.stage1)), model.vision.prefix
    images: list[_ImageStatistics] = []
    bad: list[BadSample] = []
    maps_LQP = torch.zeros(())
    with tqdm(total=len(samples), unit="image", desc="looking", disable=not progress) as bar:
        for start in range(0, len(samples), model.batch):
            chunk = samples[start : start + model.batch]
            for statistics, image_maps_LQP in _statistics(model, chunk, bad):
                images.append(statistics)
                maps_LQP = maps_LQP + image_maps_LQP
            bar.update(len(chunk))
    if not images:
        raise DataError("no image with a caption" + (f", the first: {bad[0].key}: {bad[0].reason}" if bad else ""))
    maps_LQP, cosines_NQ = maps_LQP / len(images), torch.cat([image.cosines for image in images])
    mean_QP = maps_LQP.mean(dim=0)
    z_NQ = (cosines_NQ - cosines_NQ.mean(dim=0)) / cosines_NQ.std(dim=0, correction=0).clamp(min=1e-9)
    wins, stands_out = _Winners(images, cosines_NQ), _Winners(images, z_NQ)
    return Specialisation(
        grid=grid_of(model),
        prefix=prefix,
        layers=layers,
        images=len(images),
        texts=len(cosines_NQ),
        maps=maps_LQP,
        on_prefix=mean_QP[:, :prefix].sum(dim=1),
        spread=torch.stack([image.spread for image in images]).mean(dim=0),
        places=effective(_on_patches(mean_QP, prefix)),
        wins=wins.shares(),
        stands_out=stands_out.shares(),
        mean_query_cosine=sum(image.query_cosine for image in images) / len(images),
        words=over_represented(wins.words()),
        own_words=over_represented(stands_out.words()),
        examples=stands_out.examples(cosines_NQ, examples),
        bad=bad,
    )


def over_represented(groups: Sequence[Counter[str]]) -> list[list[Word]]:
    """Words of each group that it has more often than all others together.

    Log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations
    16 and 20-22): the prior is the words of all groups, scaled to 100 of them, so that rare words prove little.
    """
    overall: Counter[str] = sum(groups, Counter())
    total = sum(overall.values())
    if len(overall) < 2:  # a single word is equally frequent in all groups
        return [[] for _ in groups]
    result = []
    for group in groups:
        size = sum(group.values())
        words = [
            Word(word, _z(count, size, overall[word] - count, total - size, _PRIOR * overall[word] / total), count)
            for word, count in group.items()
            if count >= MIN_IMAGES
        ]
        significant = [word for word in words if word.z >= MIN_Z]
        result.append(sorted(significant, key=lambda word: (-word.z, word.word))[:WORDS])
    return result


def _z(count: int, size: int, other_count: int, other_size: int, prior: float) -> float:
    """Log-odds ratio of a word in two groups, in standard errors; counts of the word and sizes of the groups."""
    first, second = count + prior, other_count + prior
    difference = math.log(first / (size + _PRIOR - first)) - math.log(second / (other_size + _PRIOR - second))
    return difference / math.sqrt(1 / first + 1 / second)


def effective(shares: Tensor) -> Tensor:
    """exp of the entropy [...] of distributions [..., P]: the number of equal shares with the same entropy."""
    return torch.special.entr(shares).sum(dim=-1).exp()


class _Winners:
    """Which query has the largest score for each text.

    Args:
        images: their captions are the N texts, in order.
        scores_NQ: of the texts' own images.
    """

    def __init__(self, images: list[_ImageStatistics], scores_NQ: Tensor) -> None:
        self.texts = [(n, caption) for n, image in enumerate(images) for caption in image.sample.captions]
        self.images, self.scores_NQ = images, scores_NQ
        self.queries: list[int] = to_list(scores_NQ.argmax(dim=1))

    def shares(self) -> Tensor:
        """[Q] share of the texts."""
        counts_Q = torch.bincount(torch.tensor(self.queries), minlength=self.scores_NQ.shape[1])
        return counts_Q / len(self.queries)

    def words(self) -> list[Counter[str]]:
        """Words per query; once per image, whose captions repeat each other."""
        of_image: dict[tuple[int, int], set[str]] = {}
        for (image, caption), query in zip(self.texts, self.queries, strict=True):
            of_image.setdefault((query, image), set()).update(words_of(caption))
        counts: list[Counter[str]] = [Counter() for _ in range(self.scores_NQ.shape[1])]
        for (query, _), words in of_image.items():
            counts[query].update(words)
        return counts

    def examples(self, cosines_NQ: Tensor, count: int) -> list[list[Example]]:
        """Per query the texts that it has with the largest scores, each of another image."""
        examples: list[list[Example]] = [[] for _ in range(self.scores_NQ.shape[1])]
        best_N = self.scores_NQ.amax(dim=1)
        shown: set[tuple[int, int]] = set()
        for n in to_list(best_N.argsort(descending=True, stable=True)):
            query, (image, caption) = self.queries[n], self.texts[n]
            if len(examples[query]) < count and (query, image) not in shown:
                shown.add((query, image))
                sample, attention_P = self.images[image].sample, self.images[image].attention[query].float()
                cosine = float(cosines_NQ[n, query])
                examples[query].append(Example(sample, caption, cosine, float(best_N[n]), attention_P))
        return examples


def words_of(caption: str) -> list[str]:
    """Words in lower case, without figures and punctuation."""
    return _WORD.findall(caption.lower())


def _on_patches(maps_QP: Tensor, prefix: int) -> Tensor:
    """Maps over the patches alone, each summing to one."""
    patches = maps_QP[..., prefix:]
    return patches / patches.sum(dim=-1, keepdim=True).clamp(min=1e-12)


def _statistics(
    model: LoadedModel, samples: Sequence[Sample], bad: list[BadSample]
) -> Iterator[tuple[_ImageStatistics, Tensor]]:
    """Statistics and attention [L, Q, P] of every image that can be read and has captions; `bad` takes the others."""
    good: list[Sample] = []
    images: list[Image.Image] = []
    for sample in samples:
        try:
            if not sample.captions:
                raise BadSampleError("no caption")
            images.append(decode_image(sample.read()))
            good.append(sample)
        except BadSampleError as error:
            bad.append(BadSample(sample.key, sample.path, error.reason))
    if not good:
        return
    features_BPC = model.features(images)
    texts = model.embed_texts([caption for sample in good for caption in sample.captions])
    for n, (sample, texts_NE) in enumerate(zip(good, texts.split([len(s.captions) for s in good]), strict=True)):
        maps_LQP, queries_QE = _attended(model, features_BPC[n : n + 1])
        Q, mean_QP = len(queries_QE), maps_LQP.mean(dim=0)
        # of two different queries: both are of unit norm
        query_cosine = float(((queries_QE @ queries_QE.T).sum() - Q) / max(Q * (Q - 1), 1))
        spread_Q = effective(_on_patches(mean_QP, model.vision.prefix))
        yield _ImageStatistics(sample, texts_NE @ queries_QE.T, mean_QP.half(), spread_Q, query_cosine), maps_LQP


@torch.no_grad()
def _attended(model: LoadedModel, features_1PC: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [L, Q, P] and query embeddings [Q, E] of one image."""
    stage1 = model.stage1
    shadow, recorded = recording(qformer_of(stage1))
    queries_1QD, _ = shadow.encode_queries(stage1.project_image(features_1PC))
    queries_QE = stage1.image_embeddings(queries_1QD)[0]
    return recorded.maps(), to_host(queries_QE)
