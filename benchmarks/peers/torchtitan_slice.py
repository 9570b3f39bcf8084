"""Four layers of Llama 3.1 70B trained by torchtitan on one GPU.

    python benchmarks/peers/torchtitan_slice.py --precision bf16 --output torchtitan-bf16.json

torchtitan's own Trainer builds the model and takes the steps: its Llama 3, its compilation block by block and of the
loss, its float8 converter, its gradient accumulation, clipping and fused AdamW. Only the tokens (random) and the record
of the losses are ours. On one GPU its fully_shard does not come in: torchtitan keeps the weights in fp32 and casts them
under autocast, so the weights that the optimizer updates are fp32.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

import peer_common as common

NAME = "llama3_slice"


class RandomTokens:
    """The dataloader: torchtitan asks for micro-batches of inputs and the targets beside them."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Any]]:
        for tokens in self.batches:
            yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is resumed."""


class NoMemoryMonitor:
    """torchtitan's monitor asks for a GPU; the peak is read by the timed loop in any case."""

    def __init__(self, device_name: str) -> None:
        self.device_name = device_name

    def get_peak_stats(self) -> Any:
        from torchtitan.components.metrics import DeviceMemStats

        return DeviceMemStats(0.0, 0.0, 0.0, 0.0, 0, 0)


class LossRecorder:
    """Takes the place of torchtitan's MetricsProcessor, whose losses end in a log: the losses stay here."""

    def __init__(self, device_name: str) -> None:
        from torchtitan.tools.utils import NoColor

        self.color = NoColor()
        self.device_memory_monitor = NoMemoryMonitor(device_name)
        self.num_flops_per_token = -1
        self.ntokens_since_last_log = 0
        self.data_loading_times: list[float] = []
        self.optimizers: Any = None
        self.model_parts: Any = None
        self.losses: list[float] = []

    def should_log(self, step: int) -> bool:
        return True

    def log(self, step: int, global_avg_loss: float, *others: Any, **more: Any) -> None:
        self.losses.append(global_avg_loss)

    def close(self) -> None:
        """Nothing is open."""


def job_config(run: common.Slice, filter_fqns: list[str]) -> Any:
    """torchtitan's configuration of the run; what is not named here has torchtitan's default."""
    from torchtitan.config import JobConfig

    config = JobConfig()
    config.model.name, config.model.flavor = NAME, "slice"
    config.training.seq_len = run.seq_length
    config.training.local_batch_size = 1
    config.training.global_batch_size = run.global_batch_size
    config.training.max_norm = common.CLIP_GRAD
    config.training.steps = run.steps
    config.optimizer.lr = common.LEARNING_RATE
    config.optimizer.beta1, config.optimizer.beta2 = common.BETAS
    config.optimizer.eps = common.EPSILON
    config.optimizer.weight_decay = common.WEIGHT_DECAY
    config.lr_scheduler.warmup_steps = common.LR_WARMUP_STEPS
    config.lr_scheduler.total_steps = 10 * common.LR_WARMUP_STEPS
    config.activation_checkpoint.mode = "none"
    config.compile.enable = run.compile
    config.debug.seed = run.seed
    if run.precision == "fp8":
        config.model.converters = ["quantize.linear.float8"]
        config.quantize.linear.float8.filter_fqns = filter_fqns
        config.quantize.linear.float8.emulate = run.device == "cpu"
    return config


def register(run: common.Slice, recorder: LossRecorder) -> None:
    """Gives torchtitan the slice as a model of its Llama 3 family, with random tokens for its data."""
    import dataclasses

    from torchtitan.models.llama3 import get_train_spec
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.protocols.train_spec import register_train_spec

    # torchtitan rounds 8/3 of the hidden size, times a factor, up to a multiple; as the multiple it takes the width
    # wanted, with a factor where 8/3 of the hidden size is more than that.
    two_thirds = int(2 * 4 * run.hidden_size / 3)
    arguments = TransformerModelArgs(
        dim=run.hidden_size,
        n_layers=run.layers,
        n_heads=run.attention_heads,
        n_kv_heads=run.query_groups,
        vocab_size=run.vocab_size,
        rope_theta=run.rope_base,
        multiple_of=run.ffn_hidden_size,
        ffn_dim_multiplier=run.ffn_hidden_size / two_thirds if two_thirds > run.ffn_hidden_size else None,
    )
    spec = dataclasses.replace(
        get_train_spec(),
        model_args={"slice": arguments},
        build_tokenizer_fn=None,
        build_dataloader_fn=lambda **_: RandomTokens(common.random_batches(run)),
        build_metrics_processor_fn=lambda *_: recorder,
        state_dict_adapter=None,
    )
    register_train_spec(NAME, spec)


def build(run: common.Slice, filter_fqns: list[str]) -> tuple[Any, LossRecorder]:
    """torchtitan's Trainer, ready to step, and where its losses go."""
    import torch
    import torch.distributed

    if run.device == "cpu":
        # torchtitan takes "cuda" where it finds no accelerator; its other modules copy the name from here.
        import torch._utils

        torch._utils._get_available_device_type = lambda: "cpu"
    from torchtitan.train import Trainer

    backend = "nccl" if run.device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = "0"
    recorder = LossRecorder(torch.cuda.get_device_name(0) if run.device == "cuda" else "cpu")
    register(run, recorder)
    trainer = Trainer(job_config(run, filter_fqns))
    ffn_hidden_size = trainer.model_parts[0].layers["0"].feed_forward.w1.out_features
    if ffn_hidden_size != run.ffn_hidden_size:
        common.stop(f"torchtitan made the MLP {ffn_hidden_size} wide, not {run.ffn_hidden_size}", 1)
    return trainer, recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser)
    parser.add_argument(
        "--float8-filter",
        default="output",
        help="comma list of module names that stay in bf16, as torchtitan's filter_fqns (its own 70B has: output)",
    )
    arguments = parser.parse_args()
    run = common.slice_of(parser, arguments)
    common.prepare(run)
    filter_fqns = [name for name in arguments.float8_filter.split(",") if name]

    start = time.perf_counter()
    trainer, recorder = build(run, filter_fqns)
    build_s = time.perf_counter() - start

    model = trainer.model_parts[0]
    names_and_modules = list(model.named_modules())
    settings = {
        "mixed_precision": "fp32 weights, bf16 autocast" if not trainer.parallel_dims.fsdp_enabled else "fully_shard",
        "weights_dtype": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "float8_linears": sum(type(module).__name__ == "Float8Linear" for _, module in names_and_modules),
        "float8_recipe": "tensorwise, dynamic" if run.precision == "fp8" else None,
        "float8_filter": filter_fqns if run.precision == "fp8" else None,
        "attention": "scaled_dot_product_attention, cuDNN first",
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "compile": "each block, the loss" if run.compile else None,
    }
    batches = trainer.batch_generator(trainer.dataloader)

    def step(index: int) -> float:
        trainer.step = index + 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches)
        return recorder.losses[index]

    measured = common.run_steps(run, step)
    packages = ("torchtitan", "torchao", "triton")
    result = {**common.result_of("torchtitan", run, settings, packages), "build_s": build_s, **measured}
    common.write_result(arguments.output, result)
    trainer.close()

    import torch.distributed

    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
