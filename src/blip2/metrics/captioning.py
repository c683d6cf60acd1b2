"""Caption metrics in plain Python: BLEU, CIDEr, ROUGE-L.

All take `candidates`, one caption per image, and `references`, one or more captions per image, and return percent as
papers print them (BLEU-4 43.7, CIDEr 145.8). They raise ValueError for no images, different numbers of images, or an
image without references. The formulas are those of pycocoevalcap 1.2; only its tokeniser, a Java program, is replaced
by `tokenize`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

Ngram = tuple[str, ...]

CIDER_N = 4
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2

_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_TOKEN = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-.,'/]\w+)*|[^\w\s]")
# What pycocoevalcap's PTBTokenizer drops, but for bracket names, plus single quotes and brackets.
_PUNCTUATION = frozenset("'`\".?!,:;-–—…()[]{}‘’“”")


def tokenize(text: str) -> list[str]:
    """Lower-case words in the manner of the Penn Treebank, punctuation dropped.

    "A man's T-shirt isn't red." gives a, man, 's, t-shirt, is, n't, red.
    Of the 35,455 captions of Flickr8k train and dev, 20 differ from the Java tokeniser's: it keeps
    an abbreviation's last dot and writes brackets as words.
    """
    text = text.lower().replace("’", "'").replace("cannot", "can not")
    text = _CONTRACTION.sub(r" \1", text)
    return [token for token in _TOKEN.findall(text) if token not in _PUNCTUATION]


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU-1 to BLEU-4 in percent, with the closest reference length (ACL P02-1040).

    Counts are summed over the corpus before dividing. Per image the reference length nearest to
    the candidate's is taken, the shorter of two equally near.

    Returns:
        `bleu1`, `bleu2`, `bleu3`, `bleu4`, each in [0, 100].
    """
    pairs = _tokenized(candidates, references)
    guessed, correct = [0] * 4, [0] * 4
    candidate_length = reference_length = 0
    for candidate, refs in pairs:
        candidate_length += len(candidate)
        reference_length += min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]
        counts = _ngrams(candidate)
        most: Counter[Ngram] = Counter()
        for ref in refs:
            most |= _ngrams(ref)
        for gram, count in counts.items():
            guessed[len(gram) - 1] += count
            correct[len(gram) - 1] += min(count, most[gram])
    # pycocoevalcap's guards against empty candidates and orders without a match.
    tiny, small = 1e-15, 1e-9
    ratio = (candidate_length + tiny) / (reference_length + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    result, product = {}, 1.0
    for k in range(4):
        product *= (correct[k] + tiny) / (guessed[k] + small)
        result[f"bleu{k + 1}"] = 100.0 * brevity * product ** (1 / (k + 1))
    return result


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr as the field reports it (pycocoevalcap's CIDEr-D: n to 4, sigma 6), in percent.

    TF-IDF vectors of n-grams, counts clipped to the reference's, times a Gaussian penalty on the
    difference in length, averaged over references, n and images; x 10 x 100. Document frequencies come
    from `references`, so a score depends on the whole set and is 0 for a single image.
    On Flickr8k dev, 1,000 images with 4 references each, every image's score equals that of
    pycocoevalcap's scorer on the same tokens to 2e-13; so do BLEU-1 to 4 and ROUGE-L.
    """
    return float(np.mean(cider_per_image(candidates, references)))


def cider_per_image(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr of every single image, in percent; `cider` is their mean."""
    pairs = _tokenized(candidates, references)
    counted = [(_ngrams(candidate), [_ngrams(ref) for ref in refs]) for candidate, refs in pairs]
    documents = Counter(gram for _, refs in counted for gram in set().union(*refs))
    log_images = math.log(len(pairs))
    scores = []
    for candidate, refs in counted:
        vector = _Vector(candidate, documents, log_images)
        similarities = [vector.clipped_cosine(_Vector(ref, documents, log_images)) for ref in refs]
        scores.append(1000.0 * math.fsum(similarities) / len(refs))
    return scores


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L in percent: F-measure (beta 1.2) of the longest common subsequence, averaged over images.

    As in pycocoevalcap, precision and recall are each the best over an image's references.
    """
    total = 0.0
    for candidate, refs in _tokenized(candidates, references):
        common = [_common_subsequence(candidate, ref) for ref in refs]
        precision = max(common) / len(candidate) if candidate else 0.0
        recall = max(c / len(ref) if ref else 0.0 for c, ref in zip(common, refs, strict=True))
        if precision and recall:
            total += (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return 100.0 * total / len(candidates)


class _Vector:
    """TF-IDF of a caption's n-grams, one norm per n, and the length that CIDEr's penalty uses."""

    def __init__(self, counts: Mapping[Ngram, int], documents: Mapping[Ngram, int], log_images: float) -> None:
        self.weights: list[dict[Ngram, float]] = [{} for _ in range(CIDER_N)]
        for gram, count in counts.items():
            self.weights[len(gram) - 1][gram] = count * (log_images - math.log(max(1, documents.get(gram, 0))))
        self.norms = [math.sqrt(math.fsum(w * w for w in weights.values())) for weights in self.weights]
        # pycocoevalcap measures length in bigrams; only differences count.
        self.length = sum(count for gram, count in counts.items() if len(gram) == 2)

    def clipped_cosine(self, reference: _Vector) -> float:
        """Mean over n of the clipped cosine with a reference, times the length penalty."""
        penalty = math.exp(-((self.length - reference.length) ** 2) / (2 * CIDER_SIGMA**2))
        total = 0.0
        for own, theirs, norm, other in zip(self.weights, reference.weights, self.norms, reference.norms, strict=True):
            if norm and other:
                dot = math.fsum(min(w, theirs[gram]) * theirs[gram] for gram, w in own.items() if gram in theirs)
                total += dot / (norm * other)
        return penalty * total / CIDER_N


def _tokenized(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> list[tuple[list[str], list[list[str]]]]:
    if not candidates or len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates and {len(references)} lists of references: one each per image")
    for i, refs in enumerate(references):
        if not refs or isinstance(refs, str):
            raise ValueError(f"references of image {i} are {refs!r}: a list of one or more captions is needed")
    return [
        (tokenize(candidate), [tokenize(ref) for ref in refs])
        for candidate, refs in zip(candidates, references, strict=True)
    ]


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two token lists."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]
