"""Train GMAI-VL, a medical vision-language model, with Megatron-Core 3D parallelism."""
