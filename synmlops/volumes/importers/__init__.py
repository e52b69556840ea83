"""Public datasets turned into volumes and params."""
