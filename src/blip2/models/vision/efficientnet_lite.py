"""EfficientNet-Lite as an image encoder of transformers' kind: its last feature map, a token per place.

The convolutional network of arXiv 1905.11946 without squeeze-and-excitation and with ReLU6, as Google trained it on
ImageNet for phones. Batch norms are folded into the convolutions before them, so it trains like any other encoder.

Shape letters: B images, S side in pixels, C channels, P tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

MODEL_TYPE = "efficientnet_lite"
_EPS = 1e-3  # of its batch norms
# First block of each stage: its stride. A stage begins where the output width changes.
_STRIDES = (1, 2, 2, 2, 1, 2, 1)


class EfficientNetLiteConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Sizes of an EfficientNet-Lite.

    Args:
        blocks: (kernel, stride, inner width, output width) of every inverted residual block.
        stem: width of the first convolution.
        hidden_size: width of the last one, that of the features.
        image_size: side of its input; any multiple of `patch_size` works.
        patch_size: pixels of the input per place of the feature map.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        blocks: Sequence[Sequence[int]] = (),
        stem: int = 32,
        hidden_size: int = 1280,
        image_size: int = 288,
        patch_size: int = 32,
        **options: Any,
    ) -> None:
        self.blocks, self.stem, self.hidden_size = [list(block) for block in blocks], stem, hidden_size
        self.image_size, self.patch_size = image_size, patch_size
        super().__init__(**options)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, which pads more on the right and below."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(width, out, kernel, stride, groups=groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1:
            height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x_BCHW.shape[-2:])
            x_BCHW = F.pad(x_BCHW, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x_BCHW)


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; added to its input where the shape is the same."""

    def __init__(self, width: int, kernel: int, stride: int, inner: int, out: int) -> None:
        super().__init__()
        self.expand = SameConv(width, inner) if inner != width else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, out)
        self.residual = stride == 1 and width == out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H / stride, W / stride]."""
        inner = x_BCHW if self.expand is None else F.relu6(self.expand(x_BCHW))
        out: Tensor = self.project(F.relu6(self.depthwise(inner)))
        return x_BCHW + out if self.residual else out


class EfficientNetLite(PreTrainedModel):  # type: ignore[misc, unused-ignore]
    """Pixels in, features out."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        widths = [config.stem, *(block[3] for block in config.blocks)]
        self.stem = SameConv(3, config.stem, 3, 2)
        self.blocks = nn.ModuleList(
            InvertedResidual(width, *block) for width, block in zip(widths, config.blocks, strict=False)
        )
        self.head = SameConv(widths[-1], config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Features [B, 1 + (S / 32)^2, C] of [B, 3, S, S]: their mean, which its classifier read, then every place."""
        x_BCHW = F.relu6(self.stem(pixel_values.contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        places_BPC = F.relu6(self.head(x_BCHW)).flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=torch.cat([places_BPC.mean(dim=1, keepdim=True), places_BPC], dim=1))


def register() -> None:
    """Make transformers' `Auto` classes know it."""
    AutoConfig.register(MODEL_TYPE, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)


def from_published(state: Mapping[str, Tensor]) -> tuple[EfficientNetLiteConfig, dict[str, Tensor]]:
    """Config and weights from a checkpoint of `efficientnet_lite_pytorch`, with the batch norms folded.

    Raises:
        KeyError: a tensor is missing.
    """
    weights = _folded(state, "stem", "_conv_stem", "_bn0")
    blocks: list[tuple[int, int, int, int]] = []
    stage, width = -1, 0
    while (own := f"_blocks.{len(blocks)}") + "._project_conv.weight" in state:
        name, out = f"blocks.{len(blocks)}", state[f"{own}._project_conv.weight"].shape[0]
        starts, width = out != width, out
        stage += starts
        inner, _, kernel, _ = state[f"{own}._depthwise_conv.weight"].shape
        blocks.append((kernel, _STRIDES[stage] if starts else 1, inner, out))
        if f"{own}._expand_conv.weight" in state:
            weights |= _folded(state, f"{name}.expand", f"{own}._expand_conv", f"{own}._bn0")
        weights |= _folded(state, f"{name}.depthwise", f"{own}._depthwise_conv", f"{own}._bn1")
        weights |= _folded(state, f"{name}.project", f"{own}._project_conv", f"{own}._bn2")
    weights |= _folded(state, "head", "_conv_head", "_bn1")
    config = EfficientNetLiteConfig(blocks, len(weights["stem.bias"]), len(weights["head.bias"]))
    return config, weights


def _folded(state: Mapping[str, Tensor], name: str, conv: str, norm: str) -> dict[str, Tensor]:
    """Weight and bias of a convolution that does what it and the batch norm after it did."""
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _EPS).sqrt()
    return {
        f"{name}.weight": (state[f"{conv}.weight"] * scale[:, None, None, None]).contiguous(),
        f"{name}.bias": state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale,
    }
