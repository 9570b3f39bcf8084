"""The schema of `setup_stage.py`'s configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from nemo_bench.config import ClusterConfig, EntrypointConfig
from nemo_bench.fields import PATH, choice, number

PARTS = ("image", "tokenizer", "code")


@dataclass
class TokenizerConfig:
    """A tokenizer folder."""

    name: str = MISSING
    source: str = choice(MISSING, "huggingface", "local")  # local: trained on the sources of this Python's library
    folder: str = field(default=MISSING, metadata=PATH)  # inside the stage folder
    repo: str = ""  # source=huggingface
    revision: str = "main"  # source=huggingface: branch, tag or commit
    files: list[str] = field(default_factory=list)  # source=huggingface
    vocab_size: int | None = number(None, least=1, most=2**24)  # added tokens included; huggingface: null is any
    corpus_bytes: int = number(6_000_000, least=1, most=10**12)  # source=local: about this much text


@dataclass
class StageConfig:
    """One call of `setup_stage.py`."""

    action: str = choice("fill", "check", "pack", "install")  # fill: make what is missing
    stage_path: str = field(default=MISSING, metadata=PATH)
    entrypoint: EntrypointConfig = field(default_factory=EntrypointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # of the Slurm job, with its launcher
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"valid": PARTS})
    bundle: str | None = field(default=None, metadata=PATH)  # of pack and install: a .tar or .tar.zst file
    enroot: str = "enroot"  # the executable
    image_gib: float = number(25.0, least=0, most=10**6)  # free space required before an image is imported: an estimate
    launch: str = choice("run", "dry")


ConfigStore.instance().store(name="stage_schema", node=StageConfig)
