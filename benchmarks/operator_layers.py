"""Layers and heads at a shard's shape on one GPU, for operators.py: Megatron's own model, recorded as CUDA graphs.

A shard of tensor parallelism is a model with its widths divided. Context parallelism runs Transformer Engine's own code
with a group that claims more ranks; its exchange is a local copy.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.operator_traces import Case, kernels_of, traced
from nemo_bench.report.kernel_classes import GEMM, kernel_class

WARM_S, COUNTED_S = 1.2, 1.2


class OneGpuGroup:
    """A process group of this GPU that Transformer Engine's context parallelism takes for a larger one."""

    def __init__(self) -> None:
        import torch
        from transformer_engine.pytorch.attention.dot_product_attention import (
            backends,
            context_parallel,
            dot_product_attention,
        )

        self.size, self.group, self.stream = 1, torch.distributed.new_group([0]), torch.cuda.Stream()
        for module in (context_parallel, dot_product_attention, backends):
            module.get_distributed_world_size = self._or(module.get_distributed_world_size, lambda: self.size)
        context_parallel.get_distributed_rank = self._or(context_parallel.get_distributed_rank, lambda: self.size - 1)
        context_parallel.flash_attn_p2p_communicate = self._exchange

    def _or(self, original: Callable[..., Any], own: Callable[[], int]) -> Callable[..., Any]:
        return lambda group=None: own() if group is self.group else original(group)

    @staticmethod
    def _exchange(rank: int, send: Any, to: int, receive: Any, source: int, group: Any, batched: bool) -> list[Any]:
        import torch

        receive.copy_(send)
        event = torch.cuda.Event()
        event.record()

        class Request:
            def wait(self) -> None:
                torch.cuda.current_stream().wait_event(event)

        return [Request()]


def prepare() -> OneGpuGroup:
    """Set up torch, Megatron and Transformer Engine for one GPU."""
    import torch
    import torch._dynamo

    from nemo_bench.training import patches

    # A run has one shape. A kernel that is compiled for symbolic shapes takes several times as long.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    patches.te_weight_gradient_accumulation()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    parallel_state.initialize_model_parallel()
    random.model_parallel_cuda_manual_seed(1234)
    # Dropout is 0; a graph cannot record the switch of random states around it.
    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    group = OneGpuGroup()
    gc.freeze()  # what was imported: collecting it again and again takes a second a case
    return group


def build(case: Case, group: OneGpuGroup) -> Any:
    """Return Megatron's model of this shape, wrapped as in training."""
    import torch.nn.functional
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    tp, fp8 = case.tensor_parallel, case.precision != "bf16"
    config = TransformerConfig(
        num_layers=case.layers,
        hidden_size=case.hidden_size,
        ffn_hidden_size=case.ffn_hidden_size // tp,
        num_attention_heads=case.num_attention_heads // tp,
        num_query_groups=case.num_query_groups // tp,
        kv_channels=case.hidden_size // case.num_attention_heads,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        layernorm_epsilon=1e-5,
        apply_rope_fusion=True,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=True,
        persist_layer_norm=True,
        gradient_accumulation_fusion=True,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te",
        attention_backend=AttnBackend.fused,
        fp8="hybrid" if fp8 else None,
        fp8_recipe="tensorwise" if case.precision == "fp8_tensorwise" else "delayed",
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        fp8_param=fp8,
        tp_only_amax_red=True,  # lockstep.py runs layers alone, on several GPUs
    )
    model = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=case.vocabulary,
        max_sequence_length=case.tokens,
        position_embedding_type="rope",
        rotary_base=500000,
        share_embeddings_and_output_weights=False,
        parallel_output=True,
    ).cuda()
    group.size = case.context_parallel
    if case.context_parallel > 1:
        for layer in model.decoder.layers:
            ranks = [0] * case.context_parallel
            layer.self_attention.core_attention.set_context_parallel_group(group.group, ranks, group.stream, "p2p")
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return DistributedDataParallel(config, settings, Float16Module(config, model))


