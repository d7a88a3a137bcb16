"""What the loop needs, prepared."""
