"""Known holes in what `blip2` and its server need, by pip-audit; part of `make checks`.

    python -m tools.audit

Asked about are the installed versions of what `blip2[serve]` needs, whatever else is in the environment. A known hole
fails, with the package, the hole and the version that mends it. Where the vulnerability service cannot be asked (no
network, a mirror without it, pip-audit not installed) that is said, and nothing fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Holes that do not concern blip2: their id, and why.
ACCEPTED: dict[str, str] = {}
SECONDS = 300


def main() -> int:
    """Exit code 1 for a known hole, else 0."""
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text("".join(f"{name}=={version}\n" for name, version in installed(["blip2[serve]"])))
        command = [sys.executable, "-m", "pip_audit", "-r", str(pinned), "--no-deps", "--disable-pip"]
        try:
            done = subprocess.run(
                [*command, "--progress-spinner", "off", "--format", "json"],
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            print(f"audit: skipped, no answer within {SECONDS} s")
            return 0
    code, line = verdict(done.stdout, done.stderr)
    print(f"audit: {line}")
    return code


def installed(names: Iterable[str]) -> list[tuple[str, str]]:
    """Name and version of packages and of all that they need here, without the packages named first."""
    todo = [Requirement(name) for name in names]
    first = {canonicalize_name(wanted.name) for wanted in todo}
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        try:
            there = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an optional part that is not installed has no holes here
        found[name] = there.version.partition("+")[0]  # 2.13.0+cpu has the holes of 2.13.0
        for extra in ("", *wanted.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in there.requires or []:
                needs = Requirement(text)
                if needs.marker is None or needs.marker.evaluate({"extra": extra}):
                    todo.append(needs)
    return sorted((name, version) for name, version in found.items() if name not in first)


def verdict(stdout: str, stderr: str) -> tuple[int, str]:
    """Exit code and one line (more for holes) from what pip-audit printed."""
    try:
        packages = json.loads(stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = [line for line in stderr.splitlines() if line.strip()] or ["it printed nothing"]
        return 0, f"skipped, pip-audit did not run: {last[-1].strip()[:200]}"
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        return 0, "skipped, the vulnerability service knows none of the packages (offline, or a mirror without it)"
    holes = [
        f"{package['name']} {package['version']}: {hole['id']}, "
        + (f"mended in {' or '.join(hole['fix_versions'])}" if hole.get("fix_versions") else "not mended yet")
        for package in asked
        for hole in package.get("vulns", [])
        if hole["id"] not in ACCEPTED and not ACCEPTED.keys() & set(hole.get("aliases", []))
    ]
    if holes:
        return 1, "\n  ".join(["known holes:", *holes])
    unknown = len(packages) - len(asked)
    return 0, f"no known hole in {len(asked)} packages" + (f" ({unknown} not known there)" if unknown else "")


if __name__ == "__main__":
    sys.exit(main())
