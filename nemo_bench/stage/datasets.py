"""The prepared datasets of a stage folder: what `prepare_data.py` puts beside the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_bench.errors import BenchError

FOLDER = "llama3.1-dataset"
PATTERN = "my-llama_*_text_document"


@dataclass(frozen=True)
class StageDataset:
    """One .bin/.idx pair; `problem` says why it cannot be used, None: as far as its index and sizes tell, it can."""

    prefix: Path
    size_bytes: int
    tokens: int | None  # None also where this machine cannot read an index
    problem: str | None

    @property
    def files(self) -> tuple[Path, Path]:
        return Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")


def find(stage: Path) -> list[StageDataset]:
    """All datasets there, halves of one included."""
    folder = stage / FOLDER
    prefixes = {path.with_suffix("") for suffix in ("bin", "idx") for path in folder.glob(f"{PATTERN}.{suffix}")}
    return [_look(prefix) for prefix in sorted(prefixes)]


def _look(prefix: Path) -> StageDataset:
    from nemo_bench.data.indexed_dataset import inspect

    size_bytes = sum(path.stat().st_size for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")) if path.exists())
    try:
        return StageDataset(prefix, size_bytes, inspect(prefix).tokens, None)
    except BenchError as error:
        return StageDataset(prefix, size_bytes, None, str(error))
    except ImportError:  # numpy: a bundle is also installed with the packages that come in it
        return StageDataset(prefix, size_bytes, None, None)
