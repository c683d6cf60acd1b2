"""`blip2 chat` and `blip2 doctor`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import blip2
from blip2.cli import doctor
from blip2.cli.chat import TURNS, Chat
from blip2.cli.main import main
from blip2.configs import DecodingConfig


def test_a_question_follows_the_earlier_ones(tiny_opt: Path, photos: Path) -> None:
    model = blip2.load(tiny_opt)
    decoding = DecodingConfig(beams=2, min_tokens=1, max_tokens=4)
    features = model.features([photos / "p01.png"])
    chat = Chat(model, features, decoding)
    form = model.config.language.question
    first = chat.ask("what is it?")
    assert first == model.ask([photos / "p01.png"], "what is it?", decoding=decoding)[0]
    expected = f"{form.format('what is it?')} {first.rstrip('.')}. {form.format('where?')}"
    assert chat.prompt("where?") == expected
    assert chat.ask("where?") == model.generate(features, [expected], decoding)[0][0].strip()
    chat.turns = [(f"q{n}", "a.") for n in range(20)]
    prompt = chat.prompt("last")
    assert (prompt.count("Question"), "q13 " in prompt, "q14 " in prompt, ".." in prompt) == (
        TURNS + 1,
        False,
        True,
        False,
    )


def test_chat_reads_a_pipe(
    tiny_opt: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Chat, "ask", lambda self, question: seen.append(question) or f"{len(self.turns)}")
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n\n/nonsense\nwhere?\n/quit\nnever\n"))
    assert main(["chat", str(photos / "p01.png"), "--model", str(tiny_opt)]) == 0
    out = capsys.readouterr()
    assert (seen, out.out) == (["what?", "where?"], "0\n0\n")
    assert "/forget" in out.err


def test_chat_needs_a_language_model(tiny: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(photos / "p01.png"), "--model", str(tiny)]) == 2
    assert "stage-2" in capsys.readouterr().err


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name in ("peft", "faiss-cpu") else real(name))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "pip install peft" in next(line for line in out.splitlines() if line.strip().startswith("peft"))
    assert "pip install faiss-cpu" in out
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"peft", "faiss-cpu"} <= report["missing"].keys()
    assert report["packages"]["torch"] == real("torch")
    assert report["devices"]["cpus"] >= 1
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "safetensors" else real(name))
    assert main(["doctor"]) == 1
    assert "pip install safetensors" in capsys.readouterr().out


def test_every_package_that_doctor_names_is_in_the_project() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for name in (*doctor.REQUIRED, *doctor.OPTIONAL):
        assert f'"{name}' in text or f"{name}==" in makefile or name == "pycocoevalcap", name
