"""Pruned exports in JAX, transformers and vLLM: token ids, pixels and greedy answers of the same conversations."""
