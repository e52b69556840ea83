"""A volume in blocks: who owns which voxels, what is done, who computes; knows nothing of networks."""
