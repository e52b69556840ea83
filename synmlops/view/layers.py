"""The layers of a scene as neuroglancer draws them: image, probabilities, instances, neurons, partners."""

from collections.abc import Iterator
from typing import Any

import neuroglancer
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from synmlops.params import CHANNELS, SCALE
from synmlops.view.arrays import ViewedArray, sides_of
from synmlops.view.meshes import LazyVolume, SiteBoxes, dimensions
from synmlops.view.scene import Placed, Scene, Start
from synmlops.volumes.table import points_nm

COLOURS = {"pre": "#35a7e8", "post": "#f59a23", "union": "#a457ff", "partners": "#ff5fd2"}
"""Those of the report; the lines between partners are unlike them and the axes."""

MOST_LINES = 5000
"""Lines travel with the viewer's state at each move; of a larger table, those near the start are drawn."""

_PIXEL_NM = 3.0  # of the screen at the start: 1.5 micrometres across a panel of 500
_LINES_NM = 200.0  # a line fades out this far above and below; by default it is seen where it crosses alone
_SPACE_NM = 4000.0  # seen at the start in the 3-D panel
_SAMPLE_ZYX = (5, 256, 256)  # voxels about the start from which the contrast is taken

_GREY = """#uicontrol invlerp normalized
void main() { emitGrayscale(normalized()); }
"""

_LINES = """#uicontrol float least_confidence slider(min=0, max=1, default=0)
#uicontrol float width slider(min=1, max=8, default=3)
void main() {
  if (prop_confidence() < least_confidence) discard;
  setColor(defaultColor());
  setLineWidth(width);
  setEndpointMarkerSize(3.0 * width);
  setEndpointMarkerColor(vec4(%s, 1.0), vec4(%s, 1.0));
  setEndpointMarkerBorderColor(vec4(0.0, 0.0, 0.0, 1.0));
}
"""

_PROPERTIES = {  # of a line: its column, its type in the viewer, and what it says
    "confidence": ("confidence", "float32", "mean probability of the two sides"),
    "site": ("site", "uint32", "synaptic site n: pre is instance 2n-1, post is 2n"),
    "partner": ("partner", "uint32", "row of the table"),
    "pre_voxels": ("pre_voxels", "uint32", "size of the pre side"),
    "post_voxels": ("post_voxels", "uint32", "size of this post side"),
}


def state_of(scene: Scene, start: Start) -> Any:
    """Give the viewer's state: every layer of the scene, seen from the start.

    Parameters
    ----------
    scene : Scene
        Open for as long as the state is served: its voxels are read when they come into view.
    start : Start
    """
    state, grid = neuroglancer.ViewerState(), scene.image.grid
    finest = min(grid.voxel_nm)
    state.title = f"synmlops: {scene.image.volume.path.name}"
    state.dimensions = dimensions(grid.voxel_nm)
    middle = np.array(grid.offset_nm) / grid.voxel_nm + start.zyx + 0.5
    state.position = middle[::-1]
    state.cross_section_scale = _PIXEL_NM / finest
    state.cross_section_depth = _LINES_NM / finest
    state.projection_scale = _SPACE_NM / finest
    state.layout = "xy-3d"
    state.show_slices = True
    state.show_axis_lines = False  # they would hide the line at the start; the key A shows them
    for name, layer, visible in _layers(scene, start):
        state.layers.append(name=name, layer=layer, visible=visible)
    beside = next((name for name in ("partners", "probabilities") if name in state.layers), None)
    if beside is not None:  # the list to click through, or the slider
        state.selected_layer.layer, state.selected_layer.visible = beside, True
    return state


def _layers(scene: Scene, start: Start) -> Iterator[tuple[str, Any, bool]]:
    """Give name, layer and whether it is shown at first, from the lowest up."""
    yield "image", _image(scene, start), True
    if scene.neurons is not None:
        array = ViewedArray(scene.neurons.volume, ids=True)
        layer = neuroglancer.SegmentationLayer(
            source=_source(array, scene.neurons, scene), selected_alpha=0.2
        )
        yield "neurons", layer, scene.instances is None and scene.probabilities is None
    if scene.probabilities is not None:
        yield "probabilities", _probabilities(scene.probabilities, scene), scene.instances is None
    yield from ((name, layer, True) for name, layer in _instances(scene, start))
    if scene.table is not None:
        yield "partners", _partners(scene, start), True


