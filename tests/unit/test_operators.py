"""The benchmark of operators, as far as no GPU is needed: from a trace to rates, and a file that the estimate reads."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import operators
from benchmarks.operator_traces import layer_entry
from nemo_bench.estimate import rates

FORWARD = ["nvjet_a", "sdpa_flash_fprop", "nvjet_b", "rmsnorm_fwd_tuned", "nvjet_c", "triton_mul_silu", "nvjet_d"]
BACKWARD = ["nvjet_bwd"] * 8 + ["sdpa_flash_bprop", "rmsnorm_bwd_tuned", "rmsnorm_bwd_finalize", "Memset"]
CASE = replace(operators.SHAPES[0], layers=2)


def trace(layers: int = 2, replays: int = 4) -> dict[str, Any]:
    """Replays of two graphs, each kernel 100 us long; each graph ends with the final norm's."""
    events: list[dict[str, Any]] = []
    time_us = 0
    for launch in range(2 * replays):
        args = {"correlation": launch}
        events.append({"name": "cudaGraphLaunch", "cat": "cuda_runtime", "ts": launch, "args": args})
        direction = (FORWARD, BACKWARD)[launch % 2]
        for name in [*direction * layers, "rmsnorm_tuned"]:
            events.append({"name": name, "cat": "kernel", "ts": time_us, "dur": 100.0, "args": args})
            time_us += 100
    return {"traceEvents": events}


def test_a_trace_and_the_time_of_replays_make_a_layers_rates() -> None:
    entry = layer_entry(CASE, trace(), [[0.75, 1.25, 2.0]] * 9)
    # 15 kernels forward in two layers, of which one, the final norm, is no layer's.
    total = sum(entry["forward"]["products_ms"].values()) + entry["forward"]["attention_ms"]
    total += sum(entry["forward"]["kernels_ms"].values())
    assert entry["forward"]["products_ms"] == dict.fromkeys(["qkv", "proj", "fc1", "fc2"], 0.1)
    assert entry["forward"]["attention_ms"] == entry["forward"]["kernels_ms"]["activation"] == 0.1
    assert total == pytest.approx(0.75 - 0.03, abs=1e-3)
    assert list(entry["backward"]["products_ms"])[:2] == ["fc2 dgrad", "fc2 wgrad"]
    assert entry["backward"]["kernels_ms"]["other"] == pytest.approx(0.2, abs=0.01)


def test_what_was_not_measured_is_taken_over_and_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = json.loads((operators.RATES / "h200.json").read_text())
    layer = layer_entry(CASE, trace(), [[0.75, 1.25, 2.0]])
    tables = {"layers": [{**layer, "matrix_tflops": 665.2}], "heads": [], "power": {"bf16": [[1.0, 1.0]]}}
    result = operators.completed(tables, base)
    taken = result["taken_over"]["tables"]
    assert len(result["layers"]) == len(base["layers"]) and result["layers"][0]["forward"] == layer["forward"]
    assert {"power.fp8", "nccl.all_gather", "user_buffers.ring", "beside_held_sms"} < set(taken)
    assert "power.bf16" not in taken and len([name for name in taken if name.startswith("layers")]) == 19
    monkeypatch.setattr(rates, "FOLDER", tmp_path)
    head = {name: base[name] for name in ("hardware", "date", "versions")}
    (tmp_path / "mine.json").write_text(json.dumps({**head, **result}))
    assert next(iter(rates.load_rates("mine").layers.values()))["forward"].attention_ms == 0.1
