"""Frozen models by name, folder or hub id: loaded from transformers quietly, strictly, with one-line errors.

Each named model (the embedded ones, and the paper's) knows its transformers config in code, so that
a run can be estimated without a hub.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from blip2.configs import BLIP2_TYPES
from blip2.errors import CheckpointError
from blip2.models import bundled_towers


@dataclass(frozen=True)
class Tower:
    """A named model.

    Args:
        kind: `vision`, `bert` or `language`.
        source: hub id, or function that returns the folder of an embedded model.
        model_type: its type in transformers.
        sizes: what is not that class's default.
        overrides: settings that BLIP-2 changes in the published config.
    """

    kind: str
    source: str | Callable[[], Path]
    model_type: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """Its transformers config, offline."""
        return _auto_config().for_model(self.model_type, **self.sizes, **self.overrides)


def folder(name: str) -> str:
    """The folder or hub id of a tower's name; any other name is returned unchanged.

    An embedded model is converted into the cache folder on first use.

    Raises:
        CheckpointError: an embedded model is not installed.
    """
    tower = TOWERS.get(name)
    if tower is None:
        return name
    if isinstance(tower.source, str):
        return tower.source
    with quiet():
        return str(tower.source())


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
    """Whether a name has the form `owner/name` and is no existing path."""
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
            f"{name}: no such folder, and it cannot be downloaded from the hub (unknown, or the hub is not reachable); "
            "download it elsewhere and give its folder"
        ) from error
    return folder


def _auto_config() -> Any:
    """transformers' `AutoConfig`, which knows the embedded encoder that is not transformers' own."""
    _list_models_once()
    from transformers import AutoConfig

    from blip2.models.vision.efficientnet_lite import register

    register()
    return AutoConfig


def _list_models_once() -> None:
    """Let `transformers.models` have the list that `transformers` made of its 3,300 model files: 0.4 s a time.

    Both ask for it, one by the folder and one by the `__init__.py` in it, and a cache in between takes them as two.
    """
    from transformers.utils import import_utils

    listed: Any = getattr(import_utils, "create_import_structure_from_path", None)
    if hasattr(listed, "cache_info") and "transformers.models" not in sys.modules:

        def by_folder(path: str | Path) -> Any:
            return listed(Path(path).parent if Path(path).name == "__init__.py" else path)

        vars(import_utils)["create_import_structure_from_path"] = by_folder


def load_config(name: str) -> Any:
    """The transformers config of a tower's name, a folder or a hub id.

    Raises:
        CheckpointError: it does not exist, cannot be reached or is not understood.
    """
    source = folder(name)
    with readable(source):
        return _auto_config().from_pretrained(source)


def load_part_config(name: str, part: str) -> tuple[Any, bool]:
    """The config of one part of a BLIP-2 or InstructBLIP, or the whole of any other model's; and whether it is a part.

    What BLIP-2 changes in a tower's published config is changed in it.

    Args:
        part: `text_config`, `vision_config` or `qformer_config`.

    Raises:
        CheckpointError: as `load_config`.
    """
    config = load_config(name)
    inside = config.model_type in BLIP2_TYPES
    config = as_blip2_part(getattr(config, part)) if inside else config
    if name in TOWERS:
        config.update(dict(TOWERS[name].overrides))
    return config, inside


def as_blip2_part(config: Any) -> Any:
    """The config of InstructBLIP's image encoder as that of BLIP-2's, which it is under another name."""
    if config.model_type not in ("instructblip_vision_model", "instructblipvideo_vision_model"):
        return config
    from transformers import Blip2VisionConfig

    return Blip2VisionConfig(**{name: value for name, value in config.to_dict().items() if name != "model_type"})


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
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    for problem, words in (("missing_keys", "missing"), ("mismatched_keys", "of another shape than its config says")):
        entries = report[problem]
        if entries:
            name = min(entry if isinstance(entry, str) else str(entry[0]) for entry in entries)
            raise CheckpointError(
                f"{source}: {len(entries)} weights of {type(model).__name__} are {words}, the first is {name}"
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


def _opt(source: str, width: int) -> Tower:
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "vocab_size": 50272}
    return Tower("language", source, "opt", {**sizes, "num_hidden_layers": 32, "num_attention_heads": 32})


def _flan_t5(source: str, width: int, inner: int, heads: int) -> Tower:
    sizes = {"d_model": width, "d_kv": 64, "d_ff": inner, "num_layers": 24, "num_decoder_layers": 24}
    sizes |= {"vocab_size": 32128, "num_heads": heads, "decoder_start_token_id": 0}
    head = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    # LAVIS runs FlanT5 with the exact GELU, and its checkpoints were trained so.
    return Tower("language", source, "t5", {**sizes, **head}, {"dense_act_fn": "gelu"})


def _vicuna(source: str, width: int, inner: int, depth: int) -> Tower:
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "vocab_size": 32000}
    sizes |= {"max_position_embeddings": 2048} | {
        "num_hidden_layers": depth,
        "num_attention_heads": depth,
        "rms_norm_eps": 1e-6,
    }
    return Tower("language", source, "llama", sizes)


_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP_L |= {"image_size": 224, "patch_size": 14}
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}

TOWERS: dict[str, Tower] = {
    "efficientnet-lite2": Tower(
        "vision", bundled_towers.efficientnet_folder, "efficientnet_lite", bundled_towers.EFFICIENTNET_SIZES
    ),
    "dinov2-s": Tower("vision", bundled_towers.dinov2_folder, "dinov2", bundled_towers.DINOV2_SIZES),
    "vitl": Tower("vision", "openai/clip-vit-large-patch14", "clip_vision_model", _CLIP_L),
    "vitg": Tower("vision", "Salesforce/blip2-opt-2.7b", "blip_2_vision_model"),
    "minilm-l6": Tower("bert", bundled_towers.minilm_folder, "bert", _MINILM),
    "bert-base": Tower("bert", "google-bert/bert-base-uncased", "bert"),
    "smollm2-135m": Tower("language", bundled_towers.smollm2_folder, "llama", _SMOLLM2),
    "opt-2.7b": _opt("facebook/opt-2.7b", 2560),
    "opt-6.7b": _opt("facebook/opt-6.7b", 4096),
    "vicuna-7b": _vicuna("lmsys/vicuna-7b-v1.1", 4096, 11008, 32),
    "vicuna-13b": _vicuna("lmsys/vicuna-13b-v1.1", 5120, 13824, 40),
    "flan-t5-xl": _flan_t5("google/flan-t5-xl", 2048, 5120, 32),
    "flan-t5-xxl": _flan_t5("google/flan-t5-xxl", 4096, 10240, 64),
}
