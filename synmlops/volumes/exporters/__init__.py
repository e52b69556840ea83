"""Writers of the partner table in the formats of others."""
