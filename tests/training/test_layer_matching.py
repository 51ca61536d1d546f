"""Which teacher blocks are distilled, and which student blocks they train."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from singer.errors import SingerError
from singer.models.layer_matching import default_layers, match_layers, resolve_layers

depths = st.integers(1, 48)


@st.composite
def teacher_layers(draw, most=None):
    """Draw a teacher's depth, some of its layers, and a depth of a student that has enough."""
    depth = draw(depths)
    layers = draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=most))
    return depth, sorted(layers), draw(st.integers(len(layers), 48))


# --- default layers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(24, [17, 23]), (12, [8, 11]), (1, [0]), (2, [1]), (3, [1, 2]), (4, [2, 3]), (40, [29, 39])],
)
def test_default_layers(depth, layers):
    assert default_layers(depth) == layers


@settings(deadline=None)
@given(depths)
def test_default_layers_are_valid_and_end_with_the_last_block(depth):
    layers = default_layers(depth)
    assert layers[-1] == depth - 1
    assert layers == sorted(set(layers))
    assert 1 <= len(layers) <= 2
    assert layers[0] >= 0
    # Half a block off three quarters of the depth, at most: it is rounded to a whole block.
    assert abs((layers[0] + 1) - Fraction(3 * depth, 4)) <= Fraction(1, 2)


# --- resolving ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [8, 11]),
        ([11], [11]),
        ([-1], [11]),
        ([-12], [0]),
        ([0], [0]),
        ([11, 3], [3, 11]),
        ((-1, -4), [8, 11]),
        ([5, -2, 0], [0, 5, 10]),
    ],
)
def test_layers_are_counted_from_either_end_and_sorted(layers, expected):
    assert resolve_layers(layers, 12, "method.layers") == expected


@pytest.mark.parametrize("layers", [[3, 3], [-1, 11], [11, -1], [0, 5, -12]])
def test_a_layer_named_twice_is_refused(layers):
    with pytest.raises(SingerError, match=r"method\.layers: .*names a block twice") as caught:
        resolve_layers(layers, 12, "method.layers")
    assert str(layers) in str(caught.value)


@pytest.mark.parametrize("wrong", [12, 100, -13])
def test_a_layer_out_of_range_is_refused(wrong):
    with pytest.raises(SingerError, match=rf"^key: got {wrong}, expected -12 to 11: .*12 blocks"):
        resolve_layers([0, wrong], 12, "key")


def test_no_layer_at_all_is_refused():
    with pytest.raises(SingerError, match=r"^key: got no layer"):
        resolve_layers([], 12, "key")


def test_the_callers_list_is_not_changed():
    layers = [-1, 0]
    resolve_layers(layers, 12, "key")
    assert layers == [-1, 0]


# --- matching -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "teacher_depth", "student_depth", "expected"),
    [
        ([17, 23], 24, 12, [8, 11]),  # the paper's ViT-L, and a ViT-S
        ([8, 11], 12, 12, [8, 11]),
        ([8, 11], 12, 24, [17, 23]),
        ([17, 23], 24, 2, [0, 1]),
        ([17, 23], 24, 3, [1, 2]),
        ([23], 24, 1, [0]),
        ([0], 24, 12, [11]),  # one layer: the last student block must be trained
        ([20, 21, 22, 23], 24, 4, [0, 1, 2, 3]),  # all would be the last
        ([0, 1, 2, 3], 24, 4, [0, 1, 2, 3]),  # all but the last would be the first
    ],
)
def test_layers_are_matched_by_relative_depth(layers, teacher_depth, student_depth, expected):
    assert match_layers(layers, teacher_depth, student_depth) == expected


@settings(deadline=None)
@given(teacher_layers())
def test_the_match_is_one_to_one_in_order_and_ends_with_the_last_block(case):
    depth, layers, student_depth = case
    matched = match_layers(layers, depth, student_depth)
    assert len(matched) == len(layers)
    assert matched == sorted(set(matched))
    assert matched[0] >= 0
    assert matched[-1] == student_depth - 1


@settings(deadline=None)
@given(depths, st.data())
def test_equal_depths_match_each_block_with_itself(depth, data):
    before = data.draw(st.sets(st.integers(0, depth - 1)))
    layers = sorted(before | {depth - 1})
    assert match_layers(layers, depth, depth) == layers
    assert match_layers(default_layers(depth), depth, depth) == default_layers(depth)


@settings(deadline=None)
@given(teacher_layers())
def test_a_layer_is_matched_to_the_nearest_relative_depth(case):
    """Unless the student's block is taken by a later layer, or is needed for an earlier one."""
    depth, layers, student_depth = case
    matched = match_layers(layers, depth, student_depth)
    for index, layer in enumerate(layers[:-1]):
        found = matched[index]
        free = range(index, matched[index + 1])
        assert found in free
        target = Fraction((layer + 1) * student_depth, depth) - 1
        assert abs(found - target) == min(abs(block - target) for block in free)


def test_more_layers_than_student_blocks_are_refused():
    with pytest.raises(SingerError, match=r"method\.layers: got 3 layers, expected at most 2"):
        match_layers([0, 1, 2], 3, 2)
