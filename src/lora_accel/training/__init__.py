"""The training loop. It receives prepared modules and batches."""
