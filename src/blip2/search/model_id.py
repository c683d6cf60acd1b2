"""Which model made an index's vectors."""

from __future__ import annotations

import hashlib

import torch

from blip2.errors import ConfigError
from blip2.inference import Blip2
from blip2.ops.devices import to_host, to_numpy
from blip2.search.store import ModelId, Store

# The image encoder, and what no embedding depends on (a checkpoint may lack it, and it is then random).
_NOT_HASHED = ("vision.", "temp", "itm_head.", "qformer.head.")


def identify(model: Blip2, name: str) -> ModelId:
    """The identity of a model's stage 1: what every query embedding depends on.

    The image encoder counts by its name and how it is used: when it is trained the Q-Former is too, and
    its weights are hashed, in float32: the precision that they run in makes no other model.
    """
    stage1, vision = model.stage1, model.config.vision
    digest = hashlib.sha256(f"{vision.name}|{vision.layer}|{vision.pool}|{model.image_spec}".encode())
    for key, tensor in sorted(stage1.state_dict().items()):
        if not key.startswith(_NOT_HASHED):
            digest.update(key.encode())
            stored = model.stage1_tensors.get(key)
            cast = tensor.dtype != torch.float32 and stored is not None and stored.shape == tuple(tensor.shape)
            value = stored.read() if cast and stored is not None else tensor
            digest.update(to_numpy(to_host(value).float()).data)
    return ModelId(name, digest.hexdigest()[:16], stage1.qformer.num_queries, stage1.vision_proj.out_features)


def require_same(store: Store, model: ModelId) -> None:
    """Refuse to mix the vectors of two models.

    Raises:
        ConfigError: names the index's model and the one at hand, and says what to do.
    """
    made_by = store.manifest.model
    if made_by.fingerprint == model.fingerprint:
        return
    if made_by.name == model.name:
        raise ConfigError(
            f"{store.path}: this index was built with {made_by}, which has changed since (now [{model.fingerprint}]): "
            "give the earlier model with --model, or build another index (`blip2 index build FOLDER --out ANOTHER`)"
        )
    raise ConfigError(
        f"{store.path}: this index was built with {made_by}, not with {model}: give --model {made_by.name}, or build "
        "another index with this one (`blip2 index build FOLDER --out ANOTHER`)"
    )
