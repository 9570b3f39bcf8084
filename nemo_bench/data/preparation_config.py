"""The schema of `prepare_data.py`'s configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from nemo_bench.config import ClusterConfig, DataConfig, Launch, ModelConfig
from nemo_bench.data.encoder import Backend


class Action(Enum):
    """What `prepare_data.py` does."""

    prepare = "prepare"
    check = "check"  # read back what is there


@dataclass
class PreparationConfig:
    """Which documents become which datasets, and how."""

    action: Action = Action.prepare
    launch: Launch = Launch.run
    data: DataConfig = field(default_factory=DataConfig)  # data.folder: where the datasets go
    model: ModelConfig = field(default_factory=ModelConfig)  # data=local: its vocabulary is what is trained
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # with hydra/launcher=submitit_slurm
    stage_path: str = MISSING
    url: str = MISSING  # of shard {shard}
    shards: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # URLs or files, in place of the shards; one dataset each
    output_prefix: str = MISSING  # <data.folder>/<output_prefix>_<number>_<text_key>_document.bin and .idx
    tokenizer_folder: str | None = None
    text_key: str = "text"  # of a JSON document, or a Parquet file's column
    append_eod: bool = True  # an end-of-document token after each document
    encoder: Backend = Backend.auto
    max_bad_share: float = 1e-4  # of the documents may be broken; they are left out, counted and shown
    keep_downloads: bool = True  # false: delete a source once what was made from it is verified and in place
    download_folder: str = MISSING
    at_once: int = 4  # shards being downloaded or tokenised
    threads: int | None = None  # a shard's; null: this machine's cores, shared out
    overwrite: bool = False  # make anew what is there already
    wait: bool = True  # for submitted jobs, to say at the end what was made


def register() -> None:
    """Makes the schema known to Hydra."""
    ConfigStore.instance().store(name="preparation_schema", node=PreparationConfig)


register()
