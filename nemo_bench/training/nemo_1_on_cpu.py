"""NeMo 1's program on a machine without GPU: `python -m nemo_bench.training.nemo_1_on_cpu PROGRAM ARGUMENTS`.

Answers for what NeMo 2.0.0 and megatron-core 0.9 import whether it is there or not: Apex and Transformer Engine.
"""

from __future__ import annotations

import os
import runpy
import sys

from nemo_bench.training import cpu_device


def main() -> None:
    """Run the program named by the first argument as `__main__`."""
    cpu_device.install()
    # NeMo compares it with versions of NVIDIA's container, and fails where there is none; this is nemo:24.09's.
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "24.07")
    _do_without_apex_and_transformer_engine()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _do_without_apex_and_transformer_engine() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from nemo.collections.nlp.models import nlp_model
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
    from nemo.collections.nlp.modules.common.megatron import build_model, utils
    from nemo.collections.nlp.parts import nlp_overrides

    from nemo_bench.training.layers import RMSNorm, block_of

    # The strategy asks for Apex, and its optimizers use it; a CPU takes megatron-core's, which does without, and which
    # works with torch's Adam too.
    nlp_overrides.HAVE_APEX = distrib_optimizer.HAVE_APEX_OR_TE = True
    # Two functions of Apex, the first a copy of megatron-core's, that are imported together with the rest of it.
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )
    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    # The norms, whose weights do not decay.
    utils.FusedLayerNorm = utils.FastLayerNorm = utils.MixedFusedRMSNorm = RMSNorm
    # Every NeMo model lists the BERT models, whose layers are Transformer Engine's.
    nlp_model.get_megatron_pretrained_bert_models = list
    # The table of layer specifications is built whole before one is chosen.
    megatron_gpt_model.get_specs = lambda name, config, *_: block_of(
        get_gpt_layer_local_spec(), get_num_layers_to_build(config)
    )


if __name__ == "__main__":
    main()
