"""The wiring diagram: neurons, and edges with the number of their synapses, as GraphML or a list of edges."""

from pathlib import Path

import pandas as pd

from synmlops.params import SynmlopsError
from synmlops.volumes.files import atomic_path
from synmlops.volumes.table import edges_of

_HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<graphml xmlns="http://graphml.graphdrawing.org/xmlns">
<key id="count" for="edge" attr.name="count" attr.type="long"/>
<key id="confidence_sum" for="edge" attr.name="confidence_sum" attr.type="double"/>
<graph id="partners" edgedefault="directed">
"""


def known_edges(table: pd.DataFrame, *, where: str) -> pd.DataFrame:
    """Give the edges of a partner table; see `synmlops.volumes.table.edges_of`.

    Raises
    ------
    SynmlopsError
        If the table has rows but no neuron at both ends of any: then nothing is known of the wiring.
    """
    edges = edges_of(table)
    if edges.empty and len(table):
        raise SynmlopsError(
            f"{where}: none of its {len(table)} partners has a neuron at both ends, so there are no edges; "
            "decode with --neurons"
        )
    return edges


def write_graphml(edges: pd.DataFrame, path: Path) -> None:
    """Write edges as a directed GraphML graph, whose nodes are named by neuron id.

    Parameters
    ----------
    edges : DataFrame
        As `synmlops.volumes.table.edges_of` gives it.
    path : Path
        Complete or not at all.
    """
    nodes = sorted({*edges.pre_neuron.tolist(), *edges.post_neuron.tolist()})
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(_HEAD)
        file.writelines(f'<node id="{node}"/>\n' for node in nodes)
        file.writelines(
            f'<edge source="{pre}" target="{post}"><data key="count">{count}</data>'
            f'<data key="confidence_sum">{total!r}</data></edge>\n'
            for pre, post, count, total in _rows(edges)
        )
        file.write("</graph>\n</graphml>\n")


def write_edge_list(edges: pd.DataFrame, path: Path) -> None:
    """Write a line for each edge: pre neuron, post neuron, count, sum of confidences, with blanks between."""
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write("# pre_neuron post_neuron count confidence_sum\n")
        file.writelines(f"{pre} {post} {count} {total!r}\n" for pre, post, count, total in _rows(edges))


def _rows(edges: pd.DataFrame) -> "zip[tuple[int, int, int, float]]":
    columns = (edges[name].tolist() for name in ("pre_neuron", "post_neuron", "count"))
    return zip(*columns, edges.confidence_sum.astype(float).tolist(), strict=True)
