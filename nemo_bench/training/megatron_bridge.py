"""The stack on Megatron-Bridge: its `ConfigContainer` of a configuration, and its `pretrain`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training import comm_overlap
from megatron.bridge.training import config as bridge
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.mixed_precision import MixedPrecisionConfig
from megatron.bridge.training.pretrain import pretrain as bridge_pretrain
from megatron.bridge.training.tokenizers.config import TokenizerConfig

from nemo_bench.config import TrainConfig
from nemo_bench.training import settings
from nemo_bench.training.hooks import Hooks, Step, call
from nemo_bench.training.known import known


def pretrain(cfg: TrainConfig, run_dir: Path, hooks: list[Hooks]) -> None:
    """Train `cfg` to its last step."""
    known(bridge_pretrain, build_container(cfg), forward_step, callbacks=[_BridgeHooks(hooks)])


class _BridgeHooks(Callback):
    """Call the hooks, and measure the time between a step's two events as NeMo's TimingCallback does."""

    def __init__(self, hooks: list[Hooks]) -> None:
        self.hooks, self.began = hooks, 0.0

    def on_train_start(self, context: CallbackContext) -> None:
        optimizer_step = context.optimizer.step

        def step() -> Any:
            call(self.hooks, "optimizer_start")
            return optimizer_step()

        context.optimizer.step = step
        call(self.hooks, "train_start", context.state.train_state.step)

    def on_train_step_start(self, context: CallbackContext) -> None:
        call(self.hooks, "step_start", context.state.train_state.step)
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        loss = (context.loss_dict or {}).get("lm loss")  # on the last pipeline stage alone
        loss = None if loss is None else loss.reshape(-1)[0]
        lr, number = context.optimizer.param_groups[0]["lr"], context.state.train_state.step  # not counted yet
        call(self.hooks, "step_end", Step(number, seconds, loss, context.grad_norm, lr))

    def on_eval_start(self, context: CallbackContext) -> None:
        call(self.hooks, "validation_start", context.state.train_state.step - 1)

    def on_eval_end(self, context: CallbackContext) -> None:
        call(self.hooks, "validation_end", (context.total_loss_dict or {}).get("lm loss"))

    def on_train_end(self, context: CallbackContext) -> None:
        call(self.hooks, "train_end")


def build_container(cfg: TrainConfig) -> Any:
    """Return Bridge's configuration; it draws validation and test batches after the last step where `cfg` has any."""
    m, t, o = cfg.model, cfg.trainer, cfg.model.optim
    mixed_precision = overlap = None
    if settings.working_dtype(cfg) is torch.bfloat16:
        # Bridge's own default reaches the optimizer even where nothing is in fp8: Adam then reads no bf16 gradients.
        formats = settings.precision_settings(cfg) | {"fp8_recipe": cfg.precision.fp8_recipe}
        mixed_precision = known(MixedPrecisionConfig, bf16=True, **formats)
    if m.tp_comm_overlap and m.tensor_model_parallel_size > 1:
        overlap = known(comm_overlap.CommOverlapConfig, **settings.tp_overlap_settings(cfg, comm_overlap))
    return bridge.ConfigContainer(
        model=_model(cfg),
        train=known(
            bridge.TrainingConfig,
            train_iters=t.max_steps,
            global_batch_size=m.global_batch_size,
            micro_batch_size=m.micro_batch_size,
            eval_iters=t.limit_val_batches,
            eval_interval=t.max_steps + 1,
            manual_gc=True,
            manual_gc_interval=t.gc_interval,
        ),
        optimizer=known(bridge.OptimizerConfig, **settings.optimizer_settings(cfg)),
        scheduler=known(
            bridge.SchedulerConfig,
            lr_decay_style="cosine",
            lr_warmup_iters=o.warmup_steps,
            lr_decay_iters=max(t.max_steps, o.warmup_steps + 1),
            # These two are used, not the optimizer's.
            start_weight_decay=o.weight_decay,
            end_weight_decay=o.weight_decay,
        ),
        ddp=known(bridge.DistributedDataParallelConfig, **settings.ddp_settings(cfg)),
        dataset=_dataset(cfg),
        logger=known(bridge.LoggerConfig, log_interval=1),
        tokenizer=_tokenizer(cfg),
        checkpoint=known(bridge.CheckpointConfig, ckpt_format="fsdp_dtensor" if o.use_megatron_fsdp else "torch_dist"),
        # It would synchronise the device at every step.
        rerun_state_machine=known(bridge.RerunStateMachineConfig, check_for_nan_in_loss=False),
        rng=known(bridge.RNGConfig, seed=t.seed, te_rng_tracker=m.cuda_graph_impl != "none"),
        dist=known(
            bridge.DistributedInitConfig,
            distributed_backend="nccl" if cfg.gpu.device == "cuda" else "gloo",
            use_gloo_process_groups=False,
        ),
        comm_overlap=overlap,
        mixed_precision=mixed_precision,
    )


def _model(cfg: TrainConfig) -> Any:
    values = settings.model_settings(cfg)
    if cfg.model.rope_scaling:
        values["rope_scaling_factor"] = 8.0  # Llama 3.1's
    if cfg.gpu.device == "cpu":
        values["transformer_impl"] = "local"
    if cfg.model.optim.use_megatron_fsdp:
        values["init_model_with_meta_device"] = True  # a whole copy of the model fits no GPU
    return known(
        GPTModelProvider,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        position_embedding_type="rope",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        share_embeddings_and_output_weights=False,
        should_pad_vocab=False,  # padded already
        **values,
    )


def _dataset(cfg: TrainConfig) -> Any:
    data, kind = cfg.data, bridge.MockGPTDatasetConfig
    files: dict[str, Any] = {}
    if data.kind != "mock":
        kind = bridge.GPTDatasetConfig
        files = {"blend": (list(data.paths), list(data.weights) or None)}
        files["path_to_cache"] = settings.sample_order_folder(cfg)
    return kind(
        random_seed=cfg.trainer.seed,
        seq_length=cfg.model.seq_length,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        num_dataset_builder_threads=1,
        split=data.split,
        dataloader_type="single",
        skip_getting_attention_mask_from_dataset=True,
        num_workers=data.num_workers,
        pin_memory=cfg.gpu.device == "cuda",
        **files,
    )


def _tokenizer(cfg: TrainConfig) -> Any:
    tokenizer: dict[str, Any] = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": cfg.data.tokenizer}
    if cfg.data.kind == "mock":
        tokenizer = {"tokenizer_type": "NullTokenizer", "vocab_size": cfg.model.vocab_size - 1}
    return known(TokenizerConfig, use_tokenizer_vocab_size=False, **tokenizer)
