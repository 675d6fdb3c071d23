"""Configuration files, found by name."""
