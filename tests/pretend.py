"""An accelerator without a card: tensors say that they are on `pretend:0` while their data lies on the CPU.

Inside `pretend()` it behaves as a card does where it matters: an operator on tensors of two devices raises,
`.numpy()` without a way back to the CPU raises, and a constant made on the CPU cannot meet the model.
Autocast casts what CUDA's casts. It is written on the private interface by which torch hosts a backend in
Python; where a version of torch lacks it, `AVAILABLE` says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAME = "pretend"
# Copies between devices are what they are for.
_COPIES = ("aten._to_copy", "aten.copy_", "aten._copy")
# A card takes indices that are on the CPU into its own tensors, and CPU scalars everywhere.
_INDEXED = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")

# As CUDA's autocast: what runs in the lower precision, and what is brought to float32.
_LOWER = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "conv2d", "einsum")
_FLOAT32 = ("layer_norm", "softmax.int", "log_softmax.int", "cross_entropy_loss", "nll_loss_nd", "norm.Scalar", "cdist")


class _Backend:
    """The module `torch.pretend`."""

    active = False

    def is_available(self) -> bool:
        return self.active

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing: random numbers are drawn on the CPU."""

    def device_count(self) -> int:
        return int(self.active)

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_BACKEND = _Backend()
_KEPT: list[Any] = []  # registrations last as long as what made them


def _register() -> str | None:
    """Register the device with torch; the reason where it cannot be done."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except ImportError:
        return f"torch {torch.__version__} cannot host a backend written in Python"
    try:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_BACKEND)
        library = torch.library.Library("aten", "IMPL")
        for name, kernel in _KERNELS.items():
            library.impl(name, kernel, "PrivateUse1")
        for name in _LOWER + _FLOAT32:
            library.impl(name, _casting(name, lower=name in _LOWER), "AutocastPrivateUse1")
        others = torch.library.Library("_", "IMPL")
        others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        _KEPT.extend((library, others))
    except (RuntimeError, AttributeError) as error:
        return f"torch {torch.__version__}: {error}"
    return None


def _casting(name: str, *, lower: bool) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, base), overload or "default")

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return [cast(x, dtype) for x in value]
        wanted = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if wanted else value

    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME) if lower else torch.float32
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*(cast(a, dtype) for a in args), **kwargs)

    return call


class Pretended(Tensor):
    """A tensor whose data is a CPU tensor, `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        """A card's tensor has it, a subclass does not."""
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = Pretended(self.held.detach().clone()).requires_grad_(self.requires_grad)
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Pretended(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Pretended(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


# What is made on the device, or moved there, begins here; any other operator meets `Pretended` first.
_KERNELS = {"empty.memory_format": _empty, "empty_strided": _empty_strided, "_copy_from": _copy_from}


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on the data, after the check that a card would make."""
    there: list[Pretended] = []
    here = False

    def held(x: Any) -> Any:
        nonlocal here
        if isinstance(x, Pretended):
            there.append(x)
            return x.held
        if isinstance(x, Tensor):
            here |= x.dim() > 0
        elif isinstance(x, (list, tuple)):
            return type(x)(map(held, x))
        return x

    name = str(func)
    plain, options = [held(x) for x in args], {key: held(x) for key, x in kwargs.items()}
    allowed = name.startswith(_COPIES) or (name.startswith(_INDEXED) and isinstance(args[0], Pretended))
    if there and here and not allowed:
        raise RuntimeError(f"{name}: tensors on {NAME}:0 and on the CPU")
    wanted = options.get("device")
    if wanted is not None:
        options["device"] = torch.device("cpu")
    out = func(*plain, **options)
    if name.startswith("aten.copy_"):
        return args[0]
    on = torch.device(wanted).type == NAME if wanted is not None else bool(there)

    def wrapped(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(map(wrapped, x))
        if not on or not isinstance(x, Tensor):
            return x
        # in-place operators give back their own
        same = next((t for t in there if t.held is x), None)
        return Pretended(x) if same is None else same

    return wrapped(out)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Pretended) else x


UNAVAILABLE = _register()


@contextlib.contextmanager
def pretend() -> Iterator[torch.device]:
    """The device, while there is one."""
    _BACKEND.active = True
    try:
        yield torch.device(NAME, 0)
    finally:
        _BACKEND.active = False
