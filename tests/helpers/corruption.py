"""Random damage to files: bytes flipped, cut, moved or made huge; values in JSON replaced by odd ones."""

import copy
import json

ODD = [
    None, True, False, -1, 0, 1, 2, 3, 7, 10**9, 2**31 - 1, 2**31, 2**63, 10**30, 0.0, 0.5, -0.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", "x", "a\nb", "\u0000", "../x", [], [1], ["x"], [[]], {}, {"a": 1}, {"type": "x"},
]  # fmt: skip


def damaged(rng, whole, end):
    """A copy of the bytes `whole`, damaged in one way before byte `end`."""
    data, at = bytearray(whole), rng.randrange(end)
    match rng.randrange(8):
        case 0:
            return bytes(data[: rng.randrange(len(data))])
        case 1:
            del data[at : at + rng.choice([1, 8, 100])]
        case 2:
            data[at:at] = data[at : at + rng.choice([1, 8, 100])]
        case 3:
            data[at : at + 8] = rng.choice([2**63, 2**40, 2**31, 10**6, 0]).to_bytes(8, "little")
        case 4:
            for _ in range(5):
                data[rng.randrange(end)] = rng.randrange(256)
        case _:
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def places(value, path=()):
    """The paths of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in inner for p in places(v, (*path, key)))]


def odd(rng, value):
    """A JSON value with one or two things in it replaced or taken out."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 2])):
        path = rng.choice(places(value))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if rng.random() < 0.15:
            del holder[path[-1]]
        else:
            # A copy: the second change may be inside of it, and ODD is for all.
            holder[path[-1]] = copy.deepcopy(rng.choice(ODD))
    return value
