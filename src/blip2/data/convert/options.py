"""What `blip2 data convert` reads, and how."""

from __future__ import annotations

from dataclasses import dataclass

from blip2.data.convert.captions import read_coco, read_flickr30k, read_nocaps
from blip2.data.convert.folders import read_folder_units, read_lines
from blip2.data.convert.genome import read_vg
from blip2.data.convert.questions import read_gqa, read_vqa
from blip2.data.convert.records import Reader
from blip2.data.convert.tables import read_table
from blip2.data.convert.web import read_web
from blip2.data.hashes import THRESHOLD
from blip2.errors import ConfigError

READERS: dict[str, Reader] = {
    "coco": read_coco,
    "vg": read_vg,
    "cc3m": read_web,
    "cc12m": read_web,
    "sbu": read_web,
    "laion": read_web,
    "flickr30k": read_flickr30k,
    "nocaps": read_nocaps,
    "vqav2": read_vqa,
    "gqa": read_gqa,
    "okvqa": read_vqa,
    "table": read_table,
    "jsonl": read_lines,
    "folder": read_folder_units,
}


@dataclass(frozen=True)
class Options:
    """How a source is converted.

    Args:
        kind: a name of `READERS`.
        licence: of the data, written into the manifest.
        drop_duplicates: leave out near-duplicates of earlier images; they are reported in any case.
        against: evaluation sets whose images must not be in the result.
        threshold: bits of 64 in which the hashes of copies may differ.
        skip_missing: leave out annotations whose image is not there, instead of stopping.
        workers: processes.
    """

    kind: str
    licence: str | None = None
    drop_duplicates: bool = False
    against: tuple[str, ...] = ()
    threshold: int = THRESHOLD
    skip_missing: bool = False
    workers: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        if self.kind not in READERS:
            raise ConfigError(f"from is {self.kind!r}: it must be one of {', '.join(READERS)}")
        if not 0 <= self.threshold <= 16:
            raise ConfigError(f"threshold is {self.threshold}: it must be between 0 and 16 bits")
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}: it must be 1 or more")
