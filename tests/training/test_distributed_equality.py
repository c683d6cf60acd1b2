"""Two processes give what one gives at the same global batch: losses and weights, DDP and FSDP2.

So does a run that changes from two processes to one or from one to two in its middle, and one whose worker
is killed and started again by `torchrun --max-restarts`.

Real gloo processes through `torchrun`, the real `Trainer`, and features made here. Starting a
process takes seconds and training next to nothing, so that one launch does every run.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from blip2.weights import runs
from blip2.weights.lazy_tensors import read_safetensors

# What trains, and over what; adapters on quantized weights are for DDP alone.
KINDS = ("stage1", "stage2", "t5", "stage1+vision", "questions", "images", "qformer-lora", "shots", "stage2+lora")
# Losses of every step and evaluation, what was generated, and the final weights.
Results = tuple[list[dict[str, float]], list[object], dict[str, torch.Tensor]]
JOBS = {kind: ("ddp", "fsdp2") for kind in KINDS} | {"stage2+int8": ("ddp",)}
NEEDS = {"stage2+lora": ("peft",), "stage2+int8": ("peft", "torchao")}
STEPS, BATCH = 4, 8
# What goes on with another number of processes: every way in which weights and moments can be sharded.
MOVED = ("stage1/ddp", "stage1/fsdp2", "stage2/fsdp2", "stage1+vision/fsdp2")
SCRIPT = '''
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, T5Config, ViTConfig

from blip2.configs import DataConfig, DecodingConfig, LanguageConfig, LoraConfig, LossConfig, OptimConfig
from blip2.configs import QFormerConfig, RunConfig, TrainConfig
from blip2.data.batch import Batch
from blip2.data.tokenizers import InstructionReader
from blip2.models.language.model import LanguageModel, language_model_from_config, load_language_model
from blip2.models.qformer.lora import add_qformer_lora
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import vision_encoder_from_config
from blip2.ops import distributed
from blip2.training.objectives import stage2 as objectives
from blip2.training.objectives.common import EarlyBackward
from blip2.training.objectives.in_context import InContextObjective
from blip2.training.objectives.stage1 import Stage1Objective
from blip2.training.objectives.stage2 import Stage2Objective
from blip2.training.parallel import process_group
from blip2.training.trainer import Trainer

WORDS = "a dog runs through the green grass near two men on some old bikes".split()
BATCH = 8


class Words:
    """[CLS] words [SEP] of a closed vocabulary, for both kinds of model."""

    pad_id, cls_id, sep_id, dec_id, end_id, front = 0, 1, 2, 3, 2, 1

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


def die_once(step: int) -> None:
    """Be killed as the system kills: the second process, the first time that it gets to the step asked for."""
    mark = Path(os.environ["DIE_MARK"]) if "DIE_MARK" in os.environ else None
    if mark is not None and step == int(os.environ["DIE_AT"]) and distributed.rank() == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def batches(step: int, kind: str) -> Iterator[Batch]:
    while True:
        die_once(step)
        g = torch.Generator().manual_seed(step)
        features = torch.randn(BATCH, 5, 12, generator=g)
        lengths = torch.randint(1, 9, (BATCH,), generator=g).tolist()
        starts = torch.randint(0, 5, (BATCH,), generator=g).tolist()
        captions = [" ".join(WORDS[s : s + n]) for s, n in zip(starts, lengths)]
        ids = torch.tensor([0, 1, 2, 2, 3, 4, 5, 0])  # two images occur twice, once across processes
        share = BATCH // distributed.world_size()
        part = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        batch = Batch([str(i) for i in range(BATCH)][part], ids[part], captions[part], features=features[part])
        if kind == "stage1+vision":
            batch.pixels, batch.features = torch.randn(BATCH, 3, 8, 8, generator=g)[part], None
        if kind == "images":  # of other numbers in each process: 9 and 11
            counts = [1, 3, 2, 3, 1, 1, 4, 5]
            pictures = torch.randn(sum(counts), 5, 12, generator=g).split(counts)
            batch.features, batch.images = torch.cat(pictures[part]), counts[part]
        if kind in ("questions", "images"):
            batch.questions = [" ".join(WORDS[n : n + 2]) for n in starts][part]
        yield batch
        step += 1


def language_model(kind: str, out: Path) -> LanguageModel:
    text = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        return language_model_from_config(T5Config(**text, **sizes))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = language_model_from_config(LlamaConfig(**text, **sizes))
    if kind == "stage2+int8":
        folder = f"{out}-model"
        made.model.save_pretrained(folder)  # among several processes the first one writes
        distributed.barrier()
        made = load_language_model(LanguageConfig(name=folder, quantize="int8"), torch.float32)
    return made


def objective_of(kind: str, out: Path, sharded: bool):
    torch.manual_seed(0)
    objectives.ENOUGH_TOKENS["cpu"] = 1  # the language model in four pieces
    sizes = {"width": 16, "depth": 3, "heads": 2, "inner": 32, "image_width": 12, "queries": 4}
    sizes |= {"dropout": 0.0, "attention_dropout": 0.0}
    text = {"vocab": 4 + len(WORDS), "positions": 16}
    if kind.startswith("stage1"):
        vision = None
        if kind == "stage1+vision":
            shape = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            vision = vision_encoder_from_config(ViTConfig(**shape, image_size=8, patch_size=4))
            vision.unfreeze()
        model = Stage1(QFormer(**sizes, **text), vision, embed_dim=8)
        return EarlyBackward(Stage1Objective(model, Words(), LossConfig(), seed=0))
    language = language_model(kind, out)
    if kind in ("questions", "images"):
        model = Stage2(QFormer(**sizes, **text, head=False), language, places=5 if kind == "images" else 0)
        asked = LanguageConfig(prompt="", question="{}")
        objective = Stage2Objective(model, Words(), asked, 0, InstructionReader(Words(), "question"))
        return objective if sharded else EarlyBackward(objective)
    model = Stage2(QFormer(**sizes, vocab=None), language)
    if kind == "shots":
        return InContextObjective(model, Words(), LanguageConfig(prompt=""), seed=0, shots=1)
    if kind == "qformer-lora":
        add_qformer_lora(model.qformer, 2, 16.0)
    if "+" in kind:
        from blip2.models.language.lora import add_lora

        add_lora(language, LoraConfig(rank=2))
    objective = Stage2Objective(model, Words(), LanguageConfig(prompt=""), seed=0)
    return objective if sharded else EarlyBackward(objective)


def run(kind: str, parallel: str, out: Path) -> None:
    asks = kind in ("questions", "images")
    config = RunConfig(
        stage="stage1" if kind.startswith("stage1") else "stage2",
        qformer=QFormerConfig(
            instruction="question" if asks else None, image_places=5 if kind == "images" else 0
        ),
        data=DataConfig(texts="questions" if asks else "captions"),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup=1, layer_decay=0.5),
        train=TrainConfig(steps=4, batch=BATCH, save_every=2, eval_every=4, parallel=parallel, precision="fp32"),
    )
    sharded = parallel == "fsdp2" and distributed.world_size() > 1
    objective = objective_of(kind, out, sharded)
    model = objective.model

    def evaluate(step: int) -> dict[str, object]:
        """As on dev, before the first step too, when FSDP2 has not run yet: text and loss of two batches."""
        loss, text = 0.0, []
        for batch in (next(batches(98, kind)), next(batches(99, kind))):
            if not kind.startswith("stage1"):
                alone = batch.features.split(batch.images or [1] * BATCH)
                soft = model.soft_prompts(torch.cat([features[:1] for features in alone]))
                none = torch.zeros(BATCH, 0, dtype=torch.int64)
                decoding = DecodingConfig(beams=2, min_tokens=3, max_tokens=3)
                text += model.language_model.generate(soft, none, none, decoding, end_id=2, pad_id=0).tolist()
            loss += float(sum(objective(batch, 0).values())) / 2
        return {"loss": loss, "text": text}

    out.mkdir(parents=True, exist_ok=True)
    frozen = [model.language_model] if kind in ("stage2", "t5", "questions", "images", "shots") else []
    source = partial(batches, kind=kind)
    trainer = Trainer(objective, source, config, out, device=torch.device("cpu"), frozen=frozen, evaluate=evaluate)
    # FSDP2's processes must run a block equally often, whatever the lengths of their texts
    assert kind.startswith("stage1") or model.language_model.split_lengths != sharded
    trainer.resume()
    trainer.run()


out, *jobs = sys.argv[1:]
with process_group(torch.device("cpu")):
    for job in jobs:
        run(*job.split("/"), Path(out) / job)
'''


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with every kind trained by one plain process."""
    return train(tmp_path_factory.mktemp("one"), [], [f"{kind}/ddp" for kind in kinds()])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the same by two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    jobs = [f"{kind}/{parallel}" for kind in kinds() for parallel in JOBS[kind]]
    return train(tmp_path_factory.mktemp("two"), launcher, jobs)


