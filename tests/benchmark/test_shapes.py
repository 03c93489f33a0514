"""Which problems are measured."""

from __future__ import annotations

import pytest

from tiedfused.benchmark.bench import part_of, problems_of
from tiedfused.benchmark.shapes import LISTS, MEMORY_SWEEP, Shape, default_list, parse, parse_all


def test_an_unknown_shape_costs_only_itself() -> None:
    problems: list[str] = []
    assert parse_all(["8,16,32", "nope", "8, 16, 32", "1,2,3"], problems) == [Shape(8, 16, 32), Shape(1, 2, 3)]
    assert len(problems) == 1
    assert problems[0].startswith("shapes: got 'nope'; expected N,d,H, each at least 1, or one of gpu, ")


@pytest.mark.parametrize("text", ["0,8,8", "8,8", "8,8,8,8", "a,b,c", "-1,8,8", "", "8,8,8.5"])
def test_bad_shape(text: str) -> None:
    with pytest.raises(ValueError, match="expected N,d,H"):
        parse(text)


def test_operations_and_bytes() -> None:
    shape = Shape(2, 3, 5)
    assert [shape.flops(which) for which in ("fwd", "bwd", "step")] == [4 * 30, 8 * 30, 12 * 30]
    assert shape.bytes("fwd", 2) == 2 * (6 + 6 + 15)  # x, y, W
    assert shape.bytes("step", 2) == shape.bytes("fwd", 2) + shape.bytes("bwd", 2)


def test_parts_are_the_whole() -> None:
    shapes = LISTS["gpu"]
    parts = [problems_of(shapes, ["bfloat16"], [], f"{k}/3") for k in (1, 2, 3)]
    assert sorted(problem for part in parts for problem in part) == sorted(problems_of(shapes, ["bfloat16"], [], "1/1"))
    assert all(parts)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/"])
def test_bad_part(text: str) -> None:
    with pytest.raises(ValueError, match=f"part: got {text!r}"):
        part_of(text)


def test_few_rows_are_inference_unless_a_pass_is_asked_for() -> None:
    assert [which for _, _, which in problems_of([Shape(4, 8, 8)], ["float32"], [], "1/1")] == ["fwd"]
    assert [which for _, _, which in problems_of([Shape(4, 8, 8)], ["float32"], ["bwd"], "1/1")] == ["bwd"]
    assert [which for _, _, which in problems_of([Shape(99, 8, 8)], ["float32"], [], "1/1")] == ["fwd", "step"]


def test_lists() -> None:
    assert {default_list(device, quick) for device in ("cpu", "cuda") for quick in (True, False)} <= set(LISTS)
    for shapes in MEMORY_SWEEP.values():
        assert len({(n, d) for n, d, _ in shapes}) == 1
