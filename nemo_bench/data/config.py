"""The schema of `prepare_data.py`'s configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from nemo_bench.config import ClusterConfig, DataConfig, ModelConfig
from nemo_bench.fields import PATH, choice, number


@dataclass
class PreparationConfig:
    """Which documents become which datasets, and how."""

    action: str = choice("prepare", "check")  # check: read back what exists
    launch: str = choice("run", "dry")
    data: DataConfig = field(default_factory=DataConfig)  # data.folder: where the datasets go
    model: ModelConfig = field(default_factory=ModelConfig)  # data=local: the size of the trained vocabulary
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # with hydra/launcher=submitit_slurm
    stage_path: str = field(default=MISSING, metadata=PATH)
    url: str = MISSING  # of shard {shard}
    shards: list[int] = field(default_factory=list, metadata={"least": 0})
    sources: list[str] = field(default_factory=list)  # URLs or files instead of the shards; one dataset for each
    only: int | None = number(None, least=0)  # of the shards or sources: one alone, as in a job of its own
    output_prefix: str = MISSING  # <data.folder>/<output_prefix>_<number>_<text_key>_document.bin and .idx
    tokenizer_folder: str | None = field(default=None, metadata=PATH)
    text_key: str = "text"  # the text's key in a JSON document, or column in a Parquet file
    encoder: str = choice("auto", "tokenizers")  # auto: gigatoken where it can be used
    max_bad_share: float = number(1e-4, least=0, most=1)  # of the documents may be broken; left out, counted and shown
    overwrite: bool = False  # make existing datasets again
    wait: bool = True  # for submitted jobs, and show what they made


ConfigStore.instance().store(name="preparation_schema", node=PreparationConfig)
