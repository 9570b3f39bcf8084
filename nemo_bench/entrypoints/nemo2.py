"""`entrypoint=nemo2`: this project's own program on the NeMo 2 API, nemo_bench/training."""

from __future__ import annotations

from pathlib import Path

from nemo_bench.config import TrainConfig
from nemo_bench.entrypoints import Entrypoint

BLACKWELL = 10.0  # compute capability


class Nemo2(Entrypoint):
    """`python -m nemo_bench.training.rank RUN_FOLDER`."""

    def derived_environment(self, cfg: TrainConfig) -> dict[str, str]:
        """Return what NVIDIA derives: NeMo of September 2025, scripts/performance and PerfEnvPlugin."""
        m, environment = cfg.model, dict[str, str]()
        if cfg.gpu.device != "cuda":
            return environment
        if (cfg.gpu.compute_capability or 0) >= BLACKWELL:
            environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # fewer would serialise its streams
        elif (m.tensor_model_parallel_size > 1 or m.context_parallel_size > 1) and not m.optim.use_megatron_fsdp:
            environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # communication starts before the product that hides it
        if m.pipeline_model_parallel_size > 1:
            environment["NCCL_P2P_NET_CHUNKSIZE"] = "2097152"
        if m.cuda_graph_impl == "none" and not m.optim.use_megatron_fsdp:
            environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        return environment

    def rank_command(self, cfg: TrainConfig, run_dir: Path, python: str) -> list[str]:
        return [python, "-u", "-m", "nemo_bench.training.rank", str(run_dir)]


ENTRYPOINT = Nemo2()
