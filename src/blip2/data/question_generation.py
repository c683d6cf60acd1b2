"""Questions whose answers several captions of an image agree on, written by rule.

A model that learned from captions alone answers questions with captions. Data sets without questions
get simple ones here, in the manner of COCO-QA (arXiv 1505.02074): what is there, how many, which
colour, what somebody does, where. English only; what fewer than two captions say is not asked.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from blip2.data.collection import Question

_AGREED = 2  # captions that must say the same
_SINGLE = 0.25  # of the images with one dog are asked how many dogs there are: most have one

_NUMBERS = {"a": "one", "an": "one", "one": "one", "two": "two", "three": "three", "four": "four", "five": "five"}
_COLOURS = {"white", "black", "brown", "red", "blue", "yellow", "green", "orange", "pink", "purple", "tan", "gray"}
_SAME = {"grey": "gray", "bicycle": "bike", "ocean": "sea", "sidewalk": "street", "road": "street", "grassy": "grass"}
_SAME |= {"snowy": "snow", "puppy": "dog", "lady": "woman", "guy": "man", "kid": "child", "toddler": "child"}
_PLURALS = {"men": "man", "women": "woman", "children": "child", "people": "person", "kids": "child"}
_ANIMALS = ("dog", "horse", "bird", "cat", "cow", "sheep")
_PEOPLE = ("man", "woman", "boy", "girl", "child", "person", "baby")
# What is asked after besides animals and people; each is also what is denied of other images.
_THINGS = (
    *("ball", "bike", "car", "boat", "skateboard", "frisbee", "bench", "hat", "motorcycle", "horse", "surfboard"),
    *("tree", "rock", "fence", "building", "guitar", "helmet", "swing", "slide", "pool", "snow", "sand", "grass"),
)
_COUNTED = (*_ANIMALS, *_PEOPLE, "player")
_COLOURED = ("dog", "shirt", "jacket", "hat", "ball", "dress", "coat", "horse", "helmet", "car", "bike", "boat")
_ACTORS = (*_ANIMALS, *_PEOPLE, "player", "surfer", "skateboarder", "snowboarder", "skier", "biker")
# Each with what else stands for it in a caption; the first is the answer.
_PLACES = {
    "in the snow": ("snow",),
    "on the beach": ("beach",),
    "in the water": ("water", "sea", "pool", "lake", "river"),
    "on the street": ("street",),
    "on the grass": ("grass", "field"),
    "in the mountains": ("mountain", "mountains", "cliff"),
    "in the woods": ("woods", "forest"),
    "in a park": ("park", "playground"),
}
_NOT_ACTS = {
    "wearing",
    "doing",
    "being",
    "during",
    "something",
    "building",
    "morning",
    "evening",
    "wedding",
    "ring",
    "string",
}
_NOT_ACTS |= {"clothing", "bathing", "swing", "spring", "king", "wing", "living", "railing", "nothing", "ceiling"}


_KNOWN = {*_COUNTED, *_THINGS, *_ACTORS, *_COLOURED}
_PLURAL = {"man": "men", "woman": "women", "child": "children", "person": "people", "baby": "babies"}


def questions_from(captions: Sequence[str]) -> tuple[Question, ...]:
    """Questions about an image with one answer each; the same captions give the same questions.

    Returns:
        At most a dozen, each with its kind; none where the captions agree on nothing.
    """
    texts = [_words(caption) for caption in captions]
    said = Counter(word for text in texts for word in set(text))
    rng = np.random.default_rng(zlib.crc32(" ".join(captions).encode()))
    counts = _counts(texts)
    several = {noun for noun, number in counts.items() if number != "one"}
    questions = [*_what(said, several), *_how_many(counts, rng), *_colours(texts), *_acts(texts, several)]
    return (*questions, *_places(said), *_presence(said, rng))


def _words(caption: str) -> list[str]:
    """Lower-case words, singular and by one name each where another is known."""
    words = re.findall(r"[a-z]+", caption.lower())
    return [_singular(_SAME.get(word, word)) for word in words]


def _singular(word: str) -> str:
    if word in _PLURALS:
        return _PLURALS[word]
    return word[:-1] if word.endswith("s") and word[:-1] in _KNOWN else word


def _agreed(values: Iterable[set[str]]) -> Iterator[str]:
    """Values that enough captions give, where no other value has as many."""
    counts = Counter(itertools.chain.from_iterable(values)).most_common(2)
    if counts and counts[0][1] >= _AGREED and (len(counts) == 1 or counts[1][1] < counts[0][1]):
        yield counts[0][0]


def _question(text: str, answer: str, kind: str) -> Question:
    return Question(text, (answer,), kind)


def _what(said: Counter[str], several: set[str]) -> Iterator[Question]:
    there = [name for name in _ANIMALS if said[name] >= _AGREED]
    if len(there) == 1:
        yield _question("What animal is in the picture?", there[0], "object")
    people = [name for name in ("man", "woman", "boy", "girl") if said[name] >= _AGREED]
    if len(people) == 1 and people[0] not in several:
        yield _question("Who is in the picture?", f"a {people[0]}", "object")


def _counts(texts: list[list[str]]) -> dict[str, str]:
    return {
        noun: number
        for noun in _COUNTED
        for number in _agreed({_NUMBERS[w] for w in _before(text, noun) if w in _NUMBERS} for text in texts)
    }


def _how_many(counts: dict[str, str], rng: np.random.Generator) -> Iterator[Question]:
    for noun, number in counts.items():
        if number != "one" or rng.random() < _SINGLE:
            yield _question(f"How many {_PLURAL.get(noun, noun + 's')} are there?", number, "number")


def _colours(texts: list[list[str]]) -> Iterator[Question]:
    for noun in _COLOURED:
        for colour in _agreed({w for w in _before(text, noun) if w in _COLOURS} for text in texts):
            yield _question(f"What color is the {noun}?", colour, "color")


def _before(text: list[str], noun: str) -> list[str]:
    """The one or two words before a noun where it comes once; nothing where it comes more often."""
    places = [n for n, word in enumerate(text) if word == noun]
    return text[max(0, places[0] - 2) : places[0]] if len(places) == 1 else []


def _acts(texts: list[list[str]], several: set[str]) -> Iterator[Question]:
    for noun in _ACTORS:
        for act in _agreed({*_act_of(text, noun)} for text in texts):
            who = f"are the {_PLURAL.get(noun, noun + 's')}" if noun in several else f"is the {noun}"
            yield _question(f"What {who} doing?", act, "action")


def _act_of(text: list[str], noun: str) -> Iterator[str]:
    """The first word in -ing soon behind the first such noun, if no other actor stands between."""
    if noun not in text:
        return
    for word in text[text.index(noun) + 1 :][:4]:
        if word in _ACTORS:
            return
        if word.endswith("ing") and len(word) > 4 and word not in _NOT_ACTS:
            yield word
            return


def _places(said: Counter[str]) -> Iterator[Question]:
    there = [place for place, words in _PLACES.items() if max(said[word] for word in words) >= _AGREED]
    if len(there) == 1:
        yield _question("Where was the picture taken?", there[0], "place")


def _presence(said: Counter[str], rng: np.random.Generator) -> Iterator[Question]:
    """As many things denied as affirmed, at most two each; nothing that any caption mentions is denied."""
    names = list(dict.fromkeys((*_ANIMALS, *(name for name in _PEOPLE if name != "person"), *_THINGS)))
    there = [name for name in names if said[name] >= _AGREED]
    absent = [name for name in names if not said[name] and not (name in _PEOPLE and any(said[p] for p in _PEOPLE))]
    count = min(2, len(there), len(absent))
    for answer, among in (("yes", there), ("no", absent)):
        for n in rng.permutation(len(among))[:count]:
            article = "" if among[n] in ("snow", "sand", "grass") else "an " if among[n][0] in "aeiou" else "a "
            yield _question(f"Is there {article}{among[n]} in the picture?", answer, "yes/no")
