"""Plain text by domain, and windows of tokens from it."""

import hashlib
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pomona.data.records import read_records, read_utf8, text_field
from pomona.errors import PomonaError
from pomona.seeds import numpy_generator
from pomona.shapes import Tokens

_AT_ONCE = 1000  # documents that are encoded together
_HELD_OUT = (".valid.", ".test.")

# Data in another form, which as plain text would be measured with all its brackets and quotes.
_TABLES = {".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".npy", ".safetensors"}
_DOCUMENTS = {".html", ".htm", ".xml", ".rtf", ".pdf", ".doc", ".docx", ".odt", ".epub"}
_ARCHIVES = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z"}


def read_domains(
    source: Path | str, split: Literal["train", "valid"] = "train"
) -> dict[str, list[str]]:
    """Read one domain per .jsonl or .txt file of a folder, or of the files a glob matches, or one file.

    A domain is named by its file up to the first dot. Files called NAME.valid.* or NAME.test.* are
    held out: "train" passes over them, "valid" reads only them. Sorted by name. Raises
    `PomonaError` for a missing folder, an empty file, or two files of one name.
    """
    paths = _domain_files(source)
    held_out = split == "valid"
    domains: dict[str, list[str]] = {}
    for path in paths:
        if _is_held_out(path) != held_out and len(paths) > 1:
            continue
        name = path.name.partition(".")[0]
        if name in domains:
            raise PomonaError(
                f'{path} is a second file of the domain "{name}"; join or rename them'
            )
        domains[name] = read_texts(path)
    if not domains:
        kind = "held-out .valid. " if held_out else ""
        raise PomonaError(f"{source} holds no {kind}.jsonl or .txt files; put one per domain there")
    return domains


def has_held_out(source: Path | str) -> bool:
    """Tell whether a folder, or what a glob matches, has files that "valid" reads."""
    return any(map(_is_held_out, _domain_files(source)))


def read_texts(path: Path) -> list[str]:
    """Read the documents of a .jsonl (field "text") or of plain text (separated by blank lines).

    Plain text may have any suffix. Raises `PomonaError` for an empty file, and for one that is not
    plain text by its suffix or by its bytes.
    """
    if path.suffix == ".jsonl":
        texts = [text_field(r, "text", f"{path}:{line}") for line, r in read_records(path)]
    else:
        texts = _plain_text(path).split("\n\n")
    kept = [text.strip() for text in texts if text.strip()]
    if not kept:
        raise PomonaError(f"{path} is empty; it should hold the text of one domain")
    return kept


def _plain_text(path: Path) -> str:
    remedy = 'save it as .txt, or as .jsonl with one {"text": …} per line'
    if path.suffix.lower() in _TABLES | _DOCUMENTS | _ARCHIVES:
        raise PomonaError(f"{path} is {path.suffix} data and no plain text; {remedy}")
    text = read_utf8(path)
    if "\0" in text:
        raise PomonaError(f"{path} holds zero bytes and is no plain text; {remedy}")
    return text


def sample_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int | str,
    domain: str,
) -> Tokens:
    """Return `count` random windows of `length` tokens, [count, length].

    DIVE (arXiv 2506.09351), calibration: a window of a random text that is long enough, or of
    randomly drawn short texts joined until they are, each with its own beginning-of-sequence token.
    A function of (seed, domain). Raises `PomonaError` when the domain has less than one window.
    """
    documents = encode_texts(texts, tokenizer)
    found = sum(map(len, documents))
    if found < length:
        raise PomonaError(
            f'domain "{domain}" has {found} tokens, fewer than one window of {length}; give it more '
            "text or use shorter windows"
        )
    generator = numpy_generator(seed, "windows", domain)
    windows: list[list[int]] = []
    while len(windows) < count:
        joined: list[int] = []
        while len(joined) < length:
            joined += documents[int(generator.integers(len(documents)))]
        start = int(generator.integers(len(joined) - length + 1))
        windows.append(joined[start : start + length])
    return torch.tensor(windows)


def consecutive_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int = 0
) -> Tokens:
    """Return non-overlapping windows of all texts in a row, [n, length], at most `limit` (0: all).

    A rest shorter than a window is left out; text shorter than one window gives a single short one.
    Tokens take four bytes each, and no more text is encoded than the limit needs.
    """
    parts: list[Tensor] = []
    found = 0
    for start in range(0, len(texts), _AT_ONCE):
        own = encode_texts(texts[start : start + _AT_ONCE], tokenizer)
        parts.append(torch.tensor([t for tokens in own for t in tokens], dtype=torch.int32))
        found += len(parts[-1])
        if limit and found >= limit * length:
            break
    length = max(1, min(length, found))
    whole = min(found // length, limit or found)
    return torch.cat(parts)[: whole * length].view(whole, length)


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return each text's tokens, led by the beginning-of-sequence token where one is defined."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    return [[*bos, *tokens] for tokens in encoded]  # pyright: ignore[reportGeneralTypeIssues]


def digest(texts: Sequence[str]) -> str:
    """Return a hash of documents, in their order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()


def _is_held_out(path: Path) -> bool:
    return any(mark in path.name for mark in _HELD_OUT)


def _domain_files(source: Path | str) -> list[Path]:
    text = str(source)
    if has_magic(text) and not Path(text).is_dir():
        paths = [Path(match) for match in glob(text)]  # noqa: PTH207 - absolute patterns
    elif Path(text).is_file():
        return [Path(text)]
    elif Path(text).is_dir():
        paths = list(Path(text).iterdir())
    else:
        raise PomonaError(
            f"{text} is no folder and no file; it should hold one .jsonl or .txt per domain"
        )
    return sorted(path for path in paths if path.suffix in (".jsonl", ".txt"))
