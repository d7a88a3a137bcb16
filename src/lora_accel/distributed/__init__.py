"""Launch settings, backends, collectives and builds of DeepSpeed's extensions."""
