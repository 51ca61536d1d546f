"""Which blocks are distilled, and which student block each of them trains."""

from __future__ import annotations

from collections.abc import Sequence

from singer.errors import SingerError


def default_layers(depth: int) -> list[int]:
    """Return the layers to distil when none are named: three quarters of the depth, and the last.

    For a depth of 24 these are 17 and 23, the paper's.
    """
    last = depth - 1
    return sorted({max(round(depth * 3 / 4) - 1, 0), last})


def resolve_layers(layers: Sequence[int] | None, depth: int, name: str) -> list[int]:
    """Check layer indices, counting negative ones from the end.

    Args:
        layers: block indices; None: :func:`default_layers`.
        depth: number of blocks.
        name: the configuration key, for messages.

    Returns:
        The indices, from 0, in ascending order.

    Raises:
        SingerError: an index is out of range or named twice, or there is none.
    """
    if layers is None:
        return default_layers(depth)
    if not layers:
        raise SingerError(f"{name}: got no layer, expected at least one block index")
    for layer in layers:
        if not -depth <= layer < depth:
            raise SingerError(
                f"{name}: got {layer}, expected {-depth} to {depth - 1}: "
                f"the model has {depth} blocks"
            )
    resolved = sorted(layer % depth for layer in layers)
    if len(set(resolved)) < len(resolved):
        raise SingerError(f"{name}: got {list(layers)}, which names a block twice")
    return resolved


def match_layers(layers: Sequence[int], teacher_depth: int, student_depth: int) -> list[int]:
    """Match teacher blocks to student blocks by relative depth, one to one and in order.

    The last teacher layer always trains the last student block. (The authors' matching leaves that
    block untrained when teacher and student are equally deep.)

    Args:
        layers: the teacher's block indices, from 0, ascending.
        teacher_depth: number of the teacher's blocks.
        student_depth: number of the student's blocks.

    Returns:
        The student's block indices, from 0, strictly ascending.

    Raises:
        SingerError: there are more layers than student blocks.
    """
    if len(layers) > student_depth:
        raise SingerError(
            f"method.layers: got {len(layers)} layers, expected at most {student_depth}, "
            f"the number of the student's blocks"
        )
    matched: list[int] = []
    following = student_depth  # the match of the layer after this one
    for remaining, layer in reversed(list(enumerate(layers))):
        nearest = round((layer + 1) / teacher_depth * student_depth) - 1
        if not matched:
            nearest = student_depth - 1
        # Below the next match, and with a block left for each of the layers before this one.
        following = max(min(nearest, following - 1), remaining)
        matched.append(following)
    return matched[::-1]