def _image(scene: Scene, start: Start) -> Any:
    array = ViewedArray(scene.image.volume, ids=False)
    corners = [(at - n // 2, at + n // 2 + 1) for at, n in zip(start.zyx, _SAMPLE_ZYX, strict=True)]
    about = array.read([slice(max(low, 0), high) for low, high in corners])
    finite = about[np.isfinite(about)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0, 1)
    return neuroglancer.ImageLayer(
        source=_source(array, scene.image, scene),
        shader=_GREY,
        shader_controls={"normalized": {"range": [float(low), float(max(high, low + 1))]}},
        opacity=1,
    )


def _probabilities(placed: Placed, scene: Scene) -> Any:
    array = ViewedArray(placed.volume, ids=False)
    return neuroglancer.ImageLayer(
        source=_source(array, placed, scene),
        shader=probability_shader(placed.volume.attrs["channels"]),
        shader_controls={"threshold": scene.threshold},
        tab="rendering",
        opacity=0.6,
    )


def probability_shader(channels: list[str]) -> str:
    """Give the shader of probabilities: a colour for each channel, clear below the threshold.

    The union is drawn if it is alone, or switched on.

    Examples
    --------
    >>> print(probability_shader(["union"]))
    #uicontrol float threshold slider(min=0, max=1, default=0.5)
    #uicontrol vec3 union_colour color(default="#a457ff")
    #uicontrol bool show_union checkbox(default=true)
    void main() {
      vec3 colour = vec3(0.0);
      float most = 0.0;
      float p;
      p = show_union ? float(toRaw(getDataValue(0))) / 255.0 : 0.0;
      if (p >= threshold) { colour += p * union_colour; most = max(most, p); }
      emitRGBA(vec4(min(colour, vec3(1.0)), most));
    }
    """
    controls, body = ["#uicontrol float threshold slider(min=0, max=1, default=0.5)"], []
    for place, name in enumerate(channels):
        alone = name != CHANNELS[-1] or len(channels) == 1
        controls += [
            f'#uicontrol vec3 {name}_colour color(default="{COLOURS[name]}")',
            f"#uicontrol bool show_{name} checkbox(default={str(alone).lower()})",
        ]
        body += [
            f"  p = show_{name} ? float(toRaw(getDataValue({place}))) / {SCALE:.1f} : 0.0;",
            f"  if (p >= threshold) {{ colour += p * {name}_colour; most = max(most, p); }}",
        ]
    head = ["void main() {", "  vec3 colour = vec3(0.0);", "  float most = 0.0;", "  float p;"]
    return "\n".join([*controls, *head, *body, "  emitRGBA(vec4(min(colour, vec3(1.0)), most));", "}"])


def _instances(scene: Scene, start: Start) -> Iterator[tuple[str, Any]]:
    """Give a layer for each side, so that sides have a colour each whatever their number; else one."""
    placed = scene.instances
    if placed is None:
        return
    if not scene.has_sides:
        array = ViewedArray(placed.volume, ids=True)
        yield "instances", neuroglancer.SegmentationLayer(source=_source(array, placed, scene))
        return
    boxes = None if scene.table is None else SiteBoxes(scene.table, placed)
    for side, array in sides_of(placed.volume).items():
        selected = [] if start.site is None else [2 * start.site - (side == "pre")]
        yield (
            side,
            neuroglancer.SegmentationLayer(
                source=_source(array, placed, scene, boxes=boxes),
                segment_default_color=COLOURS[side],
                segments=selected,
                selected_alpha=0.55,
                not_selected_alpha=0.3,
            ),
        )


def _partners(scene: Scene, start: Start) -> Any:
    assert scene.table is not None  # the caller asks only with a table
    grid = scene.image.grid
    table = shown_lines(
        scene.table, start_nm=np.array(grid.offset_nm) + np.multiply(start.zyx, grid.voxel_nm)
    )
    points = (points_nm(table) - grid.offset_nm) / grid.voxel_nm
    at_xyz = (points + np.array(grid.offset_nm) / grid.voxel_nm + 0.5)[..., ::-1]
    columns = [table[column].tolist() for column, _, _ in _PROPERTIES.values()]
    rows = zip(at_xyz, *columns, strict=True)
    return neuroglancer.LocalAnnotationLayer(
        dimensions=dimensions(grid.voxel_nm),
        tab="annotations",  # the list: a click leads to a partner
        annotation_color=COLOURS["partners"],
        annotation_properties=[
            neuroglancer.AnnotationPropertySpec(id=name, type=kind, description=words)
            for name, (_, kind, words) in _PROPERTIES.items()
        ],
        annotations=[
            neuroglancer.LineAnnotation(
                id=str(partner),
                point_a=ends[0],
                point_b=ends[1],
                description=f"site {site}, {confidence:.2f}",
                props=[confidence, site, partner, *sizes],
            )
            for ends, confidence, site, partner, *sizes in rows
        ],
        shader=_LINES % tuple(_vec3(COLOURS[side]) for side in ("pre", "post")),
    )


def shown_lines(table: pd.DataFrame, *, start_nm: NDArray[Any], most: int = MOST_LINES) -> pd.DataFrame:
    """Give the partners to draw, the most confident first: all, or those nearest to the start."""
    if len(table) > most:
        distance = np.linalg.norm(points_nm(table).mean(axis=1) - start_nm, axis=1)
        table = table.iloc[np.argsort(distance, kind="stable")[:most]]
    return table.sort_values("confidence", ascending=False, kind="stable")


def _source(array: ViewedArray, placed: Placed, scene: Scene, *, boxes: SiteBoxes | None = None) -> Any:
    """Give a volume at its place; the viewer's voxel i reaches from i to i + 1, and ours lies about i."""
    voxel, of_image = np.array(placed.grid.voxel_nm), np.array(scene.image.grid.voxel_nm)
    corner = (np.array(placed.grid.offset_nm) + of_image / 2) / voxel - 0.5
    n = array.ndim
    matrix = np.eye(n, n + 1)
    matrix[:3, n] = corner[::-1]
    kind = "segmentation" if array.ids else "image"
    return neuroglancer.LayerDataSource(
        url=LazyVolume(array, placed.grid.voxel_nm, kind=kind, boxes=boxes),
        transform=neuroglancer.CoordinateSpaceTransform(
            output_dimensions=dimensions(placed.grid.voxel_nm, channels=n == 4), matrix=matrix
        ),
    )


def _vec3(colour: str) -> str:
    return "vec3({:.3f}, {:.3f}, {:.3f})".format(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
