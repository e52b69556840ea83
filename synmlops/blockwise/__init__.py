"""A volume in blocks: read and write regions; knows nothing of networks."""
