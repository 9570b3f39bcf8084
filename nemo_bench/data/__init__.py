"""Data for the benchmark: a local tokenised corpus, and Megatron's indexed-dataset files without torch."""
