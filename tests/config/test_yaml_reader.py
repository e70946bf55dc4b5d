import time

import pytest

from zoscope.config.keys import plain
from zoscope.config.sources import MAX_BYTES, MAX_DEPTH, InvalidError, Node, read_yaml


def entry(tree: Node, name: str) -> Node:
    assert isinstance(tree.value, dict)
    found = tree.value[name]
    assert isinstance(found, Node)
    return found


def test_values_carry_the_line_of_their_key() -> None:
    tree = read_yaml("a: 1\nb:\n  c: 2\n  d:\n    - 3\n    - 4\n")
    assert entry(tree, "a").line == 1
    assert entry(entry(tree, "b"), "d").line == 4
    items = entry(entry(tree, "b"), "d").value
    assert isinstance(items, tuple)
    assert [item.line for item in items] == [5, 6]


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "1.0e-4", "0.0001", "1e-04", ".1e-3"])
def test_a_float_needs_no_dot_and_no_sign_in_its_exponent(text: str) -> None:
    assert entry(read_yaml(f"lr: {text}"), "lr").value == 1e-4


@pytest.mark.parametrize(
    ("text", "value"), [("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("0x1f", 31), ("1_000", 1000)]
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    assert entry(read_yaml(f"a: {text}"), "a").value == value


def test_merged_keys_yield_to_explicit_ones_and_keep_their_own_line() -> None:
    tree = read_yaml("base: &b\n  x: 1\n  y: 2\nuse:\n  <<: *b\n  y: 3\n")
    use = entry(tree, "use")
    assert plain(use) == {"x": 1, "y": 3}
    assert entry(use, "x").line == 2


def test_the_first_of_several_merged_mappings_wins() -> None:
    tree = read_yaml("a: &a {x: 1}\nb: &b {x: 2, y: 2}\nuse:\n  <<: [*a, *b]\n")
    assert plain(entry(tree, "use")) == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\na: 2\n", 2, "given twice"),
        ("a: [1,\nb: 2\n", 3, "not valid YAML.*begun in line 1"),
        ("a: *nowhere\n", 1, "undefined alias"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "a list"),
        ("a: !!python/name:os.system x\n", 1, "not allowed"),
        ("a: !!binary aGk=\n", 1, "not allowed"),
        ("? [1, 2]\n: 3\n", 1, "where a key is expected"),
        ("a: 1\n--- \nb: 2\n", 2, "not valid YAML"),
        ("a:\n\t- 1\n", 2, "not valid YAML"),
        (f"a: {'9' * 5000}\n", 1, "cannot be read as a number"),
        ("a: &a\n  b: *a\n", None, "contains itself"),
        ("a:\n  <<: 3\n", 2, "merges mappings"),
    ],
)
def test_what_cannot_be_used_is_reported_with_its_line(text: str, line: int | None, words: str) -> None:
    if words == "a list":
        # a tag on a collection builds nothing: it is a plain list
        assert plain(entry(read_yaml(text), "a")) == ["ls"]
        return
    with pytest.raises(InvalidError, match=words) as caught:
        read_yaml(text)
    (issue,) = caught.value.issues
    assert line is None or issue.line == line


def test_an_alias_bomb_is_refused_in_bounded_time() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    started = time.process_time()
    with pytest.raises(InvalidError, match="aliases are expanded"):
        read_yaml("\n".join(rows))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("text", ["[" * 50_000, "{a: " * 20_000, "- " * 50_000, "a: " + "[" * 30 + "]" * 30])
def test_deep_nesting_is_refused_before_it_recurses(text: str) -> None:
    with pytest.raises(InvalidError):
        read_yaml(text)


def test_nesting_within_the_limit_is_read() -> None:
    depth = MAX_DEPTH - 2
    read_yaml("a: " + "[" * depth + "]" * depth)


def test_a_file_over_the_size_limit_is_refused_unparsed() -> None:
    with pytest.raises(InvalidError, match="larger than"):
        read_yaml("a: " + "x" * MAX_BYTES)


def test_an_empty_document_is_an_empty_mapping() -> None:
    assert plain(read_yaml("# nothing\n")) == {}


@pytest.mark.parametrize("text", ["a: \x00", "a: \x07b", "\ud800: 1"])
def test_characters_that_yaml_does_not_allow_are_reported(text: str) -> None:
    with pytest.raises(InvalidError):
        read_yaml(text)
