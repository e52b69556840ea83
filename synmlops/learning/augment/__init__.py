"""Augmentation of one patch: its chances are drawn first, then applied to voxels on whatever device."""
