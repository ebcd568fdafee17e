"""Proofs that a Megatron checkpoint and a Hugging Face directory hold the same model."""
