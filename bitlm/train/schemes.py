"""What a student becomes, by short names: w1a16, w1a8, w1.58a8, w1a1, w1a1+estimators, ..."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

from ..placement import Placement
from ..placement import placement as placement_named
from ..scheme import Scheme, Training, embedding_scheme
from ..targets import compile_pattern
from .estimators import estimator
from .recipe import RecipeError, plain, scheme_names
from .weights import quantizer

# How weights become codes, by the name of the rule and the bits of a weight.
WEIGHTS: dict[str, dict[str, tuple[Scheme, Training]]] = {
    # Statistics of each row: TBT's released form, arXiv 2306.01841.
    "tbt": {"1": (Scheme(group_size="row"), Training()),
            "1.58": (Scheme(method="ternary", group_size="row"), Training())},
    # What TBT is compared with: BWN and TWN.
    "baseline": {"1": (Scheme(group_size="row", center="threshold"), Training()),
                 "1.58": (Scheme(method="ternary", group_size="row", levels="twn"), Training())},
    # One scale for each matrix: BiT and BiPFT, arXiv 2205.13016 and 2312.08937.
    "bit": {"1": (Scheme(group_size="tensor", center="threshold"), Training())},
    # Learned scales of rows: BiViT, arXiv 2211.07091.
    "learned": {"1": (Scheme(group_size="row", center="threshold"), Training(learned=True)),
                "1.58": (Scheme(method="ternary", group_size="row"), Training(learned=True))},
    # Two learned bases: BinaryDM, arXiv 2404.05662.
    "two_bases": {"1": (Scheme(group_size="row", planes=2), Training(learned=True))},
    # Frozen salient weights: PB-LLM, arXiv 2310.00034.
    "pb_llm": {"1": (Scheme(method="salient", salient=0.1, group_size="row"), Training())},
}
# Of token embeddings by bits, one scale a row (TBT); other numbers are uniform grids.
EMBEDDINGS: dict[int, Scheme | None] = {
    0: None, 1: Scheme(group_size="row"), 2: Scheme(method="ternary", group_size="row")}
_SCHEME = re.compile(r"w(1|1\.58)a(1|2|8|16)(\+estimators)?")


@dataclass(frozen=True)
class Request:
    """What one stage asks of its student: arguments of `prepare`."""

    scheme: Scheme
    training: Training
    placement: Placement | None
    embeddings: Scheme | int | None


def request(settings: SimpleNamespace) -> Request:
    """Return what `settings.scheme` (w1a8, w1.58a8, w1a1+estimators, ...) and the settings beside
    it ask for; raises RecipeError and SchemeError for what no layer could be trained with.
    """
    match = _SCHEME.fullmatch(",".join(scheme_names(settings.scheme)))
    if not match:
        raise RecipeError(f"unknown scheme {settings.scheme!r}: use wXaY with X 1 or 1.58 and Y 1, "
                          "2, 8 or 16, w1a1+estimators for BiPFT's estimators, and commas for "
                          "several one after the other")
    bits = match[1]
    if settings.weights not in WEIGHTS:
        raise RecipeError(f"unknown weights {settings.weights!r}: use one of {', '.join(WEIGHTS)}")
    if bits not in WEIGHTS[settings.weights]:
        raise RecipeError(f"weights {settings.weights} has no form with {bits} bits: use one of "
                          f"{', '.join(name for name, own in WEIGHTS.items() if bits in own)}")
    scheme, training = WEIGHTS[settings.weights][bits]
    changes = plain(settings.fields)
    estimator(settings.estimator)
    training = replace(training, estimator=settings.estimator, noise=settings.noise)
    found = None
    if match[2] != "16":
        found = placement_named(settings.placement, int(match[2]))
        rank = settings.estimators or (1 if match[3] else 0)
        found = replace(found, attention=replace(found.attention, estimators=rank))
    elif match[3] or settings.estimators:
        raise RecipeError("estimators correct what rounding activations loses: W1A16 rounds none")
    embeddings = EMBEDDINGS.get(settings.embeddings, settings.embeddings)
    if isinstance(embeddings, int):
        embedding_scheme(embeddings)
    scheme = scheme.replace(**changes)
    quantizer(scheme, (8, 128), **vars(training))  # a weight like those to come
    for pattern in settings.skip:
        compile_pattern(pattern)
    return Request(scheme, training, found, embeddings)
