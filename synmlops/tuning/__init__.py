"""The search for better params: its space, its trials, and the params files that it writes."""
