"""What was asked: the run config, its files, and the arithmetic of a run. Never imports torch."""
