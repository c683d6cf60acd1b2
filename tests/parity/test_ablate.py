"""`blip2 ablate`: every variant really trained, on tiny random towers, then the table and the plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel

from blip2.cli.main import main
from blip2.configs import LanguageConfig
from blip2.recipes.ablations import Variant, variants
from blip2.training import ablate
from blip2.weights import runs
from blip2.weights.lazy_tensors import read_safetensors

HF = Callable[[str], tuple[Path, Any]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "dev"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(32 if split == "train" else 3):
            Image.new("RGB", (40, 40), (number * 7, 0, 0)).save(tmp_path / "data" / split / f"{number}.png")
            (tmp_path / "data" / split / f"{number}.txt").write_text("two cats on the grass")
    return tmp_path / "data"


@pytest.fixture
def bert(hf: HF, tmp_path: Path) -> str:
    """A random BERT of three layers with the tokenizer of the tiny checkpoints."""
    folder = tmp_path / "bert"
    tokenizer = AutoTokenizer.from_pretrained(hf("itm")[0])
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
    BertModel(BertConfig(vocab_size=len(tokenizer) - 1, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def on_tiny_towers(hf: HF, bert: str) -> Callable[..., list[Variant]]:
    """The real variants, with random towers and without a feature cache."""
    itm, opt = str(hf("itm")[0]), str(hf("opt")[0])

    def small(run: Any) -> Any:
        queries = 4 if run.qformer.queries == 4 or run.qformer.bridge == "linear" else 5
        return replace(
            run,
            vision=replace(run.vision, name=itm, image_size=56, pool=1),
            qformer=replace(run.qformer, init=bert, queries=queries, embed_dim=16),
            language=LanguageConfig(name=opt),
            data=replace(run.data, cache_features=False, workers=0),
            eval=replace(run.eval, samples=1, max_tokens=6),
        )

    def made(**budget: int) -> list[Variant]:
        found = variants(**budget)
        return [replace(v, stage1=v.stage1 and small(v.stage1), stage2=small(v.stage2)) for v in found]

    return made


def test_every_variant_is_trained_on_its_budget(
    hf: HF, bert: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(ablate, "variants", on_tiny_towers(hf, bert))
    out = tmp_path / "out"
    command = ["ablate", "tiny", "--data", str(data), "--out", str(out), "--steps1", "2", "--steps2", "3"]
    assert main([*command, "--images", "3", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert list(rows) == [v.name for v in variants()]
    assert [name for name, row in rows.items() if row["recall"] is None] == ["no-stage1", "no-stage1-longer", "linear"]
    for name, row in rows.items():
        assert row["loss"] == row["curve"][-1][1]
        assert row["curve"][-1][0] == (5 if name == "no-stage1-longer" else 3)
    # what a variant leaves out is left out
    itm = read_safetensors(out / "no-itm-stage1" / "checkpoints" / "step-000002" / runs.WEIGHTS)["itm_head.weight"]
    start = read_safetensors(out / "full-stage1" / "checkpoints" / "step-000002" / runs.WEIGHTS)["itm_head.weight"]
    assert not (itm == start).all()
    train = (out / "no-itg-stage1" / "metrics.jsonl").read_text().splitlines()[1]
    assert "itg" not in json.loads(train)
    table = (out / "ablations.md").read_text().splitlines()
    assert len(table) == 2 + len(rows)
    assert table[2].startswith("| full | ITC + ITM + ITG, then stage 2 | 64 + 96 | ")
    with Image.open(out / "ablations.png") as plot:
        assert plot.size[0] > 800
    # done is done
    before = (out / "full-stage2" / "metrics.jsonl").read_bytes()
    assert main([*command, "--images", "3", "--only", "full,linear"]) == 0
    assert (out / "full-stage2" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["paper"], "no ablations of 'paper': there are those of tiny"),
        (["tiny", "--only", "full,speed"], "--only names 'speed'; variants: full, no-itg"),
        (["tiny", "--steps1", "0"], "--steps1 is 0: it must be 2 or more"),
        (["tiny", "--data", "nowhere"], "nowhere/train: no such file or folder"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], told: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["ablate", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
