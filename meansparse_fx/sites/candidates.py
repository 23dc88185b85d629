"""Floor 2: where an operator could stand in a graph, before anything is known of channels or reasons.

Every call of a known activation; both ends of residual branches where the placement asks for them; and the places
of operators that a published checkpoint brought along. Imports `ops`, `plan`, `residual` and `shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from ..activations import ActivationCall
from ..errors import SiteError, StateError
from ..rewrite import operand
from .ops import Operators, below
from .plan import Placement
from .residual import Residual, residuals
from .shapes import Flow


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A place for an operator.

    Attributes:
        node: The activation's call, the addition, or the published operator.
        kind: As of a `Site`.
        path: Its name before repeats are counted.
        source: What the operator reads.
        call: The activation.
        inside: The activation calls in a residual branch.
        published: The published operator that stands here.
        reader: What alone reads a residual sum.
        unpublished: The model has published operators, but none here.
    """

    node: fx.Node
    kind: str
    path: str
    source: fx.Node
    call: ActivationCall | None = None
    inside: tuple[fx.Node, ...] = ()
    published: fx.Node | None = None
    reader: fx.Node | None = None
    unpublished: bool = False


def find_candidates(
    graph: fx.Graph, operators: Operators, flow: Flow, data: set[fx.Node], placement: Placement
) -> list[Candidate]:
    """Return the candidates in graph order; of residual connections all, so that names do not depend on the placement.

    Raises:
        SiteError: A placement is given for a model that holds published operators.
        StateError: One of those was left in the middle of its calibration.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    calls = {node: call for node in order if (call := operators.activation(node)) is not None}
    found = [Candidate(n, "activation", operators.label(n), operators.source(n), call) for n, call in calls.items()]
    holders = {node: holder for node in order if (holder := operators.published(node)) is not None}
    if unfinished := [operators.label(node) for node, holder in holders.items() if holder.calibrating]:
        raise StateError(
            f"{unfinished[0]} is being calibrated: set flag_update_statistics to 0 where it is 1, or calibrate the base"
        )
    published = list(holders)
    if published and replace(placement, channel_dims={}) != Placement():
        raise SiteError(
            f"the model holds {len(published)} published operators, which are its placement: leave placement out, or "
            "transform the base model"
        )
    connections = residuals(graph, operators, flow, data)
    for residual in connections:
        total, branch, inside = residual.total, residual.branch, residual.activations
        path, reader = operators.enclosing(total), operators.reader(total)
        found += [
            Candidate(total, "residual_branch", below(path, "residual_branch"), branch, inside=inside),
            Candidate(total, "residual_sum", below(path, "residual_sum"), total, inside=inside, reader=reader),
        ]
    if published:
        found = _taken_over(published, found, connections, operators)
    return sorted(found, key=lambda c: order[c.node])


def _taken_over(
    published: list[fx.Node], candidates: list[Candidate], connections: list[Residual], operators: Operators
) -> list[Candidate]:
    """Return the candidates with the published operators at theirs, and one more for each that stands at none."""
    places = {(c.node, c.kind): i for i, c in enumerate(candidates)}
    found = [replace(c, unpublished=True) for c in candidates]
    for node in published:
        place = _place(node, connections, operators)
        index = -1 if place is None else places.get(place, -1)
        if index < 0 or found[index].published is not None:
            found.append(Candidate(node, "published", operators.label(node), operand(node), published=node))
        else:
            found[index] = replace(found[index], source=operand(node), published=node, unpublished=False)
    return found


def _place(node: fx.Node, connections: list[Residual], operators: Operators) -> tuple[fx.Node, str] | None:
    """Return the candidate whose values a published operator gets: its node and kind."""
    reader: fx.Node | None = operators.reader(node)
    value = node
    if reader is not None and operators.activation(reader) is not None:
        return reader, "activation"
    branches = {(r.total, r.branch) for r in connections}
    while reader is not None and (reader, value) not in branches and operators.moves_only(reader):
        value, reader = reader, operators.reader(reader)
    if reader is not None and (reader, value) in branches:
        return reader, "residual_branch"
    totals = {r.total for r in connections}
    source = operand(node)
    while source not in totals and operators.moves_only(source) and operators.reader(source) is not None:
        source = source.all_input_nodes[0]
    return (source, "residual_sum") if source in totals else None
