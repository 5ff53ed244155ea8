"""Networks, checkpoints and training. Knows nothing of serving."""
