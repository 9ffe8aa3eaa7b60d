"""What the data-free encoders must give, in plain Python loops written from the formulas.

Every value that is stored is rounded to its stored type; the rest is computed in double precision.
"""

import math
import struct


def half(value):
    return struct.unpack("e", struct.pack("e", value))[0]


def single(value):
    return struct.unpack("f", struct.pack("f", value))[0]


ROUND = {"float16": half, "float32": single}


def sign(value):
    return 1 if value >= 0 else -1


def average(values, counts):
    return math.fsum(v * c for v, c in zip(values, counts, strict=True)) / max(sum(counts), 1)


def binary_order(rest, counts, center, levels):
    cut = average(rest, counts) if center == "threshold" else 0
    return average([abs(r) for r in rest], counts), [sign(r - cut) for r in rest]


def ternary_order(rest, counts, center, levels):
    size = average([abs(r) for r in rest], counts)
    scale, cut = {"tbt": (4 / 3 * size, 2 / 3 * size), "absmean": (size, size / 2),
                  "twn": (None, 0.7 * size)}[levels]
    if levels == "twn":
        beyond = [abs(r) > cut for r in rest]
        scale = average([abs(r) for r in rest], beyond)
        return scale, [sign(r) * b for r, b in zip(rest, beyond, strict=True)]
    return scale, None


def group(values, counts, scheme):
    """Return what one group becomes."""
    to = ROUND[scheme.scale_dtype]
    if scheme.method == "grid":
        return grid(values, scheme, to)
    order = ternary_order if scheme.method == "ternary" else binary_order
    rest, total, parts = list(values), 0, [0] * len(values)
    for plane in range(scheme.planes):
        if scheme.center == "shift":
            before, total = total, to(total + average(rest, counts))
            rest = [r - (total - before) for r in rest]
        elif scheme.center == "drop" and plane == 0:
            middle = average(rest, counts)
            rest = [r - middle for r in rest]
        scale, codes = order(rest, counts, scheme.center, scheme.levels)
        scale = to(scale)
        if codes is None:  # zero up to half the level
            codes = [sign(r) * (abs(r) > scale / 2) for r in rest]
        rest = [r - scale * c for r, c in zip(rest, codes, strict=True)]
        parts = [p + scale * c for p, c in zip(parts, codes, strict=True)]
    return [p + total for p in parts]


def grid(values, scheme, to):
    count = 2 ** scheme.planes
    low, high = min(values), max(values)
    shift = to((low + high) / 2) if scheme.center == "shift" else 0
    half_range = (high - low) / 2 if scheme.center == "shift" else max(high, -low)
    top = to(half_range / (2 - 2 ** (1 - scheme.planes)))
    levels = [shift + top * 2 ** (1 - scheme.planes) * (2 * q - count + 1) for q in range(count)]
    return [min(levels, key=lambda level: abs(level - v)) for v in values]


def encode(rows, scheme, counts=None):
    """Return the dense weight that `rows` (a list of lists) becomes, salient entries aside."""
    counts = counts or [[1] * len(row) for row in rows]
    if scheme.group_size == "tensor":
        flat = group(sum(rows, []), sum(counts, []), scheme)
        width = len(rows[0])
        return [flat[i:i + width] for i in range(0, len(flat), width)]
    size = scheme.columns_per_scale(len(rows[0]))
    result = []
    for row, count in zip(rows, counts, strict=True):
        parts = [group(row[a:a + size], count[a:a + size], scheme)
                 for a in range(0, len(row), size)]
        result.append(sum(parts, []))
    return result
