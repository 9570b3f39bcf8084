"""User-buffer tables: how Transformer Engine overlaps tensor-parallel communication with matrix products.

NVIDIA's, tuned on H100: NeMo-Framework-Launcher, launcher_scripts/conf/training/tp_overlap/
ub_cfg_h100_{,fp8_}h8192_tp4_mbs1_seqlen8192.yaml (70B), ub_cfg_h100_{bf16,fp8}_h16384_tp8_cp2_mbs1_seqlen8192.yaml
(405B), Apache-2.0. The 24.09 recipe took the 70B's bf16 table for fp8 too; here fp8 has its own, as in the launcher's
fp8 examples.
"""

from __future__ import annotations

from typing import Any

Table = dict[str, dict[str, Any]]


def _bulk(num_sm: int) -> dict[str, Any]:
    return {"method": "bulk", "num_sm": num_sm, "cga_size": 2, "set_sm_margin": 0}


def _ring(aggregate: int) -> dict[str, Any]:
    return {"method": "ring_exchange", "aggregate": aggregate}


def _pipeline(num_sm: int, **more: int) -> dict[str, Any]:
    return {"method": "pipeline", "num_sm": num_sm, "cga_size": 2, "num_splits": 4, "set_sm_margin": 1, **more}


def _hidden_8192_tp4(fp8: bool) -> Table:
    buffers = {"fp8_buf": 1} if fp8 else {}
    return {
        "qkv_dgrad": _bulk(4),
        "qkv_wgrad": _bulk(24),
        "fc1_dgrad": _bulk(2),
        "fc1_wgrad": _bulk(4),
        "qkv_fprop": _ring(0),
        "proj_dgrad": _ring(0),
        "fc1_fprop": _ring(0),
        "fc2_dgrad": _ring(0),
        "proj_fprop": _pipeline(24, **buffers),
        "fc2_fprop": _pipeline(16, **buffers),
    }


def _hidden_16384_tp8(fp8: bool) -> Table:
    buffers = {"fp8_buf": int(fp8), "atomic_gemm": 0}
    return {
        "qkv_dgrad": _bulk(2),
        "qkv_wgrad": _bulk(24),
        "fc1_dgrad": _bulk(2),
        "fc1_wgrad": _bulk(2),
        "qkv_fprop": _ring(1),
        "proj_dgrad": _ring(1),
        "fc1_fprop": _ring(1),
        "fc2_dgrad": _ring(0 if fp8 else 1),
        "proj_fprop": _pipeline(24, **buffers),
        "fc2_fprop": _pipeline(16 if fp8 else 8, **buffers),
    }


_TABLES = {(8192, 4): _hidden_8192_tp4, (16384, 8): _hidden_16384_tp8}


def table(*, hidden_size: int, tensor_model_parallel_size: int, fp8: bool) -> Table | None:
    """The table for a layout; None where NVIDIA published none, and Transformer Engine's defaults serve."""
    build = _TABLES.get((hidden_size, tensor_model_parallel_size))
    return build(fp8) if build is not None else None
