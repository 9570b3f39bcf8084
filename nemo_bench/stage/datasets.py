"""The prepared datasets of a stage folder: what `prepare_data.py` puts beside the tokenizer, under any name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_bench.errors import BenchError
from nemo_bench.stage.files import byte_progress

FOLDER = "llama3.1-dataset"
# In the order in which they must appear: an index with a description means a complete dataset.
SUFFIXES = (".json", ".bin", ".idx")


@dataclass(frozen=True)
class StageDataset:
    """A .bin and .idx, with the description that `prepare_data.py` leaves beside them.

    Attributes:
        tokens: None where it cannot be read.
        made_at: as its description says; None where it has none, and thus no checksums.
        problem: why it cannot be used; None: as far as was looked, it can.
    """

    prefix: Path
    size_bytes: int
    tokens: int | None
    made_at: str | None
    problem: str | None

    @property
    def files(self) -> list[Path]:
        return [path for suffix in SUFFIXES if (path := Path(f"{self.prefix}{suffix}")).exists()]


def find(stage: Path, *, contents: bool) -> list[StageDataset]:
    """All datasets there, halves of one included.

    With `contents` every byte is read and held against the description; else the index, and the size of the .bin.
    """
    paths = [path for path in (stage / FOLDER).glob("*.*") if path.suffix in SUFFIXES[1:] and path.name[0] != "."]
    size_bytes: dict[Path, int] = {}
    for path in sorted(paths):
        prefix = path.with_suffix("")
        size_bytes[prefix] = size_bytes.get(prefix, 0) + path.stat().st_size
    found = []
    with byte_progress("verifying datasets", sum(size_bytes.values()) if contents else 0) as advance:
        for prefix, size in size_bytes.items():
            found.append(_look(prefix, size, contents))
            advance(size)
    return found


def _look(prefix: Path, size_bytes: int, contents: bool) -> StageDataset:
    from nemo_bench.data.indexed_dataset import inspect
    from nemo_bench.data.shard import read_manifest, verify

    made_at = None
    try:
        description = read_manifest(prefix)
        made_at = None if description is None else description["made_at"]
        info = verify(prefix, None) if contents else inspect(prefix)
    except (BenchError, OSError) as error:
        return StageDataset(prefix, size_bytes, None, made_at, str(error))
    except ImportError:  # numpy: a bundle is also installed with the packages that come in it
        return StageDataset(prefix, size_bytes, None, made_at, None)
    return StageDataset(prefix, size_bytes, info.tokens, made_at, None)
