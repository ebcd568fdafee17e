"""Copying tensors between checkpoint files: a pure plan, its verification, its execution."""
