"""LAVIS 1.0.2's side of a claim; runs in the environment that `make bench-peers` makes.

LAVIS is imported as installed and nothing of it is changed: modules that it imports and BLIP-2 does
not use are stood in for by empty ones, its tokenizer by one that reads ids, its image encoder by the
identity (features are the input), and its weights come from our file.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.harness.worker import Side
from benchmarks.sides import ids

_UNUSED = ("omegaconf", "timm", "iopath", "torchvision", "fairscale", "pandas", "decord", "webdataset", "cv2")


class _Unused(types.ModuleType):
    """A module of which every attribute is a class that nothing calls."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *a, **k: None, "__call__": lambda self, *a, **k: a[0]})


class _UnusedFinder:
    """Finds the modules of `_UNUSED`."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in _UNUSED:
            return importlib.machinery.ModuleSpec(name, cls, is_package=True)  # type: ignore[arg-type]
        return None

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Unused(spec.name)
        module.__path__ = []
        return module

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        if module.__name__ == "timm.models.registry":
            module.register_model = lambda function: function  # type: ignore[attr-defined]


def _blip2_qformer() -> Any:
    """LAVIS's `blip2_qformer` module, without the packages' `__init__`, which import every model of LAVIS."""
    sys.meta_path.insert(0, _UnusedFinder)  # type: ignore[arg-type]
    spec = importlib.util.find_spec("lavis")
    assert spec is not None
    assert spec.origin is not None
    for name in ("lavis", "lavis.common", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    # the registry asks for it where the package would export it
    package = sys.modules["lavis.models"]
    package.BaseModel = importlib.import_module("lavis.models.base_model").BaseModel  # type: ignore[attr-defined]
    return importlib.import_module("lavis.models.blip2_models.blip2_qformer")


class _Tokens(dict):  # type: ignore[type-arg]
    __getattr__ = dict.__getitem__

    def to(self, device: Any) -> _Tokens:
        return _Tokens({name: value.to(device) for name, value in self.items()})


class _Tokenizer:
    """BERT's tokenizer as LAVIS calls it, for texts written as ids."""

    pad_token_id, sep_token_id = ids.PAD, ids.SEP

    def __init__(self, words: int) -> None:
        self.bos_token_id = words

    def __len__(self) -> int:
        return self.bos_token_id + 1

    def __call__(self, text: list[str], max_length: int, **options: Any) -> _Tokens:
        rows = ids.rows_of(list(text), max_length)
        token_ids, mask = ids.padded(rows, max_length if options["padding"] == "max_length" else None)
        return _Tokens(input_ids=token_ids, attention_mask=mask.long())


