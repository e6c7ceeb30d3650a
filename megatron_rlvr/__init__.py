"""RLVR training on Megatron-Core that keeps a language model's entropy where its user wants it."""

__version__ = "0.1.0"
