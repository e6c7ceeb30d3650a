"""The trained policy on Megatron-Core. `cpu_runtime` and `parallel` import without a model; the rest needs both."""