class _Identity(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_features = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def build(settings: dict[str, Any]) -> Any:
    """`Blip2Qformer` at a benchmark's size with our random weights, without dropout."""
    module, size = _blip2_qformer(), settings["size"]
    base = sys.modules["lavis.models.blip2_models.blip2"]

    def init_qformer(queries: int, channels: int, every: int = 2) -> tuple[nn.Module, nn.Parameter]:
        config = base.BertConfig(
            vocab_size=size["words"],
            hidden_size=size["width"],
            num_hidden_layers=size["depth"],
            num_attention_heads=size["heads"],
            intermediate_size=size["inner"],
            max_position_embeddings=size["positions"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config.encoder_width, config.add_cross_attention = channels, True
        config.cross_attention_freq, config.query_length = every, queries
        return base.BertLMHeadModel(config), nn.Parameter(torch.zeros(1, queries, size["width"]))

    kind = module.Blip2Qformer
    parts = {
        "init_tokenizer": lambda: _Tokenizer(size["words"]),
        "init_vision_encoder": lambda *_: (_Identity(size["channels"]), base.LayerNorm(size["channels"])),
        "init_Qformer": init_qformer,
    }
    with mock.patch.multiple(kind, **{name: staticmethod(part) for name, part in parts.items()}):
        model = kind(num_query_token=size["queries"], embed_dim=size["embed_dim"], max_txt_len=size["max_text"])
    report = model.load_state_dict(load_file(Path(settings["folder"]) / "weights.safetensors"), strict=False)
    head = model.Qformer.cls.predictions.decoder
    assert head.weight is model.Qformer.bert.embeddings.word_embeddings.weight
    left = [name for name in report.missing_keys if "position_ids" not in name and "predictions.decoder" not in name]
    assert not left, left
    assert not report.unexpected_keys, report.unexpected_keys
    return model.to(settings["device"])


def _group(settings: dict[str, Any]) -> None:
    """The process group that LAVIS's `forward` cannot do without."""
    rendezvous = f"file://{Path(settings['folder']).resolve()}/lavis-group"
    backend = "nccl" if settings["device"] == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=rendezvous, rank=0, world_size=1)


def _samples(settings: dict[str, Any]) -> dict[str, Any]:
    stored = np.load(Path(settings["folder"]) / "inputs.npz")
    image = torch.from_numpy(stored["features"]).to(settings["device"])
    return {"image": image, "text_input": [str(text) for text in stored["captions"]]}


def _autocast(settings: dict[str, Any]) -> Any:
    if settings["precision"] == "fp32":
        return nullcontext()
    return torch.autocast(settings["device"], torch.bfloat16)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as LAVIS's runner builds it: plain, without decay on biases and norms."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim < 2 or "bias" in name or "ln" in name]
    decayed = [p for name, p in trained if not (p.ndim < 2 or "bias" in name or "ln" in name)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98))


def with_fixed_negatives(model: Any, samples: dict[str, Any]) -> Any:
    """LAVIS's losses with the negatives of `ids.fixed_negatives`: it draws an image for each text, then texts."""
    texts, images = ids.fixed_negatives(len(samples["text_input"]))
    with mock.patch.object(torch, "multinomial", side_effect=list(torch.cat([images, texts]))):
        return model(samples)


def stage1_step(settings: dict[str, Any]) -> Side:
    """One training step: losses, gradients, AdamW."""
    _group(settings)
    model = build(settings).train()
    samples, optimizer = _samples(settings), optimizer_of(model)

    def check() -> dict[str, np.ndarray]:
        with _autocast(settings):
            output = with_fixed_negatives(model, samples)
        output.loss.backward()
        parameters = dict(model.named_parameters())
        out = {"losses": torch.stack([output.loss_itc, output.loss_itm, output.loss_lm]).detach().float().cpu().numpy()}
        if settings["gradients"]:
            out |= {name: parameters[name].grad.float().cpu().numpy() for name in ids.GRADIENTS}
        optimizer.zero_grad()
        return out

    def run() -> None:
        with _autocast(settings):
            loss = model(samples).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Side(run, check)


class _Loader(list):  # type: ignore[type-arg]
    dataset: Any


def rerank(settings: dict[str, Any]) -> Side:
    """`compute_sim_matrix`: ITC of all, ITM of the best k both ways, for one of `share` processes."""
    model = build(settings).eval()
    samples = _samples(settings)
    images = samples["image"]
    loader = _Loader({"image": chunk} for chunk in images.split(settings["size"]["batch"]))
    loader.dataset = types.SimpleNamespace(text=samples["text_input"], image=list(range(len(images))))
    base = sys.modules["lavis.models.blip2_models.blip2"]

    @torch.no_grad()
    def scores() -> tuple[np.ndarray, np.ndarray]:
        shared = mock.patch.object(base.dist_utils, "get_world_size", return_value=settings["share"])
        with shared, _autocast(settings):
            matrices: tuple[np.ndarray, np.ndarray] = base.compute_sim_matrix(model, loader, k_test=settings["k"])
        return matrices

    def check() -> dict[str, np.ndarray]:
        i2t, t2i = (np.where(matrix == -100.0, np.nan, matrix) for matrix in scores())
        return {"i2t": i2t, "t2i": t2i.T}

    return Side(scores, check)
