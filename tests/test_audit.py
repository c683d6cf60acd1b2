"""The verdict over pip-audit's answers: a hole fails with its name, no answer passes and says so."""

from __future__ import annotations

import json

import pytest
from tools import audit


def answer(**packages: list[dict[str, object]] | None) -> str:
    entries = [
        {"name": name, "skip_reason": "not found"}
        if vulns is None
        else {"name": name, "version": "1.0", "vulns": vulns}
        for name, vulns in packages.items()
    ]
    return json.dumps({"dependencies": entries, "fixes": []})


def test_a_known_hole_fails_with_its_name() -> None:
    hole = {"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": ["CVE-1"]}
    code, line = audit.verdict(answer(pillow=[hole], starlette=[]), "")
    assert code == 1
    assert "pillow 1.0: PYSEC-1, mended in 1.1" in line
    assert "starlette" not in line
    assert "not mended yet" in audit.verdict(answer(pillow=[{**hole, "fix_versions": []}]), "")[1]


def test_an_accepted_hole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    hole = {"id": "PYSEC-1", "fix_versions": [], "aliases": ["CVE-1"]}
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-1": "not used"})
    assert audit.verdict(answer(pillow=[hole]), "") == (0, "no known hole in 1 packages")


@pytest.mark.parametrize(
    ("stdout", "stderr"),
    [
        ("", "Traceback\nrequests.exceptions.ConnectionError: no route"),
        ("", "No module named pip_audit"),
        ("", ""),
        ("[]", "x"),
        (answer(pillow=None, torch=None), ""),
    ],
)
def test_where_it_cannot_run_it_says_so_and_passes(stdout: str, stderr: str) -> None:
    code, line = audit.verdict(stdout, stderr)
    assert code == 0
    assert line.startswith("skipped, ")
    assert "\n" not in line


def test_packages_that_are_not_known_there_are_counted() -> None:
    assert audit.verdict(answer(pillow=[], torch=None), "")[1] == "no known hole in 1 packages (1 not known there)"


def test_what_is_asked_about() -> None:
    found = dict(audit.installed(["blip2[serve]"]))
    assert {"torch", "pillow", "jinja2"} <= set(found)
    assert "blip2" not in found
    assert "pytest" not in found
    assert "+" not in found["torch"]
