"""Evaluation: imagined views and reconstructed meshes against the truth."""
