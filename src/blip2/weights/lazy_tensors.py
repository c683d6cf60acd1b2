"""Tensors of checkpoint files, read one at a time and written one at a time.

A checkpoint is a dict of `LazyTensor`: shapes are known, bytes stay on disk until they are asked
for. So a 30 GB checkpoint can be checked, renamed and rewritten in the memory of its largest tensor.
"""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip2.errors import CheckpointError, os_error_as
from blip2.io.atomic import replacing
from blip2.ops.devices import to_numpy

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED_INDEX, PICKLED = "pytorch_model.bin.index.json", "pytorch_model.bin"
SHARD_BYTES = 5_000_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape is known and whose values are read when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())

    def reshaped(self, *shape: int) -> LazyTensor:
        """The same values in another shape."""
        return LazyTensor(tuple(shape), self.dtype, lambda: self.read().reshape(shape))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


Tensors = dict[str, LazyTensor]


def lazily(state: Mapping[str, Tensor]) -> Tensors:
    """Tensors that are in memory already."""
    return {name: LazyTensor.of(value) for name, value in state.items()}


def open_safetensors(path: Path) -> Tensors:
    """Tensors of a safetensors file.

    Raises:
        CheckpointError: missing, cut short, or not safetensors.
    """
    with _safetensors_errors(path):
        handle = safe_open(path, framework="pt")
        tensors = {}
        for name in handle.keys():  # noqa: SIM118 - not a dict
            entry = handle.get_slice(name)
            code = entry.get_dtype()
            if code not in _DTYPES:
                raise CheckpointError(f"{path}: {name} is of type {code}, which is not supported")
            tensors[name] = LazyTensor(tuple(entry.get_shape()), _DTYPES[code], _reader(handle, name, path))
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory.

    Raises:
        CheckpointError: as `open_safetensors`.
    """
    return {name: lazy.read() for name, lazy in open_safetensors(path).items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Header metadata of a safetensors file; empty where it has none.

    Raises:
        CheckpointError: as `open_safetensors`.
    """
    with _safetensors_errors(path), safe_open(path, framework="pt") as handle:
        return dict(handle.metadata() or {})


def open_pickled(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors of a `.pth` or `.bin` file, and what stands beside them in it.

    Only tensors and plain values are read (`weights_only=True`), memory-mapped where the file
    allows it. The tensors are those of the entry `model` or `state_dict`, else of the whole file.

    Returns:
        Tensors by name, and the other entries of the file.

    Raises:
        CheckpointError: missing, cut short, holding Python objects, or holding no tensors.
    """
    content = _load_pickled(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), content)
    tensors = lazily({str(name): value for name, value in state.items() if isinstance(value, Tensor)})
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    for name, lazy in tensors.items():
        value = lazy.read()
        if value.dtype not in _CODES or value.layout is not torch.strided or value.is_meta:
            kind = ", ".join(str(part).removeprefix("torch.") for part in (value.dtype, value.layout, value.device))
            raise CheckpointError(f"{path}: {name} is of a type that is not supported ({kind})")
    return tensors, {str(k): v for k, v in content.items() if v is not state and not isinstance(v, Tensor)}


def open_folder(folder: Path) -> Tensors:
    """Tensors of a Hugging Face folder: `model.safetensors` or `pytorch_model.bin`, whole or in shards.

    Raises:
        CheckpointError: no weights in it, or a shard that is missing or incomplete.
    """
    for index, single, open_one in ((INDEX, SINGLE, open_safetensors), (PICKLED_INDEX, PICKLED, _pickled_tensors)):
        if (folder / index).is_file():
            return _sharded(folder, index, open_one)
        if (folder / single).is_file():
            return open_one(folder / single)
    raise CheckpointError(f"{folder}: no weights in it ({SINGLE}, {INDEX} or {PICKLED})")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor, whole or not at all.

    Args:
        progress: called with the bytes of every tensor written.

    Raises:
        CheckpointError: it cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name in order:
        lazy = tensors[name]
        end = offset + lazy.nbytes
        header[name] = {"dtype": _CODES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (
        os_error_as(CheckpointError, f"{path}: cannot be written"),
        replacing(path, sync=True) as temporary,
        temporary.open("wb") as handle,
    ):
        handle.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            to_numpy(as_bytes(tensors[name].read())).tofile(handle)
            if progress is not None:
                progress(tensors[name].nbytes)


def write_folder(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model.safetensors` into a folder, or shards and their index when it is larger than one."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, lazy in tensors.items():
        if shards[-1] and size + lazy.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = lazy
        size += lazy.nbytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, tensors, metadata, progress)
        return
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, shard, metadata, progress)
    index = {
        "metadata": {"total_size": sum(lazy.nbytes for lazy in tensors.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")


def as_bytes(tensor: Tensor) -> Tensor:
    """The raw bytes of a tensor, [nbytes] uint8; equal bytes are equal values, NaN included."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def _reader(handle: Any, name: str, path: Path) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with _safetensors_errors(path):
            out: Tensor = handle.get_tensor(name)
            return out

    return read


@contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except SafetensorError as error:
        short = "incomplete" in str(error).lower() or "invalidoffset" in str(error).lower().replace(" ", "")
        cause = "it is cut short (a download that did not finish?)" if short else _first_line(error)
        raise CheckpointError(f"{path}: cannot be read as safetensors: {cause}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or _first_line(error)}") from error


def _load_pickled(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        # an operand that no pickle has is damage, anything else refused is an object
        if "weights only" in str(error).lower() and "operand" not in str(error):
            raise CheckpointError(
                f"{path}: holds Python objects besides tensors; such a file can run code when it is read, so it is not"
            ) from error
        raise CheckpointError(f"{path}: not a file of torch.save, or damaged") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a whole file of torch.save (cut short or damaged)") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a map beyond the end of the file
            raise CheckpointError(f"{path}: not a whole file of torch.save (cut short or damaged)") from error
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or _first_line(error)}") from error


def _pickled_tensors(path: Path) -> Tensors:
    return open_pickled(path)[0]


def _sharded(folder: Path, index: str, open_one: Callable[[Path], Tensors]) -> Tensors:
    try:
        places = json.loads((folder / index).read_text("utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if not files or any(not file or Path(file).name != file for file in files):
            raise ValueError("no files, or not of this folder")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / index}: not an index of shards") from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder / missing[0]}: {len(missing)} of {len(files)} shards are missing, this is the first: "
            "download the rest"
        )
    shards = {file: open_one(folder / file) for file in files}
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(f"{folder / file}: {name} is missing, which {index} says it holds")
    return {name: shards[file][name] for name, file in places.items()}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
