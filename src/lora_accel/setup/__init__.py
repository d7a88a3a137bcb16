"""Prepare what the training loop needs: data, model, provenance, resume point and the `Run`."""
