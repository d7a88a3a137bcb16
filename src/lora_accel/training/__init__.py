"""Learning: the loop, the loss, the optimizer, evaluation and metrics. It is handed modules and batches."""
