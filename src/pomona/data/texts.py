"""Plain text by domain, and windows of tokens from it."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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

# Documents that are encoded together: at most so many, and no more once they have so many characters. A
# tokenizer's own lists take tens of bytes per token, what is kept of them takes four.
_AT_ONCE = 1000
_CHARACTERS = 1 << 18
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


@dataclass(frozen=True)
class Documents:
    """The tokens of documents in a row [N], int32; document i ends before `end_X[i]`."""

    token_N: Tensor = field(repr=False)
    end_X: Tensor = field(repr=False)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.end_X)

    def __getitem__(self, index: int) -> Tensor:
        """Return one document's tokens, no copy."""
        return self.token_N[int(self.end_X[index - 1]) if index else 0 : int(self.end_X[index])]


def sample_windows(
    documents: Documents, count: int, length: int, seed: int | str, domain: str
) -> Tokens:
    """Return `count` random windows of `length` tokens, [count, length].

    DIVE (arXiv 2506.09351), calibration: a window of a random text that is long enough, or of
    randomly drawn short texts joined until they are, each with its own beginning-of-sequence token.
    A function of (seed, domain). Raises `PomonaError` when the domain has less than one window.
    """
    found = len(documents.token_N)
    if found < length:
        raise PomonaError(
            f'domain "{domain}" has {found} tokens, fewer than one window of {length}; give it more '
            "text or use shorter windows"
        )
    generator = numpy_generator(seed, "windows", domain)
    windows = torch.empty(count, length, dtype=torch.int64)
    for window_T in windows:
        parts: list[Tensor] = []
        joined = 0
        while joined < length:
            parts.append(documents[int(generator.integers(len(documents)))])
            joined += len(parts[-1])
        start = int(generator.integers(joined - length + 1))
        own_N = parts[0] if len(parts) == 1 else torch.cat(parts)
        window_T.copy_(own_N[start : start + length])
    return windows


def consecutive_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int = 0
) -> Tokens:
    """Return non-overlapping windows of all texts in a row, [n, length], at most `limit` (0: all).

    A rest shorter than a window is left out; text shorter than one window gives a single short one.
    Tokens take four bytes each, and no more text is encoded than the limit needs.
    """
    token_N = encode_texts(texts, tokenizer, limit * length).token_N
    length = max(1, min(length, len(token_N)))
    whole = min(len(token_N) // length, limit or len(token_N))
    return token_N[: whole * length].view(whole, length)


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, enough: int = 0
) -> Documents:
    """Return each text's tokens, led by the beginning-of-sequence token where one is defined.

    A few documents are encoded at a time, each of them whole; no more once there are `enough` tokens (0:
    all).
    """
    bos = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    tokens, ends = array("i"), array("q")
    for batch in _batches(texts):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for own in cast(list[list[int]], encoded["input_ids"]):
            tokens.extend(bos)
            tokens.extend(own)
            ends.append(len(tokens))
        if enough and len(tokens) >= enough:
            break
    return Documents(_tensor(tokens, torch.int32), _tensor(ends, torch.int64))


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the documents in order, a few at a time."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _AT_ONCE or size >= _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tensor(values: "array[int]", dtype: torch.dtype) -> Tensor:
    """Return numbers as a tensor on the same memory."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


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
