"""NeMo Bench: the Llama 3.1 pre-training performance benchmark with NeMo Megatron."""
