"""A trained model, loaded and at work."""

from blip2.inference.loading import load, torch_dtype
from blip2.inference.model import Blip2

__all__ = ["Blip2", "load", "torch_dtype"]
