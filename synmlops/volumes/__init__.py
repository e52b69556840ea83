"""Voxels on disk: stores, labels, phantom, importers."""
