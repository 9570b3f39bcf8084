"""The Llama 3.1 of a configuration, as NeMo's `LlamaModel` on megatron-core."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import AttnBackend
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import Llama31Config

from nemo_bench.config import TrainConfig


def build_model(cfg: TrainConfig, tokenizer: Any) -> llm.LlamaModel:
    """Return NeMo's Llama 3.1 with the architecture, fusions and pipeline communication that `cfg` asks for.

    The parallel sizes are not set here: `MegatronStrategy` copies them into this configuration.
    """
    m = cfg.model
    device_settings: dict[str, Any] = {}
    if cfg.gpu.device == "cpu":
        from nemo_bench.training.layers import local_block_spec

        device_settings = {
            "transformer_layer_spec": local_block_spec,
            "use_cpu_initialization": True,
            # An output that is being sent must keep its memory until it has arrived. NCCL reads it in the order of
            # the stream; gloo reads it at some later moment, and by then Megatron has given the memory away:
            # interleaved stages then train on what happens to lie there.
            "deallocate_pipeline_outputs": False,
        }
    config = Llama31Config(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        seq_length=m.seq_length,
        # Fixed, so that the weights do not depend on which tokenizer happens to be loaded.
        vocab_size=cfg.padded_vocab_size,
        make_vocab_size_divisible_by=m.make_vocab_size_divisible_by,
        rotary_base=m.rotary_base,
        init_method_std=m.init_method_std,
        layernorm_epsilon=m.layernorm_epsilon,
        attention_backend=AttnBackend[m.attention_backend],
        apply_rope_fusion=m.apply_rope_fusion,
        bias_activation_fusion=m.bias_activation_fusion,
        bias_dropout_fusion=m.bias_dropout_fusion,
        masked_softmax_fusion=m.masked_softmax_fusion,
        cross_entropy_loss_fusion=m.cross_entropy_loss_fusion,
        cross_entropy_fusion_impl=m.cross_entropy_fusion_impl,
        persist_layer_norm=m.persist_layer_norm,
        fused_single_qkv_rope=m.fused_single_qkv_rope,
        use_transformer_engine_op_fuser=m.use_transformer_engine_op_fuser,
        gradient_accumulation_fusion=m.gradient_accumulation_fusion,
        recompute_granularity=m.recompute_granularity,
        recompute_modules=list(m.recompute_modules) if m.recompute_granularity == "selective" else None,
        recompute_method=m.recompute_method,
        recompute_num_layers=m.recompute_num_layers,
        cuda_graph_impl=m.cuda_graph_impl,
        use_te_rng_tracker=m.cuda_graph_impl != "none",  # a graph cannot record the other one's CPU side
        **device_settings,
    )
    for name, value in pipeline_communication(cfg).items():
        # Not given above: Megatron checks them against the pipeline's size, which MegatronStrategy copies in later.
        setattr(config, name, value)
        # The second and later interleaved stages of a rank are built anew, from what NeMo noted of the first.
        setattr(config.__io__, name, value)
    return llm.LlamaModel(config, tokenizer=tokenizer)


def pipeline_communication(cfg: TrainConfig) -> dict[str, Any]:
    """Return how pipeline stages pass activations on, and what they do in the bubble: Megatron's names and values."""
    m = cfg.model
    stages = m.pipeline_model_parallel_size > 1
    interleaved = (m.virtual_pipeline_model_parallel_size or 1) > 1
    return {
        # The pair that NeMo's MegatronCommOverlapCallback derives from VP. With the other pair, interleaved stages
        # give wrong losses in silence on CPU (gloo); so they are no settings of ours.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": stages and not interleaved,
        "defer_embedding_wgrad_compute": cfg.defers_embedding_wgrad,
        "wgrad_deferral_limit": m.wgrad_deferral_limit,
    }
