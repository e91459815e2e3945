"""Make what is released and try it: wheel, source, bill of materials, audit, the demo in an empty environment.

    python scripts/release.py [--no-audit] [DIST]

Needs the extra `release`. The wheel is installed into a new environment with the versions of constraints.txt,
`pomona demo` is run there from an empty folder, and what that environment holds is the bill of materials
(CycloneDX). pip-audit asks the package index about known faults of every version; one that it cannot ask
about counts as a failure, and `--no-audit` is for machines that do not reach it.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST_WHEEL = 8 << 20


def run(*command: str | Path, folder: Path = ROOT) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], cwd=folder, check=True)


def built(dist: Path) -> Path:
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    wheel = max(dist.glob("pomona-*.whl"), key=lambda path: path.stat().st_mtime)
    size = wheel.stat().st_size
    if size > LARGEST_WHEEL:
        sys.exit(f"{wheel.name} has {size:,} bytes, more than {LARGEST_WHEEL:,}")
    print(f"{wheel.name}: {size:,} bytes")
    return wheel


def main(dist: Path, audits: bool) -> None:
    wheel = built(dist)
    with tempfile.TemporaryDirectory() as folder:
        home, empty = Path(folder) / "venv", Path(folder) / "empty"
        empty.mkdir()
        venv.create(home, with_pip=True)
        python = home / "bin/python"
        constraints = ["--constraint", ROOT / "constraints.txt"]
        run(python, "-m", "pip", "install", "--quiet", *constraints, wheel)
        run(home / "bin/pomona", "demo", folder=empty)
        bill = dist / f"{wheel.name.split('-py3')[0]}.cdx.json"
        run(sys.executable, "-m", "cyclonedx_py", "environment", python, "--output-file", bill)
        print(f"bill of materials: {bill.name}")
        if audits:
            kept = Path(folder) / "installed.txt"
            frozen = [python, "-m", "pip", "freeze", "--exclude", "pomona"]
            kept.write_bytes(subprocess.run(frozen, check=True, stdout=subprocess.PIPE).stdout)
            run(
                sys.executable,
                "-m",
                "pip_audit",
                "--strict",
                "--no-deps",
                "--disable-pip",
                "-r",
                kept,
            )


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--no-audit"]
    main(Path(words[0] if words else ROOT / "dist").resolve(), "--no-audit" not in sys.argv)
