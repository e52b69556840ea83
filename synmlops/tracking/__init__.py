"""MLflow runs, lineage, report and figures."""
