"""The stages that dvc.yaml runs, a file each; they never import each other."""
