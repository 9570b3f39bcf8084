"""The Llama 3.1 of a configuration, as NeMo's `LlamaModel` on megatron-core."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import AttnBackend
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import Llama31Config

from nemo_bench.config import TrainConfig, padded_vocab_size


def build_model(cfg: TrainConfig, tokenizer: Any) -> llm.LlamaModel:
    """NeMo's Llama 3.1 with the architecture, fusions and pipeline communication that `cfg` asks for.

    The parallel sizes are not set here: `MegatronStrategy` copies them into this configuration.
    """
    m = cfg.model
    device_settings: dict[str, Any] = {}
    if cfg.gpu.device == "cpu":
        from nemo_bench.training.layers import local_block_spec

        device_settings = {
            "transformer_layer_spec": local_block_spec,
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,  # a CUDA extension
            # An output that is being sent must keep its memory until it has arrived. NCCL reads it in the order of
            # the stream; gloo reads it at some later moment, and by then Megatron has given the memory away:
            # interleaved stages then train on what happens to lie there.
            "deallocate_pipeline_outputs": False,
        }
    interleaved = (m.virtual_pipeline_model_parallel_size or 1) > 1
    config = Llama31Config(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        seq_length=m.seq_length,
        # Fixed, so that the weights do not depend on which tokenizer happens to be loaded.
        vocab_size=padded_vocab_size(cfg),
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
        persist_layer_norm=m.persist_layer_norm,
        # The pair that NeMo's MegatronCommOverlapCallback derives from VP. With the other pair, interleaved stages
        # give wrong losses in silence on CPU (gloo); so they are no settings of ours.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=m.pipeline_model_parallel_size > 1 and not interleaved,
        **device_settings,
    )
    return llm.LlamaModel(config, tokenizer=tokenizer)
