"""`BitlmConfig`: the `quantization_config` of a packed checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import __version__
from ..plan import Request
from ..scheme import (
    DEFAULT_PRESET,
    Attention,
    Quantizer,
    Scheme,
    Training,
    embedding_scheme,
    preset,
)

FORMAT_VERSION = 2  # what this version reads; a file says the lowest that can read it
STAGES = ("packed", "training")
KEYS = ("quant_method", "format_version", "stage", "scheme", "overrides", "skip", "embeddings",
        "producer", "source", "calibration", "metadata")
# Keys that are written only where they say something, for older readers do not know them.
LATER_KEYS = ("attention", "training")


class BitlmConfig(QuantizationConfigMixin):
    """How a whole model is packed, as it stands in config.json; every attribute is plain JSON.

    scheme: of every linear weight: a preset's name, a Scheme or its dict. overrides: regular
    expression -> scheme fields that differ where it is found in a weight's name, as a dict or as
    pairs; later ones win. skip: regular expressions of names that stay dense. embeddings: bits (1
    to 8) or scheme of token embeddings and output head; None leaves them dense. stage: "packed", or
    "training" for a dense checkpoint in quantization-aware training. producer, source, calibration:
    where the checkpoint comes from. metadata: free. activation: the mode of all layers, in place of
    what scheme and embeddings say. Given to `from_pretrained` of a packed checkpoint it is what
    takes effect, also over the overrides of the checkpoint; the rest of that configuration is
    ignored. attention: how attention rounds its operands: a scheme.Attention for all modules, or
    regular expression -> Attention, its dict or None for those in whose name it is found, as a dict
    or as pairs; later ones win. training: how weights are trained, a scheme.Training or its dict,
    for stage "training" only.

    Raises ValueError for unknown keys, for what no scheme may be, and for a checkpoint that needs a
    newer bitlm.
    """

    def __init__(
        self,
        scheme: str | Scheme | dict[str, Any] = DEFAULT_PRESET,
        overrides: dict[str, dict[str, Any]] | list[list[Any]] | None = None,
        skip: list[str] | tuple[str, ...] | None = None,
        embeddings: int | str | Scheme | dict[str, Any] | None = None,
        stage: str = "packed",
        format_version: int = FORMAT_VERSION,
        producer: str | None = None,
        source: str | None = None,
        calibration: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        activation: str | None = None,
        attention: Attention | dict[str, Any] | list[list[Any]] | None = None,
        training: Training | dict[str, Any] | None = None,
        quant_method: str = "bitlm",
        **unknown: Any,
    ) -> None:
        if not isinstance(format_version, int) or format_version < 1:
            raise ValueError(f"format_version is {format_version!r}: use a whole number from 1")
        if format_version > FORMAT_VERSION:
            raise ValueError(f"this checkpoint needs format version {format_version}, bitlm "
                             f"{__version__} reads up to {FORMAT_VERSION}: pip install -U bitlm")
        if unknown:
            raise ValueError(f"unknown key {next(iter(unknown))!r} in quantization_config: the "
                             f"keys are {', '.join(KEYS + LATER_KEYS)}; free notes go in metadata")
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}: use one of {', '.join(STAGES)}")
        if isinstance(skip, str):
            raise ValueError(f"skip is {skip!r}: use a list of regular expressions")
        self.quant_method = quant_method
        self.stage = stage
        self.scheme = _scheme(scheme).to_dict()
        self.overrides = {}
        self.skip = list(skip or ())
        self.embeddings = None if embeddings is None else _embeddings(embeddings).to_dict()
        self.producer = producer or f"bitlm {__version__}"
        self.source = source
        self.calibration = calibration
        self.metadata = metadata or {}
        if isinstance(attention, Attention):
            attention = {"": attention}
        self.attention = {pattern: _attention(value)
                          for pattern, value in dict(attention or {}).items()} or None
        if isinstance(training, dict):
            training = Training.from_dict(training)
        if training is not None and stage != "training":
            raise ValueError(f"training is {training}, but stage is {stage!r}: it is for stage "
                             "'training'")
        self.training = training.to_dict() if training else None
        self._activation = None
        self.activation = activation
        for pattern, changes in dict(overrides or {}).items():
            Scheme.from_dict(self.scheme).replace(**changes)
            self.overrides[pattern] = _plain(changes)

    @property
    def format_version(self) -> int:
        """The lowest version of the format that has all that the configuration says."""
        schemes = (self.scheme, self.embeddings or {}, *self.overrides.values())
        later = self.attention or self.stage == "training" or any("input" in s for s in schemes)
        return 2 if later else 1

    @property
    def activation(self) -> str | None:
        """The mode that was asked for all layers; None: as the scheme and its overrides say."""
        return self._activation

    @activation.setter
    def activation(self, mode: str | None) -> None:
        if mode is not None:
            self.set_activation(mode)
        self._activation = mode

    def set_activation(self, mode: str, pattern: str | None = None) -> None:
        """Change scheme, overrides and embeddings to a mode: see plan.Request.with_activation."""
        request = self.request.with_activation(mode, pattern)
        self.scheme, self.overrides = request.scheme.to_dict(), request.overrides
        self.embeddings = request.embeddings and request.embeddings.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a configuration given to `from_pretrained` changes of the checkpoint's."""
        return {} if self.activation is None else {"activation": self.activation}

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds: the mode stands in scheme, overrides and embeddings."""
        said = [key for key in LATER_KEYS if getattr(self, key)]
        found = {key: copy.deepcopy(getattr(self, key)) for key in (*KEYS, *said)}
        for key in found.keys() & {"overrides", "attention"}:
            # config.json is written with its keys sorted, and a later pattern wins: keep the order
            if list(found[key]) != sorted(found[key]):
                found[key] = [list(pair) for pair in found[key].items()]
        return found

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    @property
    def request(self) -> Request:
        """What the configuration asks of a model; with the model it makes the plan."""
        embeddings = None if self.embeddings is None else Scheme.from_dict(self.embeddings)
        attention = {pattern: None if value is None else Attention.from_dict(value)
                     for pattern, value in (self.attention or {}).items()}
        return Request(Scheme.from_dict(self.scheme), self.overrides, tuple(self.skip), embeddings,
                       attention)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as a dict would: transformers reads the config of a loaded model so."""
        return getattr(self, key, default)


def _scheme(value: str | Scheme | dict[str, Any]) -> Scheme:
    if isinstance(value, Scheme):
        return value
    return preset(value) if isinstance(value, str) else Scheme.from_dict(value)


def _plain(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an override as JSON types."""
    return {key: value.to_dict() if isinstance(value, Quantizer) else value
            for key, value in changes.items()}


def _attention(value: Attention | dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    if isinstance(value, Attention | dict):
        return (Attention.from_dict(value) if isinstance(value, dict) else value).to_dict()
    raise ValueError(f"attention is {value!r}: use an Attention, its dict or None, by patterns of "
                     "the modules' names")


def _embeddings(value: int | str | Scheme | dict[str, Any]) -> Scheme:
    if isinstance(value, bool):
        raise ValueError(f"embeddings is {value}: say how many bits, 1 to 8 (8 loses least)")
    return embedding_scheme(value) if isinstance(value, int) else _scheme(value)
