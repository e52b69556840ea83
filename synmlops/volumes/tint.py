"""Colours of the sides of a synapse, and EM tinted with them: the same in the report and in pictures."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor
from scipy.ndimage import binary_erosion

from synmlops.volumes.prepared import POST, PRE, SIDE_UNKNOWN, UNTRUSTED

COLOURS = {"pre": "#2a8fd0", "post": "#e08214", "union": "#8a63c9"}
"""Blue, orange and purple after Okabe and Ito, of a lightness that reads on white and on black."""

UNTRUSTED_COLOUR = "#d0342c"
CODES = {"pre": PRE, "post": POST, "union": SIDE_UNKNOWN}
"""What a side is called, and its code in `sides`."""

Rgb = NDArray[np.uint8]

_FILL = 0.35  # opacity


def tinted(grey: Rgb, sides: NDArray[np.uint8]) -> Rgb:
    """Tint the sides and draw their outlines in plane; hatch what is not trusted.

    Parameters
    ----------
    grey : (Z, Y, X, 3) array of uint8
    sides : (Z, Y, X) array of uint8
        `PRE`, `POST`, `SIDE_UNKNOWN` and `UNTRUSTED` of `synmlops.volumes.prepared`; all else stays grey.

    Examples
    --------
    >>> tinted(np.zeros((1, 1, 3, 3), np.uint8), np.array([[[0, 1, 2]]], np.uint8)).tolist()
    [[[[0, 0, 0], [42, 143, 208], [224, 130, 20]]]]
    """
    shown = grey.copy()
    for name, code in CODES.items():
        where = sides == code
        colour = np.array(ImageColor.getrgb(COLOURS[name]))
        inside = binary_erosion(where, structure=np.ones((1, 3, 3), bool))
        shown[where] = ((1 - _FILL) * shown[where] + _FILL * colour).astype(np.uint8)
        shown[where & ~inside] = colour
    stripes: Any = sum(np.ogrid[tuple(slice(n) for n in sides.shape)]) % 8 == 0
    shown[(sides == UNTRUSTED) & stripes] = ImageColor.getrgb(UNTRUSTED_COLOUR)
    return shown
