"""What outlives the process: adapters, checkpoints, merged models, and where each came from."""
