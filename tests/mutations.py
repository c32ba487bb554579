"""Mutations of a good file, content that made parsers fall, and a reader held to ten seconds."""

import copy
import math
import os
import signal

from plumbing.errors import UserError

ABSURD = [None, True, False, -1, 0, 3, 0.5, 1e308, math.nan, math.inf, -(2**70), "", "x", "1155"]
ABSURD += ["../../..", "\0", "\ud800", "a" * 300, [], {}, [[]], [None] * 3, {"a": {}}, [1, 2, 3, 4]]
ABSURD += ["images/000.jpg", [[1, 2], [3]], {"id": 1}, ["x"] * 17]


class Hangs(BaseException):
    """No reader may catch this one."""


def in_ten_seconds(read, *arguments):
    """→ None, or the one line of a refusal. Anything else than UserError passes through."""

    def alarm(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(10)
    try:
        read(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and 10 < len(str(error)) < 2000, str(error)
        return str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value, way=()):
    """Ways to every node of a JSON document."""
    yield way
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from places(inner, (*way, key))


def mutated(document, rng):
    """One to three changes at random places: another value, an entry removed or doubled."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        ways = [way for way in places(document) if way]
        if not ways:
            return rng.choice(ABSURD)
        way = rng.choice(ways)
        holder = document
        for key in way[:-1]:
            holder = holder[key]
        kind = rng.random()
        if kind < 0.7:
            holder[way[-1]] = copy.deepcopy(rng.choice(ABSURD))
        elif kind < 0.85:
            del holder[way[-1]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[way[-1]]))
        else:
            holder[f"{way[-1]}x"] = holder.pop(way[-1])
    return document


def spoilt_bytes(content, rng):
    """One damage of a file's bytes: cut, NULs, noise, doubled, another encoding."""
    at = rng.randrange(1, max(2, len(content)))
    damages = [content[:at], content[:at] + bytes(64) + content[at + 64 :], content + content]
    noise = bytes(rng.randrange(256) for _ in range(8))
    damages += [content[:at] + noise + content[at + 8 :], noise + content, b"", bytes(100)]
    damages += [b"\xff\xfe" + content, content[at:]]
    return rng.choice(damages)


# Content that made parsers fall: nesting, integers without end, keys twice, other encodings.
TEXTS = [b"", b"null", b"[]", b"{}", b"3", b'"text"', b"[" * 100_000, b'{"a":' * 100_000]
TEXTS += [b"1" * 5000, b'{"images": ' + b"9" * 5000 + b"}", b"\x00" * 64, b"\xff\xfe{\x00}\x00"]
TEXTS += [
    '{"images": 1}'.encode("utf-16"),
    b"- " * 20_000,
    b"&a [*a, *a]",
    b"? {a: 1}",
    b"!!set {a}",
]
TEXTS += [b"!!python/object/apply:os.system [false]", b"a: b: c", b"\t", b"%YAML 9", b"{a: [1, 2"]


def unusual_paths(folder):
    """Paths that are no regular file, and one that is not there."""
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "empty").touch()
    names = ["fifo", "zero", "loop", "empty", "absent", "absent/deeper", "x" * 300]
    return [folder / name for name in names]


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*"))
