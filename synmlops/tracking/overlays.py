"""Sections of EM with what was predicted and what is true drawn over them, as parts of an SVG.

The EM is one grey JPEG; everything over it stays vector, so that a reader can switch layers off and zoom in.
"""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

_JPEG_QUALITY = 75
_HEAD_PX = 7.0  # length of an arrow's head, in CSS pixels
_FRAME_PX = 5.0  # between what is framed and its frame

Box = tuple[slice, slice]
Marks = Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class Arrow:
    """A partner: a line from pre to post that ends in a head, as SVG path data."""

    shaft: str
    head: str
    title: str


@dataclass(frozen=True)
class Layer:
    """What was predicted, or what is true, in one section."""

    areas: Mapping[str, str] = field(default_factory=dict)  # pre, post or union -> SVG path data
    arrows: tuple[Arrow, ...] = ()


@dataclass(frozen=True)
class Frame:
    """A rectangle in a view."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class View:
    """A section to show; lengths are in units of the finer of the two voxel sides."""

    jpeg: str  # as a data URI
    width: float
    height: float
    css_width: int  # how wide the page should show it, in CSS pixels
    bar: float  # length of the scale bar
    bar_label: str
    predicted: Layer
    true: Layer
    frame: Frame | None = None  # round what the view is about

    @property
    def unit(self) -> float:
        """Length of one CSS pixel."""
        return self.width / self.css_width


def draw(
    section_yx: NDArray[np.integer],
    *,
    box: Box,
    voxel_nm: tuple[float, float],
    predicted: Marks,
    true: Marks,
    predicted_partners: pd.DataFrame | None = None,
    true_partners: pd.DataFrame | None = None,
    css_width: int,
    framed: Box | None = None,
) -> View:
    """Draw a window of a section.

    Parameters
    ----------
    section_yx : (Y, X) array of uint8 or uint16
        The EM in the window.
    box : tuple of slice
        Where the window lies in the section.
    voxel_nm : tuple of float
        Size of a voxel along y and x.
    predicted, true : mapping
        Side ("pre", "post" or "union") to where it is in the window.
    predicted_partners, true_partners : DataFrame, optional
        Rows of the partner table to draw as arrows.
    css_width : int
        How wide the page shows it, in CSS pixels.
    framed : tuple of slice, optional
        What to draw a frame round, in voxels of the section.

    Examples
    --------
    >>> em = np.zeros((4, 8), np.uint8)
    >>> view = draw(em, box=(slice(0, 4), slice(0, 8)), voxel_nm=(8, 4), predicted={"union": em == 0},
    ...             true={}, css_width=100)
    >>> view.width, view.height, view.predicted.areas, view.bar_label
    (8.0, 8.0, {'union': 'M0 0H8V8H0z'}, '5 nm')
    """
    unit_nm = min(voxel_nm)
    scale_yx = (voxel_nm[0] / unit_nm, voxel_nm[1] / unit_nm)
    height, width = (n * scale for n, scale in zip(section_yx.shape, scale_yx, strict=True))
    bar_nm = _round_length(width * unit_nm / 4)
    layers = [
        Layer(
            {side: outline(mask, scale_yx=scale_yx) for side, mask in marks.items() if mask.any()},
            _arrows(partners, box=box, scale_yx=scale_yx, head=_HEAD_PX * width / css_width),
        )
        for marks, partners in ((predicted, predicted_partners), (true, true_partners))
    ]
    return View(
        jpeg=jpeg_uri(section_yx, most_pixels=2 * css_width),  # what dense screens show
        width=width,
        height=height,
        css_width=css_width,
        bar=bar_nm / unit_nm,
        bar_label=f"{bar_nm / 1000:g} µm" if bar_nm >= 1000 else f"{bar_nm:g} nm",
        predicted=layers[0],
        true=layers[1],
        frame=None if framed is None else _frame(framed, box=box, scale_yx=scale_yx, unit=width / css_width),
    )


def outline(mask_yx: NDArray[np.bool_], *, scale_yx: tuple[float, float] = (1, 1)) -> str:
    """Trace the borders of a mask along the edges of its voxels, as SVG path data for the even-odd rule.

    Examples
    --------
    >>> outline(np.array([[0, 1, 0], [0, 1, 1]], bool))
    'M1 0H2V1H3V2H1z'
    >>> outline(np.zeros((2, 2), bool))
    ''
    """
    follows = _border_edges(mask_yx)
    parts: list[str] = []
    while follows:
        start = next(iter(follows))
        corners, point, step = [start], start, (0, 0)
        while True:
            after = follows[point].pop()
            if not follows[point]:
                del follows[point]
            new_step = (after[0] - point[0], after[1] - point[1])
            if new_step == step:
                corners.pop()
            corners.append(after)
            point, step = after, new_step
            if point == start:
                break
        parts.append(_path(corners[:-1], scale_yx))
    return "".join(parts)


def jpeg_uri(section_yx: NDArray[np.integer], *, most_pixels: int) -> str:
    """Give a section as a grey JPEG in a data URI, its contrast stretched between the outer half per cents.

    What is larger than `most_pixels` along a side is averaged down.

    Examples
    --------
    >>> jpeg_uri(np.zeros((2, 2), np.uint16), most_pixels=640)[:27]
    'data:image/jpeg;base64,/9j/'
    """
    factor = math.ceil(max(section_yx.shape) / most_pixels)
    grey = _averaged(section_yx.astype(np.float32), factor)
    low, high = np.percentile(grey, (0.5, 99.5))
    grey = np.clip((grey - low) / max(float(high - low), 1e-6), 0, 1) * 255
    buffer = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return data_uri(buffer.getvalue(), "image/jpeg")


def data_uri(content: bytes, mime: str) -> str:
    """Give a file's bytes as a data URI.

    Examples
    --------
    >>> data_uri(b"abc", "text/plain")
    'data:text/plain;base64,YWJj'
    """
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _border_edges(mask_yx: NDArray[np.bool_]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Give each border edge as corner -> next corners (y, x), clockwise round the mask."""
    padded = np.pad(mask_yx, 1)
    inside = padded[1:-1, 1:-1]
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for neighbour, begin, end in (
        (padded[:-2, 1:-1], (0, 0), (0, 1)),  # above
        (padded[1:-1, 2:], (0, 1), (1, 1)),  # right
        (padded[2:, 1:-1], (1, 1), (1, 0)),  # below
        (padded[1:-1, :-2], (1, 0), (0, 0)),  # left
    ):
        for y, x in np.argwhere(inside & ~neighbour).tolist():
            edges.setdefault((y + begin[0], x + begin[1]), []).append((y + end[0], x + end[1]))
    return edges


