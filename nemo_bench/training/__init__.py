"""Training with NeMo Megatron: the only package that imports torch, lightning, megatron or nemo.

It is imported by name, inside the processes that train (`python -m nemo_bench.training.rank`), and by nobody else.
"""