def kinds() -> list[str]:
    """What can be trained with the libraries that are there; `BLIP2_KINDS=stage1,stage2` takes only these."""
    chosen = os.environ.get("BLIP2_KINDS", ",".join(JOBS)).split(",")
    return [kind for kind in JOBS if kind in chosen and all(find_spec(library) for library in NEEDS.get(kind, ()))]


@pytest.fixture(scope="module")
def moved(one: Path, two: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs that one process began and two ended (`1 to 2`), and the other way."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    folders = {}
    for name, source, command in (("1 to 2", one, launcher), ("2 to 1", two, [])):
        folder = tmp_path_factory.mktemp("moved")
        for job in MOVED:
            kind = job.partition("/")[0]
            begun = source / (f"{kind}/ddp" if source == one else job)
            shutil.copytree(begun, folder / job)
            shutil.rmtree(folder / job / "checkpoints" / f"step-{STEPS:06d}")
        folders[name] = train(folder, command, list(MOVED))
    return folders


def train(folder: Path, launcher: list[str], jobs: list[str], log: str = "stderr.txt", **variables: str) -> Path:
    """Run the script above; returns the folder of its runs, in which what came after an error is missing."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, str(script), str(folder), *jobs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    (folder / log).write_text(done.stderr)
    return folder


def results(folder: Path, job: str) -> Results:
    """Losses of every step and evaluation, what was generated, and the final weights."""
    checkpoints = runs.checkpoints(folder / job)
    assert checkpoints, (folder / "stderr.txt").read_text()[-4000:]
    lines = [json.loads(line) for line in (folder / job / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "itc", "itm", "itg", "lm", "grad_norm")
    losses = [{name: line[name] for name in names if name in line} for line in lines]
    texts = [row for line in lines if line["kind"] == "dev" for row in line["text"]]
    return losses, texts, read_safetensors(checkpoints[-1][1] / runs.WEIGHTS)


@pytest.mark.parametrize(("kind", "parallel"), [(kind, parallel) for kind in JOBS for parallel in JOBS[kind]])
def test_two_processes_equal_one(kind: str, parallel: str, one: Path, two: Path) -> None:
    """DDP and FSDP2 over two processes against one process, evaluation before the first step included.

    Tolerances: the orders of summation differ, which float32 shows at 1e-6 a step and AdamW's
    division by the root of a small second moment enlarges; a lost gather or a wrong average shows
    at 1e-2 and more.
    """
    if kind not in kinds():
        reason = f"{' or '.join(NEEDS[kind])} is not installed" if kind in NEEDS else "not among BLIP2_KINDS"
        pytest.skip(reason)
    expected = results(one, f"{kind}/ddp")
    assert len(expected[0]) == STEPS + 2  # evaluations before the first and after the last
    assert len(expected[1]) == (0 if kind.startswith("stage1") else 2 * 2 * BATCH)
    require_same(expected, results(two, f"{kind}/{parallel}"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["1 to 2", "2 to 1"])
@pytest.mark.parametrize("job", MOVED)
def test_checkpoints_load_on_another_number_of_processes(job: str, way: str, one: Path, moved: dict[str, Path]) -> None:
    """Two of four steps by one number of processes, the others by another: tolerances as above."""
    require_same(results(one, f"{job.partition('/')[0]}/ddp"), results(moved[way], job))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("job", ["stage1/ddp", "stage2/fsdp2"])
def test_killed_worker_is_restarted_and_goes_on(job: str, two: Path, tmp_path: Path) -> None:
    """Killed in the fourth step, after the checkpoint of the second: every number is the undisturbed run's."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    folder = train(tmp_path, launcher, [job], DIE_AT="3", DIE_MARK=str(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    resumed, expected = results(folder, job), results(two, job)
    assert resumed[0] == expected[0]
    assert all(torch.equal(resumed[2][name], value) for name, value in expected[2].items())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_agents_as_on_two_nodes_come_back_after_a_kill(two: Path, tmp_path: Path) -> None:
    """Each with one process, meeting at an address: every number is that of one agent with two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = ["--rdzv-id", "run", "--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--local-addr", "127.0.0.1"]
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1"]
    launcher = ["-m", "torch.distributed.run", *nodes, *meeting]
    # as docs/scale.md says: a store of its own for every restart
    dies = {"DIE_AT": "3", "DIE_MARK": str(tmp_path / "died"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with ThreadPoolExecutor(2) as agents:
        list(agents.map(lambda n: train(tmp_path, launcher, ["stage1/ddp"], f"stderr-{n}.txt", **dies), range(2)))
    (tmp_path / "stderr.txt").write_text("".join((tmp_path / f"stderr-{n}.txt").read_text()[-2000:] for n in range(2)))
    assert (tmp_path / "died").exists()
    resumed, expected = results(tmp_path, "stage1/ddp"), results(two, "stage1/ddp")
    assert resumed[0] == expected[0]
    assert all(torch.equal(resumed[2][name], value) for name, value in expected[2].items())


def require_same(expected: Results, actual: Results) -> None:
    """Equal to the tolerances above."""
    (losses, texts, weights), (others, other_texts, other_weights) = expected, actual
    assert len(losses) == len(others)
    for mine, theirs in zip(losses, others, strict=True):
        assert theirs == pytest.approx(mine, rel=2e-4, abs=2e-4)
    assert other_texts == texts
    assert set(weights) == set(other_weights)
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, atol=2e-3, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
