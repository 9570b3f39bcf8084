"""What a rank runs: the only package that imports torch, lightning, megatron or nemo."""
