"""Everything a run writes: adapters, checkpoints, provenance, run status and the lock of the run folder."""
