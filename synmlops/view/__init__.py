"""Volumes and partners in the browser, through neuroglancer; reads files and writes none."""
