"""The stack on NeMo 2: model, data, optimizer, trainer and callbacks of a configuration, and `llm.pretrain`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.gpt.data import mock
from nemo.collections.llm.gpt.model.llama import Llama3Config, Llama31Config
from nemo.lightning import io
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.callbacks.garbage_collection import GarbageCollectionCallback
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler
from nemo.utils.exp_manager import TimingCallback

from nemo_bench.config import TrainConfig
from nemo_bench.errors import BenchError
from nemo_bench.training import settings
from nemo_bench.training.checkpoint import CheckpointOnSignal, build_checkpoint_callback, build_resume
from nemo_bench.training.hooks import Hooks, Step, call
from nemo_bench.training.known import known, left_out

# What Lightning's strategy wants to be told of the model's settings.
_LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("pipeline_model_parallel_layout", "context_parallel_size", "sequence_parallel", "use_te_rng_tracker"),
)


def pretrain(cfg: TrainConfig, run_dir: Path, hooks: list[Hooks]) -> None:
    """Train `cfg` to its last step, or until a preemption."""
    if cfg.model.cuda_graph_scope == "full_iteration":
        from megatron.core.full_cuda_graph import FullCudaGraphWrapper
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        # NeMo asks for a setting that megatron-core has renamed.
        MegatronStep.forward_backward_func = property(lambda step: FullCudaGraphWrapper(get_forward_backward_func()))
    tokenizer, strategy, o = _tokenizer(cfg), build_strategy(cfg), cfg.model.optim
    if cfg.gpu.device == "cpu":
        # NeMo moves the tensors of a checkpoint to a CUDA device by its number.
        io.pl._fix_tensors_device = lambda checkpoint: checkpoint
        # NeMo's ProgressPrinter reads them on rank 0 alone, which all-gathers: gloo's next collective never ends.
        strategy.timers = None
    llm.pretrain(
        model=build_model(cfg, tokenizer),
        data=_data(cfg, tokenizer),
        trainer=_trainer(cfg, _callbacks(cfg, run_dir, hooks), strategy),
        log=nl.NeMoLogger(
            explicit_log_dir=str(run_dir / "nemo"),
            log_global_rank_0_only=True,
            ckpt=build_checkpoint_callback(cfg, run_dir),
            update_logger_directory=False,
        ),
        resume=build_resume(cfg, run_dir),
        optim=nl.MegatronOptimizerModule(
            known(OptimizerConfig, **settings.optimizer_settings(cfg)),
            lr_scheduler=CosineAnnealingScheduler(
                max_steps=cfg.trainer.max_steps, warmup_steps=o.warmup_steps, constant_steps=0, min_lr=o.min_lr
            ),
        ),
    )


class _LightningHooks(pl.Callback):
    """Call the hooks; it stands behind NeMo's `timing`, whose step time they are given."""

    def __init__(self, hooks: list[Hooks], timing: TimingCallback) -> None:
        self.hooks, self.timing = hooks, timing

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        call(self.hooks, "train_start", trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        call(self.hooks, "step_start", trainer.global_step)

    def on_before_optimizer_step(self, *_: Any) -> None:
        call(self.hooks, "optimizer_start")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step - 1  # Lightning has counted this one already
        seconds, lr = float(self.timing.timer["train_step_timing"]), trainer.optimizers[0].param_groups[0]["lr"]
        metrics = trainer.callback_metrics
        call(self.hooks, "step_end", Step(step, seconds, metrics["reduced_train_loss"], metrics.get("grad_norm"), lr))

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        call(self.hooks, "validation_start", trainer.global_step - 1)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        call(self.hooks, "validation_end", trainer.callback_metrics.get("val_loss"))

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        call(self.hooks, "checkpoint", trainer.global_step - 1)

    def on_train_end(self, *_: Any) -> None:
        call(self.hooks, "train_end")


def _callbacks(cfg: TrainConfig, run_dir: Path, hooks: list[Hooks]) -> list[Any]:
    timing = TimingCallback(timer_kwargs={"sync_cuda": cfg.gpu.device == "cuda"})  # as in the recipe
    interval = cfg.trainer.gc_interval
    callbacks = [timing, GarbageCollectionCallback(interval, interval), _LightningHooks(hooks, timing)]
    if cfg.cluster.scheduler == "slurm" and cfg.checkpoint.every_n_steps is not None:
        callbacks.append(CheckpointOnSignal(run_dir))
    if cfg.model.tp_comm_overlap and cfg.model.tensor_model_parallel_size > 1:
        from nemo.collections.llm.recipes.tp_overlap_configs import userbuffers
        from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

        # It alone allocates the user buffers; other overlaps it derives from the parallel sizes, unless given them.
        callbacks.append(known(MegatronCommOverlapCallback, **settings.tp_overlap_settings(cfg, userbuffers)))
    return callbacks


def build_model(cfg: TrainConfig, tokenizer: Any) -> llm.LlamaModel:
    """Return NeMo's Llama 3.1 on megatron-core."""
    values = settings.model_settings(cfg)
    if "cuda_graph_scope" in values:  # the whole is recorded: megatron-core 0.15 would record each layer too
        values["cuda_graph_impl"] = "none"
    config = known(Llama31Config if values.pop("rope_scaling") else Llama3Config, **values)
    if "vocab_size" in left_out and tokenizer is not None:  # it then comes from the tokenizer
        own = cfg.model.make_vocab_size_divisible_by * cfg.model.tensor_model_parallel_size
        if -(-tokenizer.vocab_size // own) * own != cfg.padded_vocab_size:
            raise BenchError(f"this NeMo takes the tokenizer's vocabulary: use model.vocab_size={tokenizer.vocab_size}")
    return llm.LlamaModel(config, tokenizer=tokenizer)


def _tokenizer(cfg: TrainConfig) -> Any:
    """Return NeMo's tokenizer: a Hugging Face folder's, or for random tokens one that only has a size."""
    if cfg.data.kind == "mock":
        from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

        return NullTokenizer(cfg.model.vocab_size - 1)  # it adds an end-of-document token
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(pretrained_model_name=str(cfg.data.tokenizer), use_fast=True)


def _data(cfg: TrainConfig, tokenizer: Any) -> Any:
    """Return `PreTrainingDataModule` on the .bin/.idx pairs of `cfg.data`, or `MockDataModule`."""
    m, data = cfg.model, cfg.data
    shared: dict[str, Any] = {
        "seq_length": m.seq_length,
        "micro_batch_size": m.micro_batch_size,
        "global_batch_size": m.global_batch_size,
        "tokenizer": tokenizer,
        "num_workers": data.num_workers,
        "pin_memory": cfg.gpu.device == "cuda",
        "persistent_workers": False,
    }
    if data.kind == "mock":
        # NeMo 2.7.3 passes the wish for an attention mask, which Megatron's own layers need, on in the seed's place.
        mock._MockGPTDataset = partial(mock._MockGPTDataset, create_attention_mask=cfg.gpu.device == "cpu")
        return llm.MockDataModule(
            num_train_samples=cfg.trainer.max_steps * m.global_batch_size,
            num_val_samples=cfg.trainer.limit_val_batches * m.global_batch_size,
            num_test_samples=0,
            **shared,
        )
    paths = list(data.paths)
    if data.weights:
        paths = [item for weight, path in zip(data.weights, data.paths) for item in (str(weight), path)]
    return llm.PreTrainingDataModule(
        paths=paths,
        split=data.split,
        seed=cfg.trainer.seed,
        index_mapping_dir=settings.sample_order_folder(cfg),
        **shared,
    )


class _Strategy(nl.MegatronStrategy):
    """End without copying weights and optimizer state to the host: 36 s for four layers of the 70B on one GPU."""

    def teardown(self) -> None:
        self.checkpoint_io.teardown()


def build_strategy(cfg: TrainConfig) -> nl.MegatronStrategy:
    """Return the parallel layout and Megatron's data-parallel wrapper."""
    values = settings.model_settings(cfg)
    # Megatron-FSDP has a format of checkpoints of its own; none is written.
    fsdp = {"fsdp": "megatron", "save_ckpt_format": "fsdp_dtensor"} if cfg.model.optim.use_megatron_fsdp else {}
    strategy: nl.MegatronStrategy = known(
        _Strategy,
        **{name: values[name] for name in _LAYOUT},
        ddp=known(DistributedDataParallelConfig, **settings.ddp_settings(cfg)),
        ckpt_async_save=False,
        # A checkpoint that another layout can continue. With Megatron's other format its own loading of the
        # precision-aware optimizer fails ('bool' object has no attribute 'dtype', megatron-core 0.15.3).
        ckpt_optim_fully_reshardable=True,
        process_group_backend="nccl" if cfg.gpu.device == "cuda" else "gloo",
        **fsdp,
    )
    return strategy


def build_precision(cfg: TrainConfig) -> nl.MegatronMixedPrecision:
    """Return the number formats of parameters, activations, gradients and fp8 matrix products."""
    formats, trainer_precision = settings.precision_settings(cfg), cfg.precision.trainer_precision
    precision: nl.MegatronMixedPrecision = known(nl.MegatronMixedPrecision, precision=trainer_precision, **formats)
    return precision


def _trainer(cfg: TrainConfig, callbacks: list[Any], strategy: nl.MegatronStrategy) -> nl.Trainer:
    t = cfg.trainer
    return nl.Trainer(
        accelerator="gpu" if cfg.gpu.device == "cuda" else "cpu",
        devices=t.devices,
        num_nodes=t.num_nodes,
        max_steps=t.max_steps,
        max_epochs=1,
        val_check_interval=t.max_steps,  # one validation, after the last step
        limit_val_batches=t.limit_val_batches,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=cfg.checkpoint.every_n_steps is not None,
        use_distributed_sampler=False,
        # Named outright: nemo_bench starts the ranks. Lightning's requeue would call scontrol, which no container has.
        plugins=[
            build_precision(cfg),
            SLURMEnvironment(auto_requeue=False) if cfg.cluster.scheduler == "slurm" else LightningEnvironment(),
        ],
        strategy=strategy,
        callbacks=callbacks,
    )
