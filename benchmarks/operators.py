"""Measures on one GPU what estimate.py takes as that GPU kind's rates, in under three minutes.

    python benchmarks/operators.py gpu=h200 output=h200.json

Needs megatron-core, Transformer Engine and CuPy. Each case runs until the GPU is at its power limit; then it counts.
What takes two GPUs, and what the time or an error left out, is taken over from the rates in the project (`base=`), and
named in the file as such. Put the file into nemo_bench/estimate/rates/ once it was read: `errors` names what failed.

Options: gpu=NAME of conf/gpu, output=FILE, base=FILE, seconds=170, only=layers,memory,pipelined,held,norms,host (all).
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
# Graphs cannot be recorded with expandable segments, and user buffers' order is that of a single queue.
os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"

from benchmarks import operator_layers, operator_products  # noqa: E402
from benchmarks.operator_traces import Case, layer_entry  # noqa: E402

RATES = PROJECT / "nemo_bench" / "estimate" / "rates"
_8B = Case(4096, 14336, 32, 8, 1, 1, 8192, "bf16")
_70B = Case(8192, 28672, 64, 8, 4, 1, 8192, "bf16")
_405B = Case(16384, 53248, 128, 8, 8, 2, 4096, "bf16", layers=3)
# In bf16 and in fp8, in the order in which they are measured: the published layouts first.
SHAPES = (
    replace(_70B, context_parallel=2, tokens=4096),
    _405B,
    _70B,
    replace(_8B, context_parallel=2, tokens=4096),
    replace(_70B, tensor_parallel=1, layers=2),
)
IDLE = (0.04, 0.08, 0.15)
HELD_MS = (0.02, 0.04, 0.09)
# Rows, inner size, columns; the SMs that NVIDIA's tables of user buffers leave free.
PIPELINED = {
    "proj": ((4096, 2048, 8192, 24), (8192, 2048, 8192, 24), (4096, 2048, 16384, 24)),
    "fc2": ((4096, 7168, 8192, 16), (8192, 7168, 8192, 16), (4096, 6656, 16384, 8)),
}
HELD_SMS = (2, 4, 8, 16, 24)


class Measurement:
    """The tables of one call, as the file of rates holds them."""

    def __init__(self, gpu: str, base: dict[str, Any], seconds: float, output: Path) -> None:
        self.gpu, self.base, self.end, self.output = gpu, base, time.monotonic() + seconds, output
        self.tables: dict[str, Any] = {"layers": [], "heads": [], "power": {}, "unsteadiness": {}}
        self.errors: list[str] = []
        self.rates: list[float] = []
        self.group = operator_layers.prepare()

    def attempt(self, name: str, needs_s: float, run: Callable[[], None]) -> None:
        """Run one part, if there is time; an error of it is noted, and the others go on."""
        import torch

        left = self.end - time.monotonic()
        if left < needs_s:
            self.errors.append(f"{name}: no time left")
            return
        try:
            run()
            torch.cuda.synchronize()
            print(f"{name}: {left - (self.end - time.monotonic()):.1f} s", flush=True)
        except Exception as error:  # a table less is no reason to lose the others
            traceback.print_exc()
            self.errors.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        if self.rates:  # a call that dies halfway leaves what it measured
            self.output.write_text(json.dumps(self.result(), indent=1) + "\n")

    def matrix_rate(self) -> None:
        self.rates.append(operator_products.matrix_tflops(2.0, 2.0))

    def layer(self, case: Case) -> None:
        """Measure a layer; of the first shape also how it moves, and how much faster it is where the GPU idles."""
        with operator_layers.recorded(case, self.group) as layers:
            times = layers.replays(operator_layers.WARM_S, operator_layers.COUNTED_S)
            self.tables["layers"].append(layer_entry(case, layers.profile(), times))
            if case.precision == "bf16":
                self.tables["heads"].append(layers.head())
            if replace(case, precision="bf16") == SHAPES[0]:
                both = [row[0] + row[1] for row in times]
                self.tables["unsteadiness"][case.precision] = statistics.pstdev(both) / statistics.fmean(both)
                self._power(case, layers, statistics.median(both))
                self._held(case, layers, statistics.median(both))

    def _power(self, case: Case, layers: operator_layers.Recorded, full_ms: float) -> None:
        curve = [[1.0, 1.0]]
        for idle in IDLE:
            rows = layers.replays(0.6, 0.8, idle=idle)
            busy = statistics.median(row[0] + row[1] for row in rows)
            curve.append([round(busy / statistics.median(row[2] for row in rows), 4), round(busy / full_ms, 4)])
        self.tables["power"][case.precision] = sorted(curve)

    def _held(self, case: Case, layers: operator_layers.Recorded, full_ms: float) -> None:
        import torch

        holder, slowdowns = operator_products.Holder(), {}
        for sms in (8, 16):

            def hold(time_ms: float, sms: int = sms) -> None:
                holder.stream.wait_stream(torch.cuda.current_stream())
                holder(sms, time_ms)

            rows = layers.replays(0.4, 0.8, hold=hold)
            slowdowns[str(sms)] = round(statistics.median(row[0] + row[1] for row in rows) / full_ms - 1, 4)
        self.tables.setdefault("layer_beside_held_sms", {})[case.precision] = slowdowns

    def pipelined(self) -> None:
        """User buffers' reduce-scatter behind parts of a product, played on this GPU."""
        import torch

        holder, entries = operator_products.Holder(), []
        torch.backends.cuda.preferred_blas_library("cublaslt")  # heeds the SMs left free
        for name, shapes in PIPELINED.items():
            for rows, inner, columns, sms in shapes:
                for precision in ("bf16", "fp8"):
                    ratios = operator_products.pipelined(rows, inner, columns, precision, sms, holder, HELD_MS)
                    entry = {"product": name, "precision": precision, "shape": [rows, inner, columns]}
                    entries.append({**entry, "held_ms": list(HELD_MS), "ratio": ratios})
        torch.backends.cuda.preferred_blas_library("default")
        self.tables["user_buffers"] = {"pipeline": entries}

    def held(self) -> None:
        """Products of the 70B's backward pass beside SMs that a collective holds."""
        holder, entries = operator_products.Holder(), []
        sizes = {"fc1 dgrad": (4096, 14336, 8192), "fc1 wgrad": (14336, 4096, 8192)}
        sizes |= {"qkv dgrad": (4096, 2560, 8192), "qkv wgrad": (2560, 4096, 8192)}
        for name, size in sizes.items():
            for precision in ("bf16", "fp8"):
                slowdown = operator_products.beside_held_sms(*size, precision, holder, HELD_SMS)
                shape = [4096, 8192, 2560 if name.startswith("qkv") else 14336]
                entry = {"product": name, "precision": precision, "shape": shape}
                entries.append({**entry, "sms": [0, *HELD_SMS], "slowdown": slowdown})
        self.tables["beside_held_sms"] = entries

    def memory(self) -> None:
        self.tables["memory_gb_s"] = operator_products.memory_gb_s()

    def norms(self) -> None:
        """Norms at the rows that sequence parallelism leaves, over those of all rows."""
        whole = operator_products.norm_ms(4096, 8192)
        shares = {tp: operator_products.norm_ms(4096 // tp, 8192) / whole for tp in (2, 4)}
        shares[8] = operator_products.norm_ms(512, 16384) / operator_products.norm_ms(4096, 16384)
        self.tables["norm_share"] = {"1": 1, **{str(tp): round(share, 3) for tp, share in shares.items()}}

    def host(self) -> None:
        """The host's time to launch a layer, with and without context parallelism."""
        entries = []
        for precision in ("bf16", "fp8", "fp8_tensorwise"):
            for parts in (1, 2):
                case = replace(_70B, precision=precision, context_parallel=parts, tokens=256 * parts)
                ms = round(operator_layers.host_ms(case, self.group), 3)
                entries.append({"precision": precision, "context_parallel": parts, "ms": ms})
        self.tables["host_ms_a_layer"] = entries

    def run(self, only: set[str]) -> None:
        """Measure all tables, or those named."""
        self.attempt("matrix rate", 5, self.matrix_rate)
        for name, needs_s in (("memory", 4), ("pipelined", 12), ("held", 9), ("norms", 4), ("host", 25)):
            if name in only:
                self.attempt(name, needs_s, getattr(self, name))
        if "layers" in only:
            for shape in SHAPES:
                for precision in ("bf16", "fp8"):
                    case = replace(shape, precision=precision)
                    self.attempt(f"layer {case}", 12, functools.partial(self.layer, case))
        self.attempt("matrix rate", 0, self.matrix_rate)

    def result(self) -> dict[str, Any]:
        """Return the file of rates: what was measured, completed by the base."""
        import torch

        rate = round(statistics.fmean(self.rates), 2)
        for entry in [*self.tables["layers"], *self.tables["heads"]]:
            entry["matrix_tflops"] = rate
        names = {"transformer_engine": "transformer-engine", "megatron_core": "megatron-core"}
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
        versions["cudnn"] = str(torch.backends.cudnn.version())
        for name, package in names.items():
            try:
                versions[name] = metadata.version(package)
            except metadata.PackageNotFoundError:
                versions[name] = "unknown"
        head = {
            "gpu": self.gpu,
            "hardware": f"{torch.cuda.get_device_name()}, one GPU at its power limit",
            "versions": versions,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "method": "python benchmarks/operators.py",
            "matrix_tflops": self.rates,
            "errors": self.errors,
        }
        return {**head, **completed(self.tables, self.base)}


def completed(tables: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return tables with what they lack taken over from a base, and named under `taken_over`."""
    described = ("gpu", "hardware", "versions", "date", "method", "matrix_tflops", "errors", "taken_over")
    result: dict[str, Any] = {}
    taken: list[str] = []
    for name, table in base.items():
        own = tables.get(name)
        if name in described:
            continue
        if name in ("layers", "heads"):
            keys = [key for key in table[0] if isinstance(table[0][key], (int, str))]
            sizes = [key for key in keys if not key.endswith("_ms")]
            known = [[entry[key] for key in sizes] for entry in own or []]
            rest = [entry for entry in table if [entry[key] for key in sizes] not in known]
            taken += [f"{name}: {' '.join(str(entry[key]) for key in sizes)}" for entry in rest]
            result[name] = [*(own or []), *rest]
        elif isinstance(table, dict):
            result[name] = {**table, **(own or {})}
            taken += [f"{name}.{key}" for key in table if key not in (own or {})]
        else:
            result[name] = own or table
            taken += [] if own else [name]
    return {**result, "taken_over": {"from": base.get("date", "?"), "tables": taken}}


def main() -> None:
    parts = "layers,memory,pipelined,held,norms,host"
    defaults = {"gpu": "", "output": "", "base": str(RATES / "h200.json"), "seconds": "170", "only": parts}
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if not set(options) <= set(defaults) or not options.get("gpu"):
        sys.exit(__doc__)
    options = {**defaults, **options}
    output = Path(options["output"] or f"{options['gpu']}.json")
    base = json.loads(Path(options["base"]).read_text())
    output.parent.mkdir(parents=True, exist_ok=True)
    measurement = Measurement(options["gpu"], base, float(options["seconds"]), output)
    measurement.run(set(options["only"].split(",")))
    print(f"written: {output}; matrix rate {measurement.rates}; errors: {measurement.errors or 'none'}")


if __name__ == "__main__":
    main()
