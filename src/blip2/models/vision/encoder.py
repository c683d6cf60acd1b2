"""Any image encoder of transformers behind one interface: pixels in, patch features out.

Shape letters: B images, S side in pixels, P tokens, C channels, R prefix tokens ([CLS], registers).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.configs import VisionConfig
from blip2.errors import ConfigError
from blip2.models import towers
from blip2.models.bundled_towers import IMAGENET_MEAN, IMAGENET_STD
from blip2.models.freezing import freeze

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)

# Model type of the vision part -> its class; others go through AutoModel.
_CLASSES = {
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
}
_NORMALISATION = {
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "blip_2_vision_model": (CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": (_HALF, _HALF),
    "vit": (_HALF, _HALF),
}


class VisionEncoder(nn.Module):
    """Image encoder that turns pixels into patch features.

    While all its parameters are frozen it stays in eval mode whatever `.train()` says and runs
    without gradient, under `no_grad` and not `inference_mode`: its features are saved for the
    backward pass of what trains on them.

    Args:
        model: transformers model that takes `pixel_values`.
        width: channels C.
        size: side S of its input in pixels.
        patch: side of a patch in pixels.
        prefix: tokens R before the patches: 0 (SigLIP), 1 ([CLS]) or more (registers).
        layer: block whose output is used, as an index of a Python list; later blocks are dropped.
            None takes the model's `last_hidden_state`.
        pool: the patch grid is averaged over pool x pool squares, prefix tokens are kept in front.
        mean, std: normalisation of the pixels, applied by the caller.
        name: of the weights, for `id`.

    Raises:
        ConfigError: no such layer, a grid that `pool` does not divide, or a size that the model's
            positions cannot be interpolated to.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        width: int,
        size: int,
        patch: int,
        prefix: int = 1,
        layer: int | None = None,
        pool: int = 1,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        name: str = "custom",
    ) -> None:
        super().__init__()
        self.model = model
        self.width, self.size, self.prefix, self.layer, self.pool = width, size, prefix, layer, pool
        self.mean, self.std = tuple(mean), tuple(std)
        self.name = name
        self.grid = size // patch
        if self.grid < 1 or self.grid % pool:
            raise ConfigError(
                f"vision.pool is {pool}: it must divide the {self.grid} x {self.grid} patches of {size}-pixel images"
            )
        self.tokens = prefix + (self.grid // pool) ** 2
        self._options = _interpolation(model, size)
        self._captured: dict[int, Tensor] = {}  # output of the chosen block, by thread
        if layer is not None:
            if _no_tokens(model):
                raise ConfigError(f"vision.layer is {layer}: {type(model).__name__} gives its last feature map only")
            _keep_blocks(model, layer).register_forward_hook(self._capture)

    @property
    def id(self) -> str:
        """Identifies weights, layer, pooling and size: a key for cached features."""
        layer = "last" if self.layer is None else str(self.layer)
        return f"{self.name}-layer{layer}-pool{self.pool}-{self.size}px"

    @property
    def interpolated(self) -> str | None:
        """How the position embeddings are interpolated for another image size; None at the model's own."""
        native = getattr(getattr(self.model, "config", None), "image_size", None)
        if native is None or _side(native) == self.size or _no_tokens(self.model):
            return None
        grid = self.grid * _side(native) // self.size
        return f"position embeddings of {grid} x {grid} patches interpolated to {self.grid} x {self.grid}"

    @property
    def frozen(self) -> bool:
        """Whether none of its parameters trains."""
        return not any(p.requires_grad for p in self.model.parameters())

    def unfreeze(self) -> None:
        """Make everything trainable that the features depend on."""
        for name, p in self.model.named_parameters():
            top = name.split(".")[0]
            final_norm = "norm" in top and not top.startswith("pre")
            p.requires_grad_("mask_token" not in name and not (final_norm and self.layer is not None))

    @property
    def depths(self) -> dict[str, int]:
        """How many blocks follow each parameter: 0 for the last block and the norm after it."""
        blocks = _blocks(self.model)
        depth = {id(p): len(blocks) - 1 - n for n, block in enumerate(blocks) for p in block.parameters()}
        return {
            name: depth.get(id(p), 0 if "norm" in name.split(".")[0] and "pre" not in name else len(blocks))
            for name, p in self.model.named_parameters()
        }

    def compile_blocks(self, **options: Any) -> None:
        """Run compiled blocks from now on; options of `torch.compile`. For a frozen encoder."""
        for block in _blocks(self.model):
            # its forward alone: hooks, which keep the output of `layer`, stay outside
            block.forward = torch.compile(block.forward, **options)

    def train(self, mode: bool = True) -> VisionEncoder:
        """As `nn.Module.train`, but frozen weights stay in eval mode."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Features [B, P, C] of normalised pixels, in the dtype of the weights.

        Raises:
            ConfigError: the pixels have another side than `size`.
        """
        if pixels_B3SS.shape[-2:] != (self.size, self.size):
            height, width = pixels_B3SS.shape[-2:]
            raise ConfigError(f"images of {width} x {height} pixels given to an encoder of {self.size} x {self.size}")
        weight = next(self.model.parameters())
        with torch.no_grad() if self.frozen else nullcontext():
            output = self.model(pixel_values=pixels_B3SS.to(weight.dtype), **self._options)
            block_BPC = self._captured.pop(threading.get_ident(), None)
            return self._pooled(output.last_hidden_state if block_BPC is None else block_BPC)

    def _pooled(self, features_BPC: Tensor) -> Tensor:
        expected = self.prefix + self.grid**2
        if features_BPC.ndim != 3 or features_BPC.shape[1] != expected:
            raise ConfigError(
                f"{self.name}: features of shape {tuple(features_BPC.shape)}, "
                f"not {self.prefix} + {self.grid} x {self.grid} tokens: this encoder cannot be used"
            )
        if self.pool == 1:
            return features_BPC
        prefix_BRC, patches_BNC = features_BPC[:, : self.prefix], features_BPC[:, self.prefix :]
        grid_BCGG = patches_BNC.transpose(1, 2).reshape(len(patches_BNC), -1, self.grid, self.grid)
        pooled_BCN = F.avg_pool2d(grid_BCGG, self.pool).flatten(2)
        return torch.cat([prefix_BRC, pooled_BCN.transpose(1, 2)], dim=1)

    def _capture(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._captured[threading.get_ident()] = output[0] if isinstance(output, tuple) else output


def load_vision_encoder(config: VisionConfig, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    """Frozen image encoder of a tower's name, a folder or a hub id; of a full CLIP, SigLIP or
    BLIP-2 only the image part is read.

    Raises:
        CheckpointError: the model cannot be found, reached or read completely.
        ConfigError: `layer`, `pool` or `image_size` does not fit it.
    """
    source = towers.folder(config.name)
    model_config = towers.load_config(config.name)
    part = _vision_part(model_config, source)
    kind, options = _model_class(part)
    if part is not model_config:
        options["key_mapping"] = {r"^vision_model\.": ""}
    model = towers.load_model(kind, source, part, dtype, **options)
    mean, std = normalisation(part, source)
    options = {"layer": config.layer, "pool": config.pool, "size": config.image_size}
    return _frozen_encoder(model, part, name=config.name, mean=mean, std=std, **options)


def vision_encoder_from_config(
    config: Any, *, layer: int | None = None, pool: int = 1, size: int | None = None, name: str = "random"
) -> VisionEncoder:
    """Frozen image encoder with random weights from a transformers config (a vision config, or a
    whole CLIP, SigLIP or BLIP-2 one); without memory inside `torch.device("meta")`.
    """
    part = _vision_part(config, name)
    kind, extra = _model_class(part)
    build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    model = build(part, **extra)
    mean, std = _NORMALISATION.get(part.model_type, (IMAGENET_MEAN, IMAGENET_STD))
    return _frozen_encoder(model, part, name=name, layer=layer, pool=pool, size=size, mean=mean, std=std)


def _vision_part(config: Any, source: str) -> Any:
    """The config of the image encoder inside a config."""
    part = towers.as_blip2_part(getattr(config, "vision_config", None) or config)
    if not hasattr(part, "patch_size") or not hasattr(part, "hidden_size"):
        raise ConfigError(f"{source}: {config.model_type} is not an image encoder made of patches")
    return part


def _model_class(part: Any) -> tuple[Any, dict[str, Any]]:
    """(class, constructor options) for a vision config; pooling heads are left out."""
    import transformers

    if part.model_type == "siglip_vision_model":
        part.vision_use_head = False
    if part.model_type in _CLASSES:
        return getattr(transformers, _CLASSES[part.model_type]), {}
    pooled = part.model_type in ("vit", "beit", "deit", "vit_msn")
    return transformers.AutoModel, {"add_pooling_layer": False} if pooled else {}


def _frozen_encoder(model: nn.Module, part: Any, **options: Any) -> VisionEncoder:
    """A frozen `VisionEncoder` whose sizes follow the vision config; other `options` of it as they are."""
    if part.model_type == "blip_2_vision_model" and options["layer"] is None:
        # its 39 blocks end at the second-last of 40, and its final norm is BLIP-2's own `ln_vision`
        options["layer"] = -1
    prefix = 0 if part.model_type == "siglip_vision_model" else 1 + (getattr(part, "num_register_tokens", 0) or 0)
    size = options.pop("size") or _side(part.image_size)
    patch = _side(part.patch_size)
    encoder = VisionEncoder(model, width=part.hidden_size, size=size, patch=patch, prefix=prefix, **options)
    freeze(encoder)
    return encoder


def _side(value: Any) -> int:
    """Side of a square given as a number or a pair."""
    sides = {int(v) for v in value} if isinstance(value, list | tuple) else {int(value)}
    if len(sides) != 1:
        raise ConfigError(f"the image encoder works on {tuple(value)} pixels: only square images are supported")
    return sides.pop()


def normalisation(part: Any, source: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of the checkpoint's own preprocessor, else those usual for its type."""
    own = towers.read_json(source, "preprocessor_config.json")
    if own is None:
        own = (towers.read_json(source, "processor_config.json") or {}).get("image_processor")
    if own and "image_mean" in own and "image_std" in own:
        return own["image_mean"], own["image_std"]
    return _NORMALISATION.get(part.model_type, (IMAGENET_MEAN, IMAGENET_STD))


def _interpolation(model: nn.Module, size: int) -> dict[str, bool]:
    """Options of the model's forward that make it take images of `size` pixels."""
    config: Any = getattr(model, "config", None)
    native = getattr(config, "image_size", None)
    if native is None or _side(native) == size:
        return {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        return {"interpolate_pos_encoding": True}
    if _no_tokens(model) or (config is not None and str(config.model_type).startswith("dino")):
        return {}  # no positions, or interpolated by itself
    raise ConfigError(f"vision.image_size is {size}: {type(model).__name__} only takes {_side(native)}")


def _no_tokens(model: nn.Module) -> bool:
    """Whether it is a convolutional network, which has no positions and whose blocks give maps."""
    return getattr(getattr(model, "config", None), "model_type", "") == "efficientnet_lite"


def _keep_blocks(model: nn.Module, layer: int) -> nn.Module:
    """Drop the blocks after `layer`, in place, and return that block."""
    blocks = _blocks(model)
    if not -len(blocks) <= layer < len(blocks):
        raise ConfigError(f"vision.layer is {layer}: {type(model).__name__} has {len(blocks)} blocks")
    index = layer % len(blocks)
    del blocks[index + 1 :]
    return blocks[index]


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model: its longest `nn.ModuleList`."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())