class Recorded:
    """A model's layers as two CUDA graphs, forward and backward, so that the host plays no part."""

    def __init__(self, case: Case, group: OneGpuGroup) -> None:
        import torch

        self.case, self.model = case, build(case, group)
        self.gpt = self.model.module.module
        tokens, positions = self._batch()
        kept: dict[str, Any] = {}

        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            out.register_hook(lambda gradient: kept.__setitem__("gradient", gradient.detach().clone()))
            kept["hidden"] = kwargs.get("hidden_states", args[0] if args else None).detach().clone()
            kept["rope"] = kwargs.get("rotary_pos_emb")

        handle = self.gpt.decoder.register_forward_hook(hook, with_kwargs=True)
        for number in range(4):
            if number == 0:
                self.gpt.set_is_first_microbatch()
            with self.model.no_sync():
                self.model(tokens, positions, None, labels=tokens).float().mean().backward()
        handle.remove()
        self.hidden, self.gradient = kept["hidden"].requires_grad_(True), kept["gradient"]

        def forward() -> Any:
            rope = kept["rope"]
            return self.gpt.decoder(hidden_states=self.hidden, attention_mask=None, rotary_pos_emb=rope)

        self.accumulating = contextlib.ExitStack()
        self.accumulating.enter_context(self.model.no_sync())
        for _ in range(3):
            forward().backward(self.gradient)
            self.hidden.grad = None
        for parameter in self.model.parameters():
            parameter.grad = None
        torch.cuda.synchronize()
        gc.collect()
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool, stream=stream):
            self.out = forward()
        with torch.cuda.graph(self.backward, pool=pool, stream=stream):
            torch.autograd.backward(self.out, self.gradient)
        torch.cuda.synchronize()

    def _batch(self) -> tuple[Any, Any]:
        import torch

        tokens = torch.randint(0, self.case.vocabulary, (1, self.case.tokens), device="cuda")
        return tokens, torch.arange(self.case.tokens, device="cuda").unsqueeze(0)

    def replay(self) -> list[Any]:
        """Run both graphs once; return events before, between and after."""
        import torch

        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        self.forward.replay()
        events[1].record()
        self.backward.replay()
        events[2].record()
        return events

    def replays(self, warm_s: float, counted_s: float, idle: float = 0.0, hold: Any = None) -> list[list[float]]:
        """Replay in a sustained state; return forward, backward and period of each replay (ms a layer).

        `idle`: share of the time that the GPU waits. `hold`: called with a time in ms, occupies SMs meanwhile.
        """
        import torch

        self.replay()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            self.replay()
        torch.cuda.synchronize()
        one_s = (time.perf_counter() - start) / 4
        cycles, block = int(idle / (1 - idle) * one_s * 1.9e9), max(2, int(0.15 / one_s))
        rows: list[list[Any]] = []
        start, warm = time.perf_counter(), True
        while (now := time.perf_counter() - start) < warm_s + counted_s:
            if warm and now > warm_s:
                rows, warm = [], False
            if hold is not None:
                hold(block * one_s * 1e3 * 1.12)
            for _ in range(block):
                rows.append(self.replay())
                if cycles:
                    torch.cuda._sleep(cycles)
            if len(rows) > block:
                rows[-block - 1][2].synchronize()  # the queue stays short, and never runs empty
        torch.cuda.synchronize()
        layers = self.case.layers
        return [
            [a[0].elapsed_time(a[1]) / layers, a[1].elapsed_time(a[2]) / layers, a[0].elapsed_time(b[0]) / layers]
            for a, b in zip(rows, rows[1:])  # noqa: RUF007  Python 3.10's events cannot be copied
        ]

    def profile(self) -> dict[str, Any]:
        """Return a trace of a few replays."""
        from torch.profiler import ProfilerActivity

        return traced([ProfilerActivity.CUDA], lambda: [self.replay() for _ in range(8)])

    def head(self) -> dict[str, Any]:
        """Return the times of embedding, and final norm, output layer and loss (ms), which a table of heads holds."""
        import torch

        tokens, positions = self._batch()
        hidden = self.out.detach().requires_grad_(True)

        def run() -> list[Any]:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(5)]
            events[0].record()
            embedded = self.gpt.embedding(tokens, positions)
            events[1].record()
            logits, _ = self.gpt.output_layer(self.gpt.decoder.final_layernorm(hidden))
            loss = self.gpt.compute_language_model_loss(tokens, logits).float().mean()
            events[2].record()
            loss.backward()
            events[3].record()
            embedded.backward(self.gradient)
            events[4].record()
            hidden.grad = None
            return events

        names = ("embedding_forward_ms", "forward_ms", "backward_ms", "embedding_backward_ms")
        rows, start = [], time.perf_counter()
        while time.perf_counter() - start < 1.5:
            rows += [run() for _ in range(4)]
            rows[-1][4].synchronize()
        rows = rows[len(rows) // 2 :]
        times = {
            name: statistics.median(row[at].elapsed_time(row[at + 1]) for row in rows) for at, name in enumerate(names)
        }
        from torch.profiler import ProfilerActivity

        events = kernels_of(traced([ProfilerActivity.CUDA], lambda: [run() for _ in range(3)]))
        # The product that adds to the gradient so far.
        added = [
            event["dur"] / 1e3 for event in events if kernel_class(event["name"]) == GEMM and "badd" in event["name"]
        ]
        sizes = {"hidden_size": self.case.hidden_size, "tokens": self.case.tokens, "vocabulary": self.case.vocabulary}
        return {**sizes, **times, "weight_gradient_ms": statistics.median(added)}

    def close(self) -> None:
        """Free the GPU's memory."""
        import torch

        self.accumulating.close()
        self.__dict__.clear()
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def recorded(case: Case, group: OneGpuGroup) -> Iterator[Recorded]:
    """Record a case's layers on a stream of their own, and free them behind."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers = Recorded(case, group)
        try:
            yield layers
        finally:
            layers.close()


def host_ms(case: Case, group: OneGpuGroup) -> float:
    """Return what the host needs to launch a layer forward and backward (ms): two depths of a tiny sequence."""
    import torch

    medians, (more, fewer) = [], (6, 2)
    model = build(replace(case, layers=more), group)
    decoder = model.module.module.decoder
    tokens = torch.randint(0, case.vocabulary, (1, case.tokens), device="cuda")
    positions = torch.arange(case.tokens, device="cuda").unsqueeze(0)
    for layers in (more, fewer):
        decoder.layers, times = decoder.layers[:layers], []
        for _ in range(8):
            start = time.perf_counter()
            with model.no_sync():
                for _ in range(5):
                    model(tokens, positions, None, labels=tokens).float().mean().backward()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / 5 * 1e3)
        medians.append(statistics.median(times[2:]))
    del model, decoder
    gc.collect()
    torch.cuda.empty_cache()
    return (medians[0] - medians[1]) / (more - fewer)
