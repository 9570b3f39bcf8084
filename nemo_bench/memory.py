"""An estimate of the GPU memory that a configuration needs: arithmetic, each rule with its source.

A step needs most in the backward pass of the first micro-batch, with all activations alive, or in the optimizer's
step, which makes copies. Bytes a parameter: megatron-core 0.15's `param_and_grad_buffer.py` and `distrib_optimizer.py`,
Transformer Engine 2's `cast_master_weights_to_fp8`. Activations: Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models", derived again for SwiGLU, grouped queries, RMSNorm, no dropout, and an
attention kernel that keeps no scores; micro-batches in flight of later stages: megatron-core's `schedules.py`.
Not included: what CUDA, cuDNN and NCCL take outside of PyTorch, workspaces, fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_bench.config import TrainConfig
from nemo_bench.pipeline import layers_of_chunks

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU of the pipeline stage that needs most."""

    stage: int  # from 0
    parameters_bytes: float  # weights as the matrix products read them, with what fp8 keeps in addition
    gradients_bytes: float  # Megatron's gradient buffer
    optimizer_bytes: float  # main weights and Adam's two moments, this GPU's share
    activations_bytes: float  # what the backward pass still needs, at its largest
    logits_bytes: float  # the output layer's, of one micro-batch and of those whose weight gradients are deferred
    optimizer_step_bytes: float  # copies that only the optimizer's step holds

    @property
    def total_bytes(self) -> float:
        """The need at the larger of the two moments."""
        kept = self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes
        return kept + max(self.activations_bytes + self.logits_bytes, self.optimizer_step_bytes)


def estimate_memory(cfg: TrainConfig) -> MemoryEstimate:
    """Return the memory that one GPU needs to train `cfg`, whose layout has passed the checks."""
    stages = [_stage(cfg, stage, sum(chunks)) for stage, chunks in enumerate(layers_of_chunks(cfg.model))]
    return max(stages, key=lambda estimate: estimate.total_bytes)


def _stage(cfg: TrainConfig, stage: int, layers: int) -> MemoryEstimate:
    m = cfg.model
    tp, pp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    h, key_values = m.hidden_size, m.num_query_groups / m.num_attention_heads
    last = stage == pp - 1
    matrices = layers * (h * h * (2 + 2 * key_values) + 3 * h * m.ffn_hidden_size) / tp
    embedding = cfg.padded_vocab_size * h / tp
    others = layers * 2 * h + (embedding if stage == 0 else 0) + (embedding + h if last else 0)
    sizes = zip(_weight_bytes(cfg, matrix=True), _weight_bytes(cfg, matrix=False))
    parameters, gradients, optimizer, step = (matrices * of_matrix + others * of_other for of_matrix, of_other in sizes)
    if m.optim.use_megatron_fsdp:
        # Whole at a time: two layers, the one at work and the one gathered ahead, and what belongs to no layer.
        share, gathered = 1 / cfg.weight_copies, min(2 / layers, 1)
        whole = (others + gathered * matrices) / (others + matrices)
        if "params" in m.optim.data_parallel_sharding_strategy:
            parameters *= min(share + whole, 1)
        if "grads" in m.optim.data_parallel_sharding_strategy:
            gradients *= min(share + whole, 1)
    activations, logits = _activations(cfg, stage, layers), _logits(cfg) if last else 0.0
    return MemoryEstimate(stage, parameters, gradients, optimizer, activations, logits, step)


