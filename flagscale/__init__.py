"""FlagScale: a thin layer over megatron-core for training large models and living with them."""

__version__ = "0.1.0"
