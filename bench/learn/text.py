"""The text task: next-byte prediction on the Python standard library's own source, split by file."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from bench.learn.rows import CPU
from bench.learn.task import Batch

# Tests are long tables of literals, pydoc_data one generated text of 750 kB, lib2to3's grammar tests broken on purpose.
SKIPPED_FOLDERS = frozenset({"__pycache__", "idle_test", "lib2to3", "pydoc_data", "site-packages", "test", "tests"})
VALIDATION_SHARE = 10


@dataclass(frozen=True)
class Corpus:
    """Bytes of the two splits, each the concatenation of its files in order of path, and what they were read from."""

    train: UInt8[Tensor, "bytes"]
    validation: UInt8[Tensor, "bytes"]
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    digest: str


def source_files(root: Path) -> list[Path]:
    """Every `*.py` below `root` outside `SKIPPED_FOLDERS`, in order of relative path."""
    found = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def is_validation(content: bytes) -> bool:
    """Whether a file of this content is held out: its SHA-256 decides, so copies of a file stay on one side."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % VALIDATION_SHARE == 0


def standard_library() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def installed_packages() -> Path:
    """Folder of the packages installed for the running Python."""
    return Path(sysconfig.get_path("purelib"))


def read_corpus(*roots: Path) -> Corpus:
    """Read and split the `*.py` files below `roots`; about one file in `VALIDATION_SHARE` is held out.

    Raises:
        ValueError: a split is empty, because `roots` hold hardly any Python source.
    """
    contents = {path.relative_to(root).as_posix(): path.read_bytes() for root in roots for path in source_files(root)}
    held_out = {name for name, content in contents.items() if is_validation(content)}
    train = {name: content for name, content in contents.items() if name not in held_out}
    validation = {name: content for name, content in contents.items() if name in held_out}
    if not train or not validation:
        raise ValueError(
            f"root: expected a folder with enough *.py files to split, got {len(contents)} of them below "
            f"{', '.join(map(str, roots))}; "
            "install the standard library's source, or pass another folder with --source"
        )
    return Corpus(
        _joined(train.values()),
        _joined(validation.values()),
        tuple(train),
        tuple(validation),
        hashlib.sha256(b"\0".join(contents.values())).hexdigest(),
    )


def _joined(contents: Iterable[bytes]) -> UInt8[Tensor, "bytes"]:
    return torch.frombuffer(bytearray(b"\n".join(contents)), dtype=torch.uint8)


class TextTask:
    """Next-byte prediction: training rows are random crops of the training bytes, validation rows are evenly spaced."""

    name = "text"
    vocabulary = 256
    unit = "byte"

    def __init__(self, corpus: Corpus, seed: int, device: torch.device = CPU):
        self.corpus = corpus
        self.seed = seed
        self.train = corpus.train.to(device)

    def training(self, step: int, size: int, context: int) -> Batch:
        """`size` crops of `context` bytes at places drawn from `(seed, step)`, on the task's device."""
        starts = np.random.default_rng((self.seed, step)).integers(self._crops(self.train, context), size=size)
        return _batch(self.train, torch.from_numpy(starts).to(self.train.device), context)

    def validation(self, rows: int, size: int, context: int) -> Iterator[Batch]:
        """`rows` crops of the held-out bytes, evenly spaced and independent of the seed."""
        starts = torch.linspace(0, self._crops(self.corpus.validation, context) - 1, rows, dtype=torch.float64).long()
        for part in starts.split(size):
            yield _batch(self.corpus.validation, part, context)

    def prompt(self, tokens: int) -> Int64[Tensor, "1 t"]:
        """One held-out crop, chosen by the seed."""
        start = np.random.default_rng(self.seed).integers(self._crops(self.corpus.validation, tokens), size=1)
        return _batch(self.corpus.validation, torch.from_numpy(start), tokens).inputs

    def decode(self, tokens: list[int]) -> str:
        """Bytes as UTF-8, broken sequences replaced."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def characters(self, tokens: list[int]) -> list[str]:
        """Bytes as ASCII, a middle dot for what that cannot show."""
        return [chr(token) if token == 10 or 32 <= token < 127 else "\N{MIDDLE DOT}" for token in tokens]

    def describe(self) -> dict[str, object]:
        """Counts of both splits and the digest of all files."""
        return {
            "train_bytes": len(self.corpus.train),
            "train_files": len(self.corpus.train_files),
            "validation_bytes": len(self.corpus.validation),
            "validation_files": len(self.corpus.validation_files),
            "sha256": self.corpus.digest,
        }

    @staticmethod
    def _crops(data: UInt8[Tensor, "bytes"], context: int) -> int:
        if len(data) <= context:
            raise ValueError(
                f"context: expected fewer tokens than a split has bytes ({len(data)}), got {context}; shorten --context"
            )
        return len(data) - context


class PackedTextTask(TextTask):
    """Next-byte prediction in rows that pack several excerpts, each a document that sees itself alone.

    Where a row is cut into documents depends on the seed and the step, or on the row in validation; their lengths run
    from 1 to the whole row.
    """

    name = "packed-text"
    documents = 4

    def training(self, step: int, size: int, context: int) -> Batch:
        """`size` rows of excerpts, cut and placed by `(seed, step)`."""
        return self._pack(self.corpus.train, np.random.default_rng((self.seed, step)), size, context)

    def validation(self, rows: int, size: int, context: int) -> Iterator[Batch]:
        """`rows` rows of held-out excerpts, independent of the seed."""
        generator = np.random.default_rng(0)
        for first in range(0, rows, size):
            yield self._pack(self.corpus.validation, generator, min(size, rows - first), context)

    def _pack(self, data: UInt8[Tensor, "bytes"], generator: np.random.Generator, rows: int, context: int) -> Batch:
        cuts = torch.from_numpy(generator.integers(1, context + 1, size=(rows, self.documents - 1))).sort(1).values
        token = torch.arange(context).expand(rows, -1)
        documents = torch.searchsorted(cuts, token.contiguous(), right=True)
        begin = torch.nn.functional.pad(cuts, (1, 0)).gather(1, documents)
        crops = self._crops(data, context)
        place = torch.from_numpy(generator.integers(crops, size=(rows, self.documents))).gather(1, documents)
        at = place + token - begin
        return Batch(data[at].long(), data[at + 1].long(), documents)


def _batch(data: UInt8[Tensor, "bytes"], starts: Int64[Tensor, "b"], context: int) -> Batch:
    rows = data[starts[:, None] + torch.arange(context + 1, device=data.device)].long()
    return Batch(rows[:, :-1], rows[:, 1:])
