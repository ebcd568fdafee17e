"""The pretraining entry over ``megatron.training.pretrain``: ``python -m flagscale.train``."""
