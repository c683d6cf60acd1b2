"""Load transformers models from a folder or the hub: quietly, strictly, with one-line errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from blip2.errors import CheckpointError


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars, load reports and retries of transformers and huggingface_hub."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, hub_level = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Quiet, and turn what transformers raises for a bad source into one line that names it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet():
            yield
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, StrictDataclassError) as error:
        if Path(source).exists():
            reason = shorten(str(error), 200, placeholder=" ...")
            kind = "folder" if Path(source).is_dir() else "file"
            raise CheckpointError(f"{source}: not a {kind} that transformers can load ({reason})") from error
        raise CheckpointError(
            f"{source}: no such folder, and it cannot be loaded as a hub id (unknown, or the hub is not reachable)"
        ) from error


def is_id(name: str) -> bool:
    """Whether a text has the form `owner/name` and is no path here."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not Path(name).exists()


def snapshot(name: str) -> Path:
    """Folder of a hub id's configuration, tokenizer and weights, downloaded where they are not in the cache.

    Raises:
        CheckpointError: unknown, or not in the cache and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    plain = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*plain, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*plain, "pytorch_model*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name}: no such folder, and it cannot be had from the hub (unknown, or the hub is not reachable); "
            "download it elsewhere and give its folder"
        ) from error
    return folder


def part_of_blip2(config: Any, part: str) -> Any:
    """`text_config`, `vision_config` or `qformer_config` of a transformers BLIP-2 config; another config unchanged."""
    return getattr(config, part) if config.model_type == "blip-2" else config


def load_config(source: str) -> Any:
    """The transformers config of a folder or hub id.

    Raises:
        CheckpointError: it does not exist, cannot be reached or is not understood.
    """
    from transformers import AutoConfig

    with readable(source):
        return AutoConfig.from_pretrained(source)


def load_model(kind: Any, source: str, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """A transformers model with every weight from the source.

    Args:
        kind: model class or Auto class.
        options: passed to `from_pretrained`.

    Raises:
        CheckpointError: as `load_config`, or a weight of the model is missing or of another shape.
    """
    with readable(source):
        model, report = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported here, where they can be named
            **options,
        )
    for problem, words in (("missing_keys", "missing"), ("mismatched_keys", "of another shape than its config says")):
        found = report[problem]
        if found:
            name = min(entry if isinstance(entry, str) else str(entry[0]) for entry in found)
            raise CheckpointError(
                f"{source}: {len(found)} weights of {type(model).__name__} are {words}, the first is {name}"
            )
    return model


def read_json(source: str, file: str) -> dict[str, Any] | None:
    """A JSON file of a folder or hub id; None where it has none."""
    from transformers.utils import cached_file

    with readable(source):
        path = cached_file(
            source,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            return None
        value: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return value
