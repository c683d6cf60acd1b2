"""Two processes give what one gives at the same global batch: losses and weights, DDP and FSDP2.

Real gloo processes through `torchrun`, the real `Trainer`, and features made here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from blip2.weights import native, runs

SCRIPT = '''
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, T5Config

from blip2.configs import LanguageConfig, LoraConfig, LossConfig, OptimConfig, RunConfig, TrainConfig
from blip2.data.dataset import Batch
from blip2.models.language_model import language_model_from_config, load_language_model
from blip2.models.qformer import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.ops import distributed
from blip2.training.objectives import Stage1Objective, Stage2Objective
from blip2.training.parallel import process_group
from blip2.training.trainer import Trainer

WORDS = "a dog runs through the green grass near two men on some old bikes".split()
kind, parallel, out = sys.argv[1:]
stage, _, extra = kind.partition("+")
BATCH = 8


class Words:
    """[CLS] words [SEP] of a closed vocabulary, for both kinds of model."""

    pad_id, cls_id, sep_id, dec_id, end_id = 0, 1, 2, 3, 2

    def rows(self, texts):
        return [[1, *(4 + WORDS.index(w) for w in t.split()), 2] for t in texts]

    def __call__(self, texts):
        rows = self.rows(texts)
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row)
        return ids, ids > 0

    def pairs(self, prefixes, suffixes):
        return *self(prefixes), *self(suffixes)

    def targets(self, prompts, captions):
        ids, mask = self(captions)
        labels = mask.clone()
        labels[:, 0] = False
        return ids, mask, labels


def batches(step: int) -> Iterator[Batch]:
    while True:
        g = torch.Generator().manual_seed(step)
        features = torch.randn(BATCH, 5, 12, generator=g)
        lengths = torch.randint(1, 9, (BATCH,), generator=g).tolist()
        starts = torch.randint(0, 5, (BATCH,), generator=g).tolist()
        captions = [" ".join(WORDS[s : s + n]) for s, n in zip(starts, lengths)]
        ids = torch.tensor([0, 1, 2, 2, 3, 4, 5, 0])  # two images occur twice, once across processes
        share = BATCH // distributed.world_size()
        part = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        yield Batch([str(i) for i in range(BATCH)][part], ids[part], captions[part], features=features[part])
        step += 1


torch.manual_seed(0)
config = RunConfig(
    stage="stage1" if stage == "stage1" else "stage2",
    optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup=1),
    train=TrainConfig(steps=4, batch=BATCH, save_every=4, eval_every=4, parallel=parallel, precision="fp32"),
)
sizes = {"width": 16, "depth": 3, "heads": 2, "inner": 32, "image_width": 12, "queries": 4, "dropout": 0.0}
sizes["attention_dropout"] = 0.0
if stage == "stage1":
    model = Stage1(QFormer(**sizes, vocab=4 + len(WORDS), positions=16), embed_dim=8)
    objective = Stage1Objective(model, Words(), LossConfig(), seed=0)
elif stage == "t5":
    t5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = Stage2(QFormer(**sizes, vocab=None), language_model_from_config(t5))
    objective = Stage2Objective(model, Words(), LanguageConfig(prompt=""), seed=0)
else:
    llama = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    language_model = language_model_from_config(llama)
    if extra == "int8":
        language_model.model.save_pretrained(folder := f"{out}-{os.environ.get('RANK', 0)}")
        language_model = load_language_model(LanguageConfig(name=folder, quantize="int8"), torch.float32)
    model = Stage2(QFormer(**sizes, vocab=None), language_model)
    if extra:
        from blip2.models.lora import add_lora

        add_lora(language_model, LoraConfig(rank=2))
    objective = Stage2Objective(model, Words(), LanguageConfig(prompt=""), seed=0)
frozen = [model.language_model] if stage == "stage2" else []
with process_group(torch.device("cpu")):
    Path(out).mkdir(parents=True, exist_ok=True)

    def evaluate(step: int) -> dict[str, float]:
        with torch.no_grad():  # before the first step too, when FSDP2 has not run yet
            return {"loss": float(sum(objective(next(batches(99)), 0).values()))}

    device = torch.device("cpu")
    trainer = Trainer(objective, batches, config, Path(out), device=device, frozen=frozen, evaluate=evaluate)
    if parallel == "fsdp2" and stage != "stage1":
        assert not model.language_model.split_lengths
    trainer.resume()
    trainer.run()
'''


def train(
    kind: str, parallel: str, processes: int, folder: Path
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Losses of every step and the final weights of a run of the script above."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    out = folder / f"{kind}-{parallel}-{processes}"
    command = [sys.executable, str(script), kind, parallel, str(out)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "itc", "itm", "itg", "lm", "grad_norm")
    losses = [{name: line[name] for name in names if name in line} for line in lines]
    return losses, native.read(runs.checkpoints(out)[-1][1] / runs.WEIGHTS)


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


KINDS = [
    "stage1",
    "stage2",
    "t5",
    pytest.param("stage2+lora", marks=[pytest.mark.slow, needs("peft")]),
    pytest.param("stage2+int8", marks=[pytest.mark.slow, needs("peft"), needs("torchao")]),
]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, tmp_path: Path) -> None:
    """DDP and FSDP2 over two processes against one process; adapters on quantized weights under DDP alone.

    Tolerances: the orders of summation differ, which float32 shows at 1e-6 a step and AdamW's
    division by the root of a small second moment enlarges; a lost gather or a wrong average shows
    at 1e-2 and more.
    """
    losses, weights = train(kind, "ddp", 1, tmp_path)
    assert len(losses) == 4 + 2  # steps, and evaluations before the first and after the last
    for parallel in ("ddp",) if kind.endswith("int8") else ("ddp", "fsdp2"):
        others, other_weights = train(kind, parallel, 2, tmp_path)
        for mine, theirs in zip(losses, others, strict=True):
            assert theirs == pytest.approx(mine, rel=2e-4, abs=2e-4), parallel
        assert set(weights) == set(other_weights)
        for name, value in weights.items():
            torch.testing.assert_close(
                other_weights[name], value, atol=2e-3, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
