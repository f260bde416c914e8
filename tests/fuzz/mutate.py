"""What goes wrong with files and values: seeded changes to JSON, bytes and Python arguments."""

import copy
import json
import random
from typing import Any


class Raw:
    """JSON text that `dumps` writes as it stands: what no Python value spells."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self):
        return f"Raw({self.text[:30]!r}, {len(self.text)})"


STRINGS = (
    *("", " ", "\n", "\0", "nan", "None", "true", "-1", "auto", "0.5", "[1]", "{}", "%s{}"),
    *("float32", "float64", "float16", "bfloat16", "int8", "llama", "gpt2", "hard", "dense"),
    *("../x", "/etc/passwd", "~", "~/x", ".", "..", "a/b/c", "owner/name@main", "/dev/zero"),
    *("\x1b[31mred\r", "\ud800", "日本語", "é" * 300, "x" * 5000, "a\nb\nc", "<s>", "</s>"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 64, 97, 259, 1000, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64),
    *(-(2**31), -(2**63), 10**9, 10**30, 0.0, -0.0, 0.5, 1.5, -0.5, 1e-5, 1e-320, 1e38, 1e300),
)
RAW = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "-" + "1" * 5000),
    *("[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "\\", "", "nul", "1,"),
)


def dumps(value: Any) -> str:
    """JSON with the text of each `Raw` in its place."""
    raws: list[str] = []

    def keep(raw: Raw) -> str:
        raws.append(raw.text)
        return f"@@{len(raws) - 1}@@"

    text = json.dumps(value, default=keep)
    for i, raw in enumerate(raws):
        text = text.replace(f'"@@{i}@@"', raw)
    return text


def value(rng: random.Random) -> Any:
    """A JSON value of any kind, often an unlikely one."""
    kinds = (
        lambda: rng.choice((None, True, False)),
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(STRINGS),
        lambda: Raw(rng.choice(RAW)),
        lambda: [value(rng) for _ in range(rng.choice((0, 1, 2, 3)))],
        lambda: {rng.choice(STRINGS): value(rng) for _ in range(rng.choice((0, 1, 2)))},
        lambda: [1] * rng.choice((10, 100_000)),
    )
    return rng.choice((*kinds[:3], *kinds))()


def nudge(rng: random.Random, old: Any) -> Any:
    """A value near `old`: another number, another text, wrapped, or of the next type."""
    if isinstance(old, bool) or old is None:
        return rng.choice((None, True, False, 0, 1, "true"))
    if isinstance(old, int | float):
        near = (old + 1, old - 1, old * 2, -old, old / 2, float(old), str(old), old * 10**6)
        return rng.choice((*near, [old], 0, True, None))
    if isinstance(old, str):
        return rng.choice((old + "x", old[:-1], old.upper(), [old], old * 2, f" {old}", None, 0))
    if isinstance(old, list | tuple):
        old = list(old)
        turned = (old[::-1], old[1:], old + old, old + [None], [old], {}, rng.sample(old, len(old)))
        return rng.choice(turned)
    if isinstance(old, dict):
        return rng.choice((list(old.items()), {}, [old], dict(list(old.items())[1:]), None))
    return value(rng)


def paths(tree: Any, limit: int = 4000) -> list[tuple]:
    """The places in nested dicts and lists, outer ones first."""
    found: list[tuple] = []
    todo: list[tuple[tuple, Any]] = [((), tree)]
    while todo and len(found) < limit:
        path, node = todo.pop(0)
        keys = (
            node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        )
        for key in keys:
            found.append((*path, key))
            todo.append(((*path, key), node[key]))
    return found


def tree(rng: random.Random, original: dict, donor: dict | None = None) -> tuple[dict, str]:
    """A changed copy of a JSON object, and what was changed.

    One to three edits; `donor` is another object whose keys may be taken over.
    """
    changed, told = copy.deepcopy(original), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = paths(changed)
        edit = rng.choice(("set", "set", "nudge", "nudge", "delete", "add", "donate", "swap"))
        if not places or edit == "add":
            key, new = rng.choice(STRINGS), value(rng)
            changed[key] = new
            told.append(f"add {key[:20]!r}: {str(new)[:60]}")
            continue
        if edit == "donate" and donor:
            key = rng.choice(list(donor))
            changed[key] = copy.deepcopy(donor[key])
            told.append(f"take {key}: {str(donor[key])[:60]}")
            continue
        # Few of the places lie near the root, where most of the meaning is.
        near = [place for place in places if len(place) <= 2]
        *outer, last = rng.choice(near if rng.random() < 0.6 else places)
        node = changed
        for key in outer:
            node = node[key]
        where = ".".join(map(str, [*outer, last]))[:60]
        if edit == "delete":
            del node[last]
            told.append(f"delete {where}")
        elif edit == "swap":
            other = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node[last], node[other] = node[other], node[last]
            told.append(f"swap {where} and {other}")
        else:
            new = value(rng) if edit == "set" else nudge(rng, node[last])
            node[last] = new
            told.append(f"{where}={str(new)[:60]}")
    return changed, "; ".join(told)


def json_text(rng: random.Random, original: dict, donor: dict | None = None) -> tuple[bytes, str]:
    """The file of a changed object; now and then a key twice, or the bytes themselves are hurt."""
    how = rng.random()
    if how < 0.08:
        return blob(rng, json.dumps(original).encode())
    changed, told = tree(rng, original, donor)
    text = dumps(changed)
    if how < 0.16 and changed:
        key, new = rng.choice(list(changed)), value(rng)
        text = "{" + f"{json.dumps(key)}: {dumps(new)}, " + text[1:]
        if rng.random() < 0.5:
            text = text[:-1] + f", {json.dumps(key)}: {dumps(new)}" + "}"
        told += f"; twice {key[:20]!r}"
    if how > 0.97:
        codec = rng.choice(("utf-16", "utf-8-sig", "utf-32"))
        return text.encode(codec), f"{told}; as {codec}"
    return text.encode(), told


def blob(rng: random.Random, data: bytes, most: int | None = None) -> tuple[bytes, str]:
    """Changed bytes, and what was changed; within the first `most`, if given."""
    end = min(len(data), most or len(data))
    at = rng.randrange(end + 1)
    some = rng.choice((1, 2, 8, 100))
    new = bytes(rng.randrange(256) for _ in range(some))
    edits = {
        "cut at": data[:at],
        "cut out at": data[:at] + data[at + some :],
        "insert at": data[:at] + new + data[at:],
        "overwrite at": data[:at] + new + data[at + some :],
        "repeat at": data[:at] + data[at : at + some] + data[at:],
        "flip at": data[:at] + bytes(b ^ (1 << rng.randrange(8)) for b in data[at : at + 1])
        + data[at + 1 :],
        "append after": data + new,
    }  # fmt: skip
    edit = rng.choice(list(edits))
    return edits[edit], f"{edit} {at} of {len(data)} ({some})"


def safetensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A changed safetensors file: its length field, header, a tensor's entry, or bytes."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = rng.choice(("length", "bytes", "header", "entry", "entry", "entry", "names", "body"))
    if how == "length":
        other = rng.choice(
            (0, 1, length - 1, length + 1, 2**20, 2**31, 2**63, 2**64 - 1, len(data))
        )
        return other.to_bytes(8, "little") + data[8:], f"length field {other} for {length}"
    if how == "bytes":
        return blob(rng, data, 8 + length)
    if how == "body":
        at = rng.randrange(len(body))
        bits = bytes(rng.choice((b"\x7f\xc0", b"\xff\x7f", b"\xff\xff", b"\x80\x7f", b"\x00\x00")))
        changed = body[: at & ~3] + bits * 2 + body[(at & ~3) + 4 :]
        return data[: 8 + length] + changed, f"body at {at & ~3}: {bits.hex()}"
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if how == "header":
        header, told = tree(rng, header)
    elif how == "names":
        other = rng.choice((*names, *STRINGS, f"model.{name}", f"_orig_mod.{name}", f"{name}.x"))
        header[other] = header.pop(name)
        told = f"{name} named {other[:40]}"
    else:
        entry = header[name]
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        field, new = rng.choice((
            ("dtype", rng.choice(("F64", "F16", "BF16", "I8", "I32", "BOOL", "F8_E4M3", "U16", 7))),
            ("shape", rng.choice((shape[::-1], [*shape, 1], shape[1:], [], [0], [-1], [2**62, 4]))),
            ("shape", value(rng)),
            ("data_offsets", rng.choice(([end, start], [0, 0], [start, end + 4], [start + 4, end],
                                         [0, 2**63], [-4, end], [start], [0, len(body)]))),
            ("data_offsets", value(rng)),
        ))  # fmt: skip
        entry[field] = new
        told = f"{name}.{field}={str(new)[:60]}"
    text = dumps(header).encode()
    if rng.random() < 0.1:
        text = b'{"' + name.encode() + b'": ' + dumps(header.get(name)).encode() + b", " + text[1:]
        told += "; the name twice"
    return len(text).to_bytes(8, "little") + text + body, told
