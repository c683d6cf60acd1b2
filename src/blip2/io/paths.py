"""Where things made once per machine are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$BLIP2_CACHE`, else `~/.cache/blip2`; not created here."""
    return Path(os.environ.get("BLIP2_CACHE") or "~/.cache/blip2").expanduser()
