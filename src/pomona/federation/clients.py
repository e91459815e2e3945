"""The clients of a federation and where their rows come from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pomona.data.formats import Auto, RowFormat
from pomona.data.rows import Row, read_rows
from pomona.data.tables import TABLES
from pomona.errors import PomonaError
from pomona.federation.partition import ByCategory, Dealt, Partition, check_clients
from pomona.federation.partition.dealing import by_category, shuffled
from pomona.files import check_name
from pomona.seeds import numpy_generator


@dataclass(frozen=True)
class ClientRows:
    """One client's own rows."""

    train: list[Row] = field(repr=False)
    test: list[Row] = field(repr=False)


@dataclass(frozen=True)
class ClientData:
    """Ready files per client, or rows of one file dealt by a partition.

    Neither test rows nor how they are dealt depend on the seed: all seeds are tested on the same rows.

    Attributes:
        folder: Ready files per client: NAME.train.jsonl and NAME.test.jsonl, or .json, .csv, .parquet.
        train: Or one such file, or a data set of the Hub, dealt by the partition.
        test: The same of test rows, dealt by the rule that deals the train rows.
        partition: Who holds what.
        format: The fields of a row; recognised by a file's first row, or named.
        category: The field that rows are dealt by, if it is not the format's own.
        held_out: Without `test`: rows of every category of `train` that are kept for testing.
        test_rows: Test rows that are kept of every category; 0: all.
        central: All clients are tested on all test rows, not on their own share.
    """

    folder: Path | None = None
    train: Path | str | None = None
    test: Path | str | None = None
    partition: Partition = field(default_factory=ByCategory)
    format: RowFormat = field(default_factory=Auto)
    category: str = ""
    held_out: int = 0
    test_rows: int = 0
    central: bool = False

    def __post_init__(self) -> None:
        for name in ("held_out", "test_rows"):
            if getattr(self, name) < 0:
                raise PomonaError(f"data {name} {getattr(self, name)} is negative; use 0 or more")
        if (self.folder is None) == (self.train is None and self.test is None):
            raise PomonaError(
                "data needs either folder (ready files per client) or train and test, not both"
            )
        if self.held_out and (self.folder is not None or self.test is not None):
            raise PomonaError("data has test rows and held_out; leave one of them out")
        if self.folder is None and self.train is None:
            raise PomonaError("data has no train file; give train and test together")
        if self.folder is None and self.test is None and not self.held_out:
            raise PomonaError(
                "data has no test file; give train and test together, or say in held_out how many rows "
                "of each category of train to keep for it"
            )

    def load(self, seed: int) -> dict[str, ClientRows]:
        """Return every client's rows, by name, in the order of the names.

        Raises `PomonaError` for a missing or broken file and for a client without rows.
        """
        train, test = self._ready() if self.folder is not None else self._dealt(seed)
        check_clients(train, test)
        for name in train:
            check_name(name)
        return {name: ClientRows(train[name], test[name]) for name in sorted(train)}

    def _dealt(self, seed: int) -> tuple[Dealt, Dealt]:
        train, test = self._sources()
        test = _some_of_each(test, self.test_rows)
        if not self.central:
            return self.partition(train, test, seed)
        own, _ = self.partition(train, (), seed)
        return own, _for_all(own, test)

    def _sources(self) -> tuple[list[Row], list[Row]]:
        assert self.train is not None
        rows = read_rows(self.train, self.format, "train", self.category)
        if self.test is not None:
            return rows, read_rows(self.test, self.format, "test", self.category)
        kept = set(map(id, _some_of_each(rows, self.held_out)))
        for category, own in by_category(rows).items():
            if len(own) <= self.held_out:
                raise PomonaError(
                    f'{self.train} has {len(own)} rows of "{category}" and held_out takes '
                    f"{self.held_out} of each category; make held_out smaller"
                )
        return [r for r in rows if id(r) not in kept], [r for r in rows if id(r) in kept]

    def _ready(self) -> tuple[Dealt, Dealt]:
        assert self.folder is not None
        files = {split: _files(self.folder, split) for split in ("train", "test")}
        names = list(files["train"])
        for name in names:
            if name not in files["test"]:
                raise PomonaError(
                    f'client "{name}" has no test rows: cannot read {self.folder / name}.test.jsonl, '
                    "nor .json, .csv or .parquet; give it one"
                )
        train, test = (
            {n: read_rows(own[n], self.format, split, self.category) for n in names}
            for split, own in files.items()
        )
        if self.central:
            return train, _for_all(
                train, _some_of_each([row for own in test.values() for row in own], self.test_rows)
            )
        return train, {name: _some_of_each(own, self.test_rows) for name, own in test.items()}


def site_rows(name: str, data: Path, test: Path | None, held_out: float) -> ClientRows:
    """Return a site's rows; without `test` the share `held_out` of its `data`, drawn once, is kept for it.

    Raises `PomonaError` for a missing or broken file and for one without rows enough.
    """
    rows = read_rows(data, None, "train")
    if test is not None:
        return ClientRows(rows, read_rows(test, None, "test"))
    if not 0 < held_out < 1:
        raise PomonaError(f"held-out {held_out} is no share of the rows; use for example 0.1")
    count = max(1, round(held_out * len(rows)))
    if count >= len(rows):
        raise PomonaError(
            f"{data} has {len(rows)} rows, too few to keep some for testing; give --test"
        )
    kept = set(numpy_generator("held out", name).permutation(len(rows))[:count].tolist())
    parts = (
        [row for i, row in enumerate(rows) if (i in kept) == tested] for tested in (False, True)
    )
    return ClientRows(*parts)


def _some_of_each(rows: Sequence[Row], count: int) -> list[Row]:
    """Keep `count` rows of every category, in their order; 0 keeps all."""
    chosen: set[int] = set()
    for category, own in by_category(rows).items():
        order = numpy_generator("test rows", category).permutation(len(own))
        chosen |= {id(own[i]) for i in order[: count or None]}
    return [row for row in rows if id(row) in chosen]


def _for_all(clients: Dealt, test: Sequence[Row]) -> Dealt:
    """Give every client the same test rows, mixed: measuring only the first ones stays fair."""
    mixed = shuffled(test, "central test")
    return dict.fromkeys(clients, mixed)


def _files(folder: Path, split: str) -> dict[str, Path]:
    """Return every client's file; raises `PomonaError` when there is none, or two for one client."""
    if not folder.is_dir():
        raise PomonaError(
            f"{folder} is not a folder; it should hold NAME.train.jsonl and NAME.test.jsonl "
            "for every client"
        )
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*.{split}.*")):
        name = path.name.removesuffix(f".{split}{path.suffix}")
        if path.suffix not in TABLES or name == path.name:
            continue
        if name in files:
            raise PomonaError(
                f'client "{name}" has two files, {files[name].name} and {path.name}, in {folder}; '
                "leave one"
            )
        files[name] = path
    if not files and split == "train":
        raise PomonaError(f"{folder} holds no NAME.train.jsonl; name one such file per client")
    return files
