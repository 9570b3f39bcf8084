"""What a GPU kernel is for, judged by its name.

The first pattern that matches decides. A name that matches none is in OTHER, which a profile lists by name: that is
where a pattern is missing.
"""

from __future__ import annotations

import re
from functools import cache

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

# pattern, class, why
_KERNELS = (
    # Communication comes first: the names of collectives hold those of the types that they reduce.
    (r"nccl", COMMUNICATION, "NCCL: ncclDevKernel_, ncclSymkDevKernel_ (symmetric memory), ncclKernel_ (before 2.19)"),
    (r"userbuffers", COMMUNICATION, "Transformer Engine's tensor-parallel overlap: userbuffers_..., kuserbuffers_..."),
    (r"^(consumer|producer|consumer_batch|reset_counters)_kernel", COMMUNICATION, "that overlap's counters"),
    (r"nvshmem|multimem_|(one|two)_shot_all", COMMUNICATION, "NVSHMEM, and PyTorch's symmetric memory"),
    (r"^Memcpy PtoP", COMMUNICATION, "copies between GPUs: user buffers that use the copy engines"),
    (r"^Mem(cpy|set)\b", MEMORY, "copies and fills by the copy engines, as CUPTI names them"),
    # Not multi_tensor_swizzle_..., which is fp8's, and not Hadamard, which is fp4's.
    (
        r"multi_?tensor_(?!swizzle)|adam(?!ard)|l2norm",
        OPTIMIZER,
        "Adam, the gradients' norm and their clipping, by Transformer Engine, Apex or PyTorch",
    ),
    # Before GEMM: FlashAttention 3 is a cutlass::device_kernel.
    (
        r"sdpa|flash|fmha|attention|attn|thd_|mha_|compute_dot_do_o|convert_dq_to",
        ATTENTION,
        "cuDNN, FlashAttention, and what joins context-parallel parts",
    ),
    (r"(masked|causal)_softmax", ATTENTION, "unfused attention"),
    (r"nvjet|gemm|gemv|xmma|cutlass|splitk|wgmma|triton_(mm|tem)", GEMM, "cuBLAS, cuBLASLt, CUTLASS, Triton"),
    (r"rms_?norm|layer_?norm|\bln_(fwd|bwd)|group_?norm", NORMALISATION, "Transformer Engine, Apex, PyTorch, Triton"),
    (r"swiglu|silu|[gr]elu|glu\b|gated_act|sigmoid", ACTIVATION, "also where the cast to fp8 is fused with it"),
    (
        r"(?<![a-z])(de)?(cast|quantize)|transpose|swap_first_dims|amax|delayed_scaling|scaling_recipe|scale_inv|swizzle"
        r"|hadamard|padding_kernel|identity|nvfp4|mxfp8",
        CAST,
        "fp8 and fp4: casts, their transposes and their scales, by Transformer Engine",
    ),
    (r"copy_kernel|CatArray|chunk_cat|split_with_sizes|to_copy", CAST, "PyTorch's changes of type and layout"),
    (
        r"elementwise|element_|pointwise|triton_|reduce_|rope|embedding|index|gather|scatter|softmax|cross_?entropy"
        r"|dropout|unary|fill|memset|cub::|distribution|scan|sort|at::native",
        ELEMENTWISE,
        "residuals, RoPE, embedding, loss, masks, sums",
    ),
)

_PATTERNS = [(re.compile(pattern, re.IGNORECASE), name) for pattern, name, _ in _KERNELS]


@cache
def kernel_class(name: str) -> str:
    """Return the class of a GPU kernel, or of a copy, with this (demangled) name."""
    return next((kernel_class for pattern, kernel_class in _PATTERNS if pattern.search(name)), OTHER)


def short_name(name: str, width: int = 80) -> str:
    """Return a kernel's name without return type, namespaces and arguments, cut at `width`."""
    text = re.sub(r"^void ", "", name)
    text = re.sub(r"\(anonymous namespace\)::|(at::native|at|transformer_engine|cutlass|cuda|std)::", "", text)
    # The arguments are in the last parentheses; others, as in `(int)4`, belong to a template.
    text = re.sub(r"(?<=[\w>])\([^()]*\)$", "", text)
    return text if len(text) <= width else f"{text[: width - 3]}..."
