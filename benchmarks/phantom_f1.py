"""F1 of the default model on phantoms it has never seen, beside two baselines: the table in the README.

Run it after `make repro`, in the project folder:

    python benchmarks/phantom_f1.py

The operating points (of the model, and of each baseline) are those chosen on the validation phantom. The last
row has doubled noise and doubled section jitter, which the model did not see in training.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from baselines import phantom_volume, random_forest, smoothed_intensity
from numpy.typing import NDArray

from synmlops.layout import EVALUATED, MODELS, WHOLE, model_file
from synmlops.learning.checkpoint import load_model
from synmlops.learning.predict import predict_array
from synmlops.params import CHANNELS, EvaluateParams, PhantomParams, SynmlopsError, load_params
from synmlops.synapses.partners import partners_of
from synmlops.synapses.scores import Scores, Tables, decode, score_region
from synmlops.synapses.voxels import voxel_histograms
from synmlops.volumes.phantom import Phantom, make_phantom
from synmlops.volumes.preparing import sides_of

UNSEEN_SEEDS = (101, 102, 103)
NOISY_SEED = 104


@dataclass(frozen=True)
class Trial:
    """One test volume."""

    name: str
    phantom: PhantomParams
    seed: int


def main() -> None:
    """Print the table in Markdown."""
    params = load_params(Path("params.yaml"))
    phantom = params.data.phantom
    if phantom is None:
        raise SynmlopsError("params.yaml: data.phantom is null; this benchmark is of the phantom")
    noisy = phantom.model_copy(update={"noise": 2 * phantom.noise, "jitter": 2 * phantom.jitter})
    trials = [
        *(Trial(f"seed {seed}", phantom, seed) for seed in UNSEEN_SEEDS),
        Trial(f"seed {NOISY_SEED}, noise and jitter doubled", noisy, NOISY_SEED),
    ]
    model = load_model(MODELS / model_file(WHOLE))
    point = json.loads((EVALUATED / "operating_point.json").read_text())[WHOLE]
    train, validation = (
        [phantom_volume(seed, phantom) for seed in seeds]
        for seeds in (phantom.train_seeds, phantom.validation_seeds)
    )
    test = [phantom_volume(trial.seed, trial.phantom) for trial in trials]
    dark = smoothed_intensity(train, test, validation=validation).f1
    forest = random_forest(train, test, validation=validation, seed=0).f1
    print(
        "| test volume | union voxel F1 | smoothed intensity | random forest "
        "| synapse F1 | direction | partner F1 |"
    )
    print("|---|---|---|---|---|---|---|")
    for trial, dark_f1, forest_f1 in zip(trials, dark, forest, strict=True):
        made = _make(trial)
        probabilities = predict_array(model, made.image, params=params.infer)
        scores = score(probabilities, made, threshold=point["threshold"], params=params.evaluate).flat()
        print(
            f"| {trial.name} | {scores['voxel_union_f1']:.3f} | {dark_f1:.3f} | {forest_f1:.3f} "
            f"| {scores['detection_f1']:.3f} | {scores['direction_accuracy']:.3f} "
            f"| {scores['partner_neurons_f1']:.3f} |"
        )


def score(
    probabilities: NDArray[np.uint8], made: Phantom, *, threshold: float, params: EvaluateParams
) -> Scores:
    """Score probabilities of a phantom, partners with its neuron ids."""
    histograms = voxel_histograms(
        probabilities, sides_of(made.labels, "pairs"), names=CHANNELS, known=CHANNELS
    )
    instances = decode(probabilities, threshold=threshold, params=params, voxel_nm=made.grid.voxel_nm)
    predicted = partners_of(
        instances,
        voxel_nm=made.grid.voxel_nm,
        offset_nm=made.grid.offset_nm,
        probabilities_czyx=probabilities,
        neurons=made.neurons,
        min_side_voxels=params.min_side_voxels,
    )
    return score_region(
        histograms,
        instances,
        made.labels,
        threshold=threshold,
        voxel_nm=made.grid.voxel_nm,
        tables=Tables(predicted, made.partners, with_neurons=True),
        params=params,
    )


def _make(trial: Trial) -> Phantom:
    roles = {"train_seeds", "validation_seeds", "test_seeds"}
    return make_phantom(seed=trial.seed, **trial.phantom.model_dump(exclude=roles))


if __name__ == "__main__":
    main()
