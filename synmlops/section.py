"""What every part of params.yaml is built from, the channels, and the error a user can mend."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

CHANNELS = ("pre", "post", "union")
"""What the network predicts, in this order, wherever a channel axis appears."""

SCALE = 255
"""Grey level of probability 1, wherever probabilities are uint8."""

Size = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Zyx = tuple[Count, Count, Count]
Nm = tuple[Positive, Positive, Positive]
LabelKind = Literal["pairs", "semantic", "union"]
Precision = Literal["auto", "bf16", "float32"]


class SynmlopsError(Exception):
    """What a user can mend: one message with the value, what is allowed and what to do next."""


class IncompleteError(SynmlopsError):
    """Some of the work could not be done, and all the rest was."""


class Section(BaseModel):
    """A part of params.yaml: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
