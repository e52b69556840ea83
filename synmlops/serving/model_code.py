"""The script MLflow runs to get the served model: a registered model holds code and weights, no pickle."""

from mlflow.models import set_model

from synmlops.serving.pyfunc import SynapseModel

set_model(SynapseModel())
