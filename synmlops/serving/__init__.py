"""The model registry and the served model."""
