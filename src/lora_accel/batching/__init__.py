"""Build each rank's micro-batches from examples."""
