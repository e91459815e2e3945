"""The clients of a federation and where their rows come from."""

from dataclasses import dataclass, field
from pathlib import Path

from pomona.data.rows import Row, read_rows
from pomona.errors import PomonaError
from pomona.federation.partition import ByCategory, Partition, check_clients


@dataclass(frozen=True)
class ClientRows:
    """One client's own rows."""

    train: list[Row] = field(repr=False)
    test: list[Row] = field(repr=False)


@dataclass(frozen=True)
class ClientData:
    """Ready files per client (`folder`), or one `train` and one `test` file dealt by a partition.

    In `folder` every client has NAME.train.jsonl and NAME.test.jsonl. `format` is a row format or
    "auto".
    """

    folder: Path | None = None
    train: Path | None = None
    test: Path | None = None
    partition: Partition = field(default_factory=ByCategory)
    format: str = "auto"

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.train is None and self.test is None):
            raise PomonaError(
                "data needs either folder (ready files per client) or train and test, not both"
            )
        if self.folder is None and (self.train is None or self.test is None):
            missing = "train" if self.train is None else "test"
            raise PomonaError(f"data has no {missing} file; give train and test together")

    def load(self, seed: int) -> dict[str, ClientRows]:
        """Return every client's rows, by name, in the order of the names.

        Raises `PomonaError` for a missing or broken file and for a client without rows.
        """
        if self.folder is not None:
            train, test = _read_folder(self.folder, self.format)
        else:
            assert self.train is not None and self.test is not None
            train = self.partition(read_rows(self.train, self.format), seed, "train")
            test = self.partition(read_rows(self.test, self.format), seed, "test")
        check_clients(train, test)
        for name in train:
            _check_name(name)
        return {name: ClientRows(train[name], test[name]) for name in sorted(train)}


def _read_folder(folder: Path, format_: str) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    if not folder.is_dir():
        raise PomonaError(
            f"{folder} is not a folder; it should hold NAME.train.jsonl and NAME.test.jsonl "
            "for every client"
        )
    names = sorted(path.name.removesuffix(".train.jsonl") for path in folder.glob("*.train.jsonl"))
    if not names:
        raise PomonaError(f"{folder} holds no NAME.train.jsonl; name one such file per client")
    train = {name: read_rows(folder / f"{name}.train.jsonl", format_) for name in names}
    test = {name: read_rows(folder / f"{name}.test.jsonl", format_) for name in names}
    return train, test


def _check_name(name: str) -> None:
    """A client's name becomes a folder in the run directory."""
    if not name.strip() or name.startswith(".") or any(c in '/\\\0:*?"<>|' for c in name):
        raise PomonaError(
            f'client name "{name}" cannot be a folder name; use letters, digits, spaces, - and _'
        )