def _path(corners: list[tuple[int, int]], scale_yx: tuple[float, float]) -> str:
    y, x = corners[0]
    text = f"M{x * scale_yx[1]:g} {y * scale_yx[0]:g}"
    for next_y, next_x in corners[1:]:
        text += f"H{next_x * scale_yx[1]:g}" if next_y == y else f"V{next_y * scale_yx[0]:g}"
        y, x = next_y, next_x
    return text + "z"


def _arrows(
    partners: pd.DataFrame | None, *, box: Box, scale_yx: tuple[float, float], head: float
) -> tuple[Arrow, ...]:
    if partners is None:
        return ()
    names = ["pre_y", "pre_x", "post_y", "post_x"]
    corner = np.array([box[0].start, box[1].start] * 2)
    ends = (partners[names].to_numpy(np.float64) - corner + 0.5) * (scale_yx * 2)
    return tuple(
        _arrow(*points, head=head, title=f"site {site}, partner {partner}, confidence {confidence:.2f}")
        for points, site, partner, confidence in zip(
            ends.tolist(), partners["site"], partners["partner"], partners["confidence"], strict=True
        )
    )


def _arrow(y0: float, x0: float, y1: float, x1: float, *, head: float, title: str) -> Arrow:
    length = math.hypot(x1 - x0, y1 - y0)
    dx, dy = ((x1 - x0) / length, (y1 - y0) / length) if length else (0.0, 1.0)
    neck_x, neck_y = x1 - head * dx, y1 - head * dy
    wing_x, wing_y = -0.45 * head * dy, 0.45 * head * dx
    return Arrow(
        shaft=f"M{x0:.1f} {y0:.1f}L{neck_x:.1f} {neck_y:.1f}" if length > head else "",
        head=f"M{x1:.1f} {y1:.1f}L{neck_x + wing_x:.1f} {neck_y + wing_y:.1f}"
        f"L{neck_x - wing_x:.1f} {neck_y - wing_y:.1f}z",
        title=title,
    )


def _frame(framed: Box, *, box: Box, scale_yx: tuple[float, float], unit: float) -> Frame:
    margin = _FRAME_PX * unit
    (y, height), (x, width) = (
        ((part.start - window.start) * scale - margin, (part.stop - part.start) * scale + 2 * margin)
        for part, window, scale in zip(framed, box, scale_yx, strict=True)
    )
    return Frame(x=x, y=y, width=width, height=height)


def _averaged(grey: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Average squares of `factor` pixels; a rest at the far edges is left out."""
    if factor == 1:
        return grey
    height, width = (max(n // factor, 1) for n in grey.shape)
    whole = grey[: height * factor, : width * factor]
    small: NDArray[np.float32] = whole.reshape(height, -1, width, whole.shape[1] // width).mean((1, 3))
    return small


def _round_length(most: float) -> float:
    """Give the greatest of 1, 2, 5, 10, 20 ... that is no longer than `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (5, 2, 1) if step * power <= most * (1 + 1e-9))
