"""What a GPU kernel is for, judged by its name. A name that no pattern matches is in OTHER, which a profile lists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

GEMM = "GEMM"
ATTENTION = "attention"
NORMALISATION = "normalisation"
CAST = "cast, copy, transpose"
ACTIVATION = "activation"
ELEMENTWISE = "other elementwise"
OPTIMIZER = "optimizer"
COMMUNICATION = "communication"
MEMORY = "memory copies"
OTHER = "other"

# In display order; an instant counts for the first of them that is running.
CLASSES = (GEMM, ATTENTION, NORMALISATION, CAST, ACTIVATION, ELEMENTWISE, OPTIMIZER, OTHER, COMMUNICATION, MEMORY)

# The first class that matches decides.
_PATTERNS = {
    # First, since the names of collectives hold those of the types that they reduce. NCCL; Transformer Engine's
    # tensor-parallel overlap, with its counters and its copies between GPUs; PyTorch's symmetric memory.
    COMMUNICATION: r"nccl|userbuffers|^(consumer|producer|consumer_batch|reset_counters)_kernel|^Memcpy PtoP"
    r"|nvshmem|multimem_|(one|two)_shot_all",
    MEMORY: r"^Mem(cpy|set)\b",
    # Adam, the gradients' norm and their clipping; not multi_tensor_swizzle_..., which is fp8's, and not Hadamard.
    OPTIMIZER: r"multi_?tensor_(?!swizzle)|adam(?!ard)|l2norm",
    # Before GEMM, since FlashAttention 3 is a cutlass::device_kernel. With what joins context-parallel parts.
    ATTENTION: r"sdpa|flash|fmha|attention|attn|thd_|mha_|compute_dot_do_o|convert_dq_to|(masked|causal)_softmax",
    GEMM: r"nvjet|gemm|gemv|xmma|cutlass|splitk|wgmma|triton_(mm|tem)",
    NORMALISATION: r"rms_?norm|layer_?norm|\bln_(fwd|bwd)|group_?norm",
    # Also where the cast to fp8 is fused with it.
    ACTIVATION: r"swiglu|silu|[gr]elu|glu\b|gated_act|sigmoid",
    # Casts to fp8 and fp4, their transposes and scales, and PyTorch's changes of type and layout.
    CAST: r"(?<![a-z])(de)?(cast|quantize)|transpose|swap_first_dims|amax|delayed_scaling|scaling_recipe|scale_inv"
    r"|swizzle|hadamard|padding_kernel|identity|nvfp4|mxfp8|copy_kernel|CatArray|chunk_cat|split_with_sizes|to_copy",
    # Residuals, RoPE, embedding, loss, masks, sums.
    ELEMENTWISE: r"elementwise|element_|pointwise|triton_|reduce_|rope|embedding|index|gather|scatter|softmax"
    r"|cross_?entropy|dropout|unary|fill|memset|cub::|distribution|scan|sort|at::native",
}

# Terms of an estimate (estimate/step.py) to which kernels belong: by class; communication by its process group, as
# megatron-core describes it (parallel_state.py), and its collective.
OTHER_COMMUNICATION = "other communication"
_TERMS = {GEMM: "matrix products", ATTENTION: "attention", OPTIMIZER: "optimizer"}
_GROUPS = {
    r"TENSOR_MODEL": "tensor parallel",
    r"TENSOR_AND": "fp8 scaling factors",
    r"PIPELINE|EMBEDDING": "pipeline bubble and p2p",
    r"^(HIERARCHICAL_)?CONTEXT": "context parallel",
    r"(DATA_PARALLEL|OPTIMIZER_INSTANCE).* \w*all_?gather": "parameter gathering",
    r"DATA_PARALLEL|OPTIMIZER_INSTANCE": "gradient reduction",
    r"^MODEL_PARALLEL": "optimizer",  # the gradients' norm
    r"userbuffers|(consumer|producer)\w*_kernel|reset_counters|Memcpy PtoP": "tensor parallel",
}


def term_of(kind: str, name: str, about: Mapping[str, Any], in_head: bool) -> str:
    """Return the term of an estimate that a kernel belongs to, by its class, its name and the trace's facts of it."""
    if kind != COMMUNICATION:
        return "embedding, output layer, loss" if in_head else _TERMS.get(kind, "other kernels")
    text = f"{about.get('Process Group Description')} {about.get('Collective name')} {name}"
    terms = (term for pattern, term in _GROUPS.items() if re.search(pattern, text, re.IGNORECASE))
    return next(terms, OTHER_COMMUNICATION)


@cache
def kernel_class(name: str) -> str:
    """Return the class of a GPU kernel, or of a copy, with this (demangled) name."""
    matches = (kind for kind, pattern in _PATTERNS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(matches, OTHER)


def short_name(name: str, width: int = 80) -> str:
    """Return a kernel's name without return type, namespaces and arguments, cut at `width`."""
    text = re.sub(r"^void ", "", name)
    text = re.sub(r"\(anonymous namespace\)::|(at::native|at|transformer_engine|cutlass|cuda|std)::", "", text)
    # The arguments are in the last parentheses; others, as in `(int)4`, belong to a template.
    text = re.sub(r"(?<=[\w>])\([^()]*\)$", "", text)
    return text if len(text) <= width else f"{text[: width - 3]}..."
