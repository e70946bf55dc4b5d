"""Random mutations of a valid configuration: each is one paragraph with exit code 2, in bounded time and memory."""

import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from zoscope import UsageError
from zoscope.config.load import build_checks, load_document

SECONDS = 3.0
MEGABYTES = 200
PER_KIND = 20

Mutation = Callable[[list[str], np.random.Generator], list[str]]


def keyed(lines: list[str]) -> list[int]:
    """Lines that are ``key: value`` with a key of zoscope's, outside of free text."""
    free = ("x-shared", "- name:", "name: a", "set:")
    return [i for i, line in enumerate(lines) if ":" in line and not line.strip().startswith(free)]


def pick(lines: list[str], rng: np.random.Generator) -> int:
    return int(rng.choice(keyed(lines)))


def replaced(lines: list[str], index: int, line: str) -> list[str]:
    return [*lines[:index], *line.split("\n"), *lines[index + 1 :]]


def with_value(lines: list[str], index: int, value: str) -> list[str]:
    key = lines[index].split(":", 1)[0]
    body = index + 1
    indent = len(lines[index]) - len(lines[index].lstrip())
    while body < len(lines) and (not lines[body].strip() or len(lines[body]) - len(lines[body].lstrip()) > indent):
        body += 1  # what stood below belongs to the value that is replaced
    return [*lines[:index], f"{key}: {value}", *lines[body:]]


def dropped(lines: list[str], rng: np.random.Generator) -> list[str]:
    starts = ("optimizer:", "lr:", "name: zo-gd", "problem:")
    needed = [i for i, line in enumerate(lines) if line.strip().startswith(starts)]
    return with_value(lines, int(rng.choice(needed)), "")


def misspelt(lines: list[str], rng: np.random.Generator) -> list[str]:
    index = pick(lines, rng)
    key = lines[index].split(":", 1)[0]
    at = len(key) - int(rng.integers(1, 3))
    return replaced(lines, index, key[:at] + str(rng.choice(list("qzj0"))) + lines[index][at:])


def wrongly_typed(lines: list[str], rng: np.random.Generator) -> list[str]:
    return with_value(lines, pick(lines, rng), str(rng.choice(["yes", "{aa: 1}", "[[1]]", "~", "[]", "[a, b, c]"])))


def huge(lines: list[str], rng: np.random.Generator) -> list[str]:
    values = ["9" * 3000, "1e999", ".inf", "-1e308", "'" + "x" * 50_000 + "'", "9" * 9000, "0x" + "f" * 900]
    return with_value(lines, pick(lines, rng), str(rng.choice(values)))


def unicode(lines: list[str], rng: np.random.Generator) -> list[str]:
    index = pick(lines, rng)
    strange = str(rng.choice(["ключ", "lr\u200b", "𝓵𝓻", "\u202eetar", "é́", "🙂", "\uff4cr"]))
    indent = " " * (len(lines[index]) - len(lines[index].lstrip()))
    return replaced(lines, index, f"{lines[index]}\n{indent}{strange}: {strange}")


def deep(lines: list[str], rng: np.random.Generator) -> list[str]:
    depth = int(rng.integers(40, 30_000))
    opening = str(rng.choice(["[", "{a: ", "[{b: "]))
    return with_value(lines, pick(lines, rng), opening * depth)


def deep_anchors(lines: list[str], rng: np.random.Generator) -> list[str]:
    depth = int(rng.integers(30, 200))
    chain = ["x-0: &n0 {aa: 1}"] + [f"x-{i}: &n{i} {{a: *n{i - 1}}}" for i in range(1, depth)]
    return [*chain, *lines]


def bomb(lines: list[str], rng: np.random.Generator) -> list[str]:
    width, depth = int(rng.integers(5, 30)), int(rng.integers(8, 60))
    rows = [f"x-0: &m0 [{', '.join(['lol'] * width)}]"]
    rows += [f"x-{i}: &m{i} [{', '.join([f'*m{i - 1}'] * width)}]" for i in range(1, depth)]
    merged = [f"x-m: &mm {{<<: [{', '.join(['*adam'] * 12)}]}}"] if rng.random() < 0.5 else []
    return [*rows, *lines, *merged]


def torn(lines: list[str], rng: np.random.Generator) -> list[str]:
    text = "\n".join(lines)
    at = int(rng.integers(0, len(text)))
    piece = str(rng.choice(["\x00", "\t\t- ", "}", "]]", "*none ", "%TAG !", "@", "`"]))
    return (text[:at] + piece + text[at:]).split("\n")


def redefined(lines: list[str], rng: np.random.Generator) -> list[str]:
    index = pick(lines, rng)
    indent = len(lines[index]) - len(lines[index].lstrip())
    return replaced(lines, index, f"{' ' * indent}{lines[index].split(':', 1)[0].strip()}: 1\n{lines[index]}")


MUTATIONS: list[Mutation] = [
    dropped, misspelt, wrongly_typed, huge, unicode, deep, deep_anchors, bomb, torn, redefined
]  # fmt: skip


def outcome(file: Path) -> str | None:
    """The error of a file; ``None`` when it is accepted. Anything but a usage error escapes."""
    try:
        build_checks(load_document(file))
    except UsageError as error:
        return str(error) if error.exit_code == 2 else f"exit code {error.exit_code}\n"
    return None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_broken_configuration_is_one_paragraph_in_bounded_time_and_memory(
    mutation: Mutation, valid: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(MUTATIONS.index(mutation))
    lines = valid.splitlines()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = []
    for _ in range(PER_KIND):
        file = tmp_path / "zoscope.yaml"
        text = "\n".join(mutation(lines, rng))
        file.write_text(text, encoding="utf-8")
        started = time.process_time()
        message = outcome(file)
        assert time.process_time() - started < SECONDS
        if message is None:
            accepted.append(text)
            continue
        assert "\n" not in message
        assert len(message) < 4000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024
    if mutation is torn:  # a tear can fall inside of a text or a comment
        assert len(accepted) < PER_KIND / 2
    else:
        assert not accepted, accepted[0]
