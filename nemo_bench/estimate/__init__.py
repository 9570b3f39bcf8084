"""What a point should take: step time from one GPU's measured rates, link speeds and Megatron's schedule. No torch."""
