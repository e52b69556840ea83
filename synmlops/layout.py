"""Where the stages put their outputs, relative to the project; dvc.yaml names the same paths."""

from pathlib import Path

PREPARED = Path("data/prepared")
MODELS = Path("models")
PREDICTED = Path("data/predicted")
EVALUATED = Path("data/evaluated")

RUN_FILE = "run.json"
"""In `MODELS` and in `PREDICTED`: the run that the outputs beside it belong to."""

WHOLE = "all"
"""Name of the only fold where the params do not split by region."""


def model_file(fold: str, which: str = "model") -> str:
    """Name a model file: `which` is "model" for the best weights, "last" for the last ones.

    Examples
    --------
    >>> model_file(WHOLE), model_file("2", "last")
    ('model.safetensors', 'last_2.safetensors')
    """
    return f"{which}.safetensors" if fold == WHOLE else f"{which}_{fold}.safetensors"


def probabilities_file(fold: str, role: str, region: str) -> Path:
    """Name the probabilities of a region, relative to `PREDICTED`."""
    return Path(fold) / role / f"{region}.h5"
