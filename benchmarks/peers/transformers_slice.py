"""Four layers of Llama 3.1 70B trained with Hugging Face Transformers and torch.compile on one GPU.

    python benchmarks/peers/transformers_slice.py --precision bf16 --output transformers-bf16.json

The model is LlamaForCausalLM with its own loss, compiled whole, with PyTorch's fused AdamW.

--attention causal (default): Transformers builds a dense causal mask whenever it is compiled, which keeps PyTorch from
    its fast causal kernels; here that mask is left out (the attention is still causal) and cuDNN's kernel comes first,
    as in torchtitan.
--attention stock: as Transformers does it.
--masters copies (default): the model is bf16; fp32 weights beside it receive the gradients of every micro-batch in
    fp32, are updated, and are copied back.
--masters autocast: the model is fp32 and autocast to bf16 in every micro-batch, as Transformers' Trainer does it.

fp8 is torchao's dynamic tensorwise scaling, as torchtitan uses it, on all linear layers but the last.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import peer_common as common


def build_model(run: common.Slice) -> Any:
    """The model on its device, weights in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=run.hidden_size,
        intermediate_size=run.ffn_hidden_size,
        num_hidden_layers=run.layers,
        num_attention_heads=run.attention_heads,
        num_key_value_heads=run.query_groups,
        vocab_size=run.vocab_size,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": run.rope_base,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(run.seed)
    with torch.device(run.device):
        model = LlamaForCausalLM(config)
    return model.train()


def to_float8(model: Any, emulate: bool) -> None:
    """Exchanges the linear layers, but for the last, in place."""
    import torch
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def wanted(module: Any, name: str) -> bool:
        return (
            isinstance(module, torch.nn.Linear) and name != "lm_head" and not any(s % 16 for s in module.weight.shape)
        )

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=wanted)


def leave_out_dense_mask() -> None:
    """Without a mask, Transformers' attention passes `is_causal=True` to PyTorch."""
    from transformers.models.llama import modeling_llama

    # Failing is better than measuring the stock path under this name, should the function move.
    if not hasattr(modeling_llama, "create_causal_mask"):
        common.stop("modeling_llama has no create_causal_mask in this Transformers: use --attention stock", 1)
    modeling_llama.create_causal_mask = lambda *_, **__: None


def keep_master_copies(model: Any) -> tuple[list[Any], Callable[[], None]]:
    """Makes the model's weights bf16 and returns fp32 copies that collect its gradients.

    :return: the fp32 weights, for the optimizer, and what copies them back into the model
    """
    import torch

    weights, masters = list(model.parameters()), []
    for weight in weights:
        master = torch.nn.Parameter(weight.detach())
        weight.data = weight.data.bfloat16()

        def collect(weight: Any, master: Any = master) -> None:
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

        weight.register_post_accumulate_grad_hook(collect)
        masters.append(master)

    def copy_back() -> None:
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)

    return masters, copy_back


def build_step(
    run: common.Slice, model: Any, masters: str, attention: str
) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """What trains one global batch and returns its loss, and what is worth recording about it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if masters == "copies":
        trained, copy_back = keep_master_copies(model)
    else:
        trained, copy_back = list(model.parameters()), lambda: None
    optimizer = torch.optim.AdamW(
        trained,
        lr=common.LEARNING_RATE,
        betas=common.BETAS,
        eps=common.EPSILON,
        weight_decay=common.WEIGHT_DECAY,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / common.LR_WARMUP_STEPS))
    tokens_per_step = run.global_batch_size * run.seq_length

    def loss_of(inputs: Any, targets: Any) -> Any:
        # Only the loss leaves the compiled part: the logits need not outlive it.
        return model(
            input_ids=inputs, labels=targets, shift_labels=targets, num_items_in_batch=tokens_per_step, use_cache=False
        ).loss

    compiled = torch.compile(loss_of) if run.compile else loss_of
    batches = common.random_batches(run)

    def kernels() -> Any:
        if attention == "stock":
            return contextlib.nullcontext()
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel(backends, set_priority=True)

    def step(index: int) -> Any:
        losses = []
        first = index * run.global_batch_size
        for tokens in batches[first : first + run.global_batch_size]:
            on_device = tokens.to(run.device)
            inputs, targets = on_device[:, :-1].contiguous(), on_device[:, 1:].contiguous()
            with kernels(), torch.autocast(run.device, torch.bfloat16, enabled=masters == "autocast"):
                loss = compiled(inputs, targets)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, common.CLIP_GRAD, foreach=True)
        optimizer.step()
        schedule.step()
        copy_back()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    settings = {
        "masters": masters,
        "attention": attention,
        "weights_dtype": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "optimizer_dtype": sorted({str(parameter.dtype) for parameter in trained}),
        "parameters": sum(parameter.numel() for parameter in trained),
        "float8_linears": sum(type(module).__name__ == "Float8Linear" for module in model.modules()),
        "float8_recipe": "tensorwise, dynamic" if run.precision == "fp8" else None,
        "gradient_accumulation_steps": run.global_batch_size,
        "compile": "whole model and loss" if run.compile else None,
    }
    return step, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser)
    parser.add_argument("--attention", choices=("causal", "stock"), default="causal")
    parser.add_argument("--masters", choices=("copies", "autocast"), default="copies")
    arguments = parser.parse_args()
    run = common.slice_of(parser, arguments)
    common.prepare(run)

    start = time.perf_counter()
    if arguments.attention == "causal":
        leave_out_dense_mask()
    model = build_model(run)
    if run.precision == "fp8":
        to_float8(model, emulate=run.device == "cpu")
    step, settings = build_step(run, model, arguments.masters, arguments.attention)
    build_s = time.perf_counter() - start

    measured = common.run_steps(run, step)
    packages = ("transformers", "torchao", "triton")
    result = {**common.result_of("transformers", run, settings, packages), "build_s": build_s, **measured}
    common.write_result(arguments.output, result)


if __name__ == "__main__":
    main()
