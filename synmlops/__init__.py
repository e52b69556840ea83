"""synmlops finds synaptic partners in electron-microscopy volumes.

The path of the data::

    volume files --prepare--> prepared volumes --train--> model --infer--> probabilities
        --evaluate--> instances -> partner table -> scores, figures, report

Who may import whom, from the ground up: params, volumes, blockwise, learning and synapses (side by side),
tracking, serving, stages, cli.
"""

__version__ = "0.1.0"
