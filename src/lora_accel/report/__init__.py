"""The report of one run, or of several compared: one HTML file."""
