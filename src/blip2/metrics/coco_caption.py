"""The official caption scorers (pycocoevalcap), where they and their Java are installed.

A score that cannot be had is named with its reason, never 0 and never left out silently.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NO_PACKAGE = "pycocoevalcap is not installed: pip install --no-deps pycocoevalcap==1.2"
_NO_JAVA = "needs Java on the PATH"
# Module and class of each scorer, and the metrics that it gives.
_SCORERS = (
    ("bleu.bleu", "Bleu", ("bleu1", "bleu2", "bleu3", "bleu4")),
    ("meteor.meteor", "Meteor", ("meteor",)),
    ("rouge.rouge", "Rouge", ("rouge_l",)),
    ("cider.cider", "Cider", ("cider",)),
    ("spice.spice", "Spice", ("spice",)),
)
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def official_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE by pycocoevalcap on PTB tokens, in percent.

    Args:
        candidates: one caption per image.
        references: one or more captions per image.

    Returns:
        Scores by metric, and the reason by metric for those that cannot be had here.
    """
    metrics = [key for _, _, keys in _SCORERS for key in keys]
    if importlib.util.find_spec("pycocoevalcap") is None:
        return {}, dict.fromkeys(metrics, _NO_PACKAGE)
    if shutil.which("java") is None:
        return {}, dict.fromkeys(metrics, _NO_JAVA)
    truth = {n: [{"caption": text} for text in texts] for n, texts in enumerate(references)}
    guesses = {n: [{"caption": text}] for n, text in enumerate(candidates)}
    scores: dict[str, float] = {}
    missing: dict[str, str] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            tokenizer = _scorer("tokenizer.ptbtokenizer", "PTBTokenizer")
            truth, guesses = tokenizer.tokenize(truth), tokenizer.tokenize(guesses)
        except Exception as error:  # the scorers run Java and raise anything
            return {}, dict.fromkeys(metrics, _reason(error))
        for module, name, keys in _SCORERS:
            if name == "Spice" and (reason := _spice_missing()):
                missing["spice"] = reason
                continue
            try:
                value, _ = _scorer(module, name).compute_score(truth, guesses)
            except Exception as error:
                missing |= dict.fromkeys(keys, _reason(error))
                continue
            values = value if isinstance(value, list | tuple) else [value]
            scores |= {key: 100.0 * float(v) for key, v in zip(keys, values, strict=True)}
    return scores, missing


def _scorer(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)()


def _spice_missing() -> str | None:
    """Why SPICE cannot run: its scorer would download 400 MB by itself."""
    spec = importlib.util.find_spec("pycocoevalcap.spice")
    places = list(spec.submodule_search_locations or ()) if spec else []
    folder = Path(places[0]) / "lib" if places else Path("lib")
    absent = [jar for jar in _SPICE_JARS if not (folder / jar).is_file()]
    return f"needs {absent[0]} in {folder} (Stanford CoreNLP 3.6.0)" if absent else None


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
