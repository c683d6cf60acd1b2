"""BLIP-2 (arXiv 2301.12597): pretrain, fine-tune, evaluate and use the Q-Former bridge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Blip2", "__version__", "convert", "load"]

if TYPE_CHECKING:
    from blip2.inference import Blip2, load
    from blip2.weights.convert.pipeline import convert


def __getattr__(name: str) -> Any:
    # Torch is imported when a model is first asked for, not by `import blip2`.
    if name in ("Blip2", "load"):
        from blip2 import inference

        return getattr(inference, name)
    if name == "convert":
        from blip2.weights.convert.pipeline import convert

        return convert
    raise AttributeError(f"module 'blip2' has no attribute {name!r}")
