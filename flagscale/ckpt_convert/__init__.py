"""Converts checkpoints between Megatron and Hugging Face, and proves that they are equal."""
