"""A run folder in which nothing was computed is left as it was."""

from pathlib import Path


def entries_of(out: Path) -> set[Path] | None:
    """Return what is in a folder, None where it is absent."""
    try:
        return set(out.iterdir())
    except OSError:  # absent; or it cannot be read, which opening it as a run will tell
        return None


def forget_unbegun(out: Path, before: set[Path] | None) -> None:
    """Leave the folder as it was if nothing was computed: another recipe may use it."""
    if (out / "checkpoint").exists() or (out / "results.json").exists():
        return
    for path in set(out.iterdir()) - (before or set()):
        path.unlink()
    if before is None:
        out.rmdir()
