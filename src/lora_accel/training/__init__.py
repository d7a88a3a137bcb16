"""The loop: it is given modules and batches."""
