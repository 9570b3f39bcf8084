"""`entrypoint=bridge_...`: this project's own program on Megatron-Bridge, nemo_bench/training/megatron_bridge.py."""

from __future__ import annotations

from nemo_bench.entrypoints.nemo2 import Nemo2

ENTRYPOINT = Nemo2()  # the same program, which imports Bridge in the place of NeMo 2