def _weight_bytes(cfg: TrainConfig, *, matrix: bool) -> tuple[float, float, float, float]:
    """Return the bytes per parameter: weight, gradient, optimizer state, and what the optimizer's step adds.

    `matrix`: of a layer's matrix product, which fp8 is for; embeddings and norms stay in bf16.
    """
    o, p = cfg.model.optim, cfg.precision
    share = 1 / cfg.weight_copies if o.use_distributed_optimizer else 1.0
    if p.trainer_precision != "bf16-mixed":
        return 4, 4, 8 * share, 0
    gradient = 4 if o.grad_reduce_in_fp32 else 2
    in_fp8 = matrix and p.fp8 is not None
    # In fp8 a weight is kept twice, as it is and transposed, next to its bf16 form unless the parameter itself is fp8.
    in_fp4 = matrix and p.fp4 is not None  # 4 bits and a scaling factor for each block, twice as well
    weight = (2 if not in_fp8 or not p.fp8_param_gather else 0) + (2 if in_fp8 else 1.125 if in_fp4 else 0)
    main, step = 4, 0 if o.grad_reduce_in_fp32 else 4  # the step reads gradients in fp32
    moments = sum(4 if dtype == "fp32" else 2 for dtype in (o.exp_avg_dtype, o.exp_avg_sq_dtype))
    if cfg.precision_aware_optimizer and (p.fp8 is None or p.fp8_recipe == "delayed"):
        # Gradients are read as they are, and of a main weight only what its bf16 weight lacks may be kept. With other
        # fp8 recipes megatron-core takes its usual way.
        main, step = (2 if o.store_param_remainders else 4), 0
    elif in_fp8 and p.fp8_param_gather:
        step += 2  # all main weights in bf16 at once, on their way to fp8
    return weight, gradient, (main + moments) * share, step * share


def _activations(cfg: TrainConfig, stage: int, layers: int) -> float:
    m = cfg.model
    tp, pp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    vp = m.virtual_pipeline_model_parallel_size or 1
    h, f, kv = m.hidden_size, m.ffn_hidden_size, m.num_query_groups / m.num_attention_heads
    tokens = m.seq_length / m.context_parallel_size * m.micro_batch_size
    size = 2 if cfg.precision.trainer_precision == "bf16-mixed" else 4
    # A matrix product keeps its input in its own format.
    product = 1 if cfg.precision.fp8 or cfg.precision.fp4 else size
    # Both norms' inputs and the products' inputs behind them: whole on every GPU without sequence parallelism.
    outside = tokens * 2 * h * (size + product) / (tp if m.sequence_parallel else 1)
    attention = (1 + 2 * kv) * size + size + (product if cfg.precision.fp8 else 0)  # q, k, v; its output, and in fp8
    inside = tokens * (h * attention + 2 * f * size + f * product) / tp
    layer = outside + inside
    # Chunks of layers (one a virtual stage) whose forward pass is done and whose backward pass is not.
    in_flight = (pp - stage - 1) * 2 + (vp - 1) * pp + 1 if vp > 1 else pp - stage
    kept = min(in_flight, cfg.num_micro_batches * vp) * layers / vp - m.cpu_offloading_num_layers
    working = tokens * 3 * f * size / tp  # gradients of the MLP's inner activations, of the layer at work
    if m.recompute_granularity == "full":
        entry = tokens * h * size / (tp if m.sequence_parallel else 1)
        number = m.recompute_num_layers or 1
        if m.recompute_method == "block":
            share = min(number / (layers / vp), 1)
            return kept * (share * entry + (1 - share) * layer) + layer + working
        return kept / number * entry + number * layer + working
    if m.recompute_granularity == "selective" and "mlp" in m.recompute_modules:
        mlp = tokens * f * (2 * size + product) / tp
        return kept * (layer - mlp) + mlp + working
    return kept * layer + working


def _logits(cfg: TrainConfig) -> float:
    m = cfg.model
    # Megatron's cross entropy works on an fp32 copy; Transformer Engine's in place.
    in_place = m.cross_entropy_loss_fusion and m.cross_entropy_fusion_impl == "te"
    logit = (2 if in_place else 6) if cfg.precision.trainer_precision == "bf16-mixed" else (4 if in_place else 8)
    tokens = m.seq_length / m.context_parallel_size * m.micro_batch_size
    vocabulary = cfg.padded_vocab_size / m.tensor_model_parallel_size
    if not cfg.defers_embedding_wgrad:
        return tokens * vocabulary * logit
    # Until the weight gradients are computed, the logits' gradients and the output layer's inputs stay.
    inputs = m.hidden_size / (m.tensor_model_parallel_size if m.sequence_parallel else 1)
    kept = min(m.wgrad_deferral_limit or cfg.num_micro_batches, cfg.num_micro_batches)
    return tokens * (vocabulary * logit + kept * 2 * (vocabulary + inputs))
