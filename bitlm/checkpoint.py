"""What stands in the files of a packed checkpoint, and whether it is what the plan asks for.

Only safetensors headers are read, so that a damaged file is found before anything is loaded:
transformers leaves uninitialised bytes where a packed tensor is missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from .modules import packed_weights
from .ops.bits import unpack_bits, unpack_trits
from .ops.form import Form, chains, check, damaged_columns, planes
from .plan import Entry
from .weight import PackedWeight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16,
    "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
SHOWN = 5

_TENSOR = re.compile(r"\.((?:plane|chain)\d+\.\w+|(?:low_rank|salient)\.\w+|shift|input_scales)$")
# Of the quantizers of a layer's input, of attention and, in training, of weights, and of
# attention's estimators.
_QUANTIZER = re.compile(r"\.(?:(?:input|quantizers\.(?:query|key|value|probabilities))\."
                        r"(?:step|move|minimum|initialised)|estimators\.\w+(?:\.\w+)?"
                        r"|quantizer\.(?:scales|second_scales|mask|codes|zeros|noise\.(?:down|up)))$")


class CheckpointError(ValueError):
    """A packed checkpoint that is damaged or does not fit its configuration."""


@dataclass(frozen=True)
class Header:
    """What a file says of one tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str


def checkpoint_files(directory: str | os.PathLike) -> list[str]:
    """Return the weight files of a checkpoint directory.

    Raises CheckpointError when there are none, or when the index is broken, names a missing shard
    or a file outside of the directory.
    """
    single, index = (os.path.join(directory, name) for name in (SINGLE, INDEX))
    if os.path.isfile(single):
        return [single]
    if not os.path.isfile(index):
        raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}: is this the "
                              "directory that `bitlm quantize` wrote?")
    try:
        with open(index, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}): download it again") from error
    for shard in shards:
        if not isinstance(shard, str) or os.path.basename(shard) != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is not a file of its directory")
        if not os.path.isfile(os.path.join(directory, shard)):
            raise CheckpointError(f"{index} names {shard}, which is missing: download it again")
    return [os.path.join(directory, shard) for shard in shards]


def read_headers(files: Iterable[str | os.PathLike]) -> dict[str, Header]:
    """Return the header of every tensor in safetensors files, without reading the tensors.

    Raises CheckpointError for a file that is missing, truncated or not in the format.
    """
    headers: dict[str, Header] = {}
    for path in map(os.fspath, files):
        for name, header in _read_file(path).items():
            if name in headers:
                raise CheckpointError(f"{name} stands both in {headers[name].file} and in {path}: "
                                      "these files do not belong together")
            headers[name] = header
    return headers


def _read_file(path: str) -> dict[str, Header]:
    if not path.endswith(".safetensors"):
        raise CheckpointError(f"{path} is no safetensors file: a packed checkpoint has only these")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise CheckpointError(f"{path} is truncated or no safetensors file (its header "
                                      f"would be {length} bytes of {size}): download it again")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        table = json.loads(text)
        table.pop("__metadata__", None)
        return {name: _header(entry, path, size - 8 - length) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, CheckpointError) else "its header is damaged"
        raise CheckpointError(f"{path}: {reason}: download it again") from error


def _header(entry: dict, path: str, size: int) -> Header:
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    start, end = entry["data_offsets"]
    numbers = [*shape, start, end]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError("a tensor has a negative size")
    if not start <= end <= size or end - start != prod(shape) * dtype.itemsize:
        raise CheckpointError("a tensor lies outside of the file (is it truncated?)")
    return Header(dtype, tuple(shape), path)


def split_name(key: str) -> tuple[str, str]:
    """Split "X.weight.plane0.signs" into the weight and its tensor; a dense name has no tensor."""
    match = _TENSOR.search(key)
    return (key[:match.start()], match[1]) if match else (key, "")


def of_quantizer(key: str) -> bool:
    """Tell whether a tensor belongs to a quantizer, or to estimators."""
    return bool(_QUANTIZER.search(key))


def check_quantizers(planned: Mapping[str, Tensor], found: Mapping[str, Header]) -> list[str]:
    """Return what is wrong with the tensors of quantizers in the files, one sentence each.

    planned: as they stand in the model. found: by the model's own names.
    """
    problems = [f"{name} is in the file, but config.json asks for no such quantizer"
                for name in found if name not in planned]
    for name, tensor in planned.items():
        header = found.get(name)
        if header is None:
            problems.append(f"{name} is missing")
        elif header.shape != tuple(tensor.shape) or header.dtype != tensor.dtype:
            has, wanted = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
                           for t in (header, tensor))
            problems.append(f"{name} is {has}, expected {wanted}")
    return problems


def verify(entries: Mapping[str, Entry], found: Mapping[str, Mapping[str, Header]],
           problems: Iterable[str] = ()) -> None:
    """Check that the files hold just the planned tensors, with the planned shapes and dtypes.

    found: for each weight the tensors in the files, by the model's own names and shapes (files may
    hold fused experts one by one; the caller has joined their headers). problems: what the caller
    noticed itself. Raises CheckpointError with the first few problems and what to do.
    """
    problems = list(problems)
    for name, entry in entries.items():
        tensors = found.get(name, {})
        if not tensors:
            problems.append(f"{name} is missing")
            continue
        wrong = check(entry.form, {n: h.shape for n, h in tensors.items()},
                      {n: h.dtype for n, h in tensors.items()})
        problems += [f"{name}.{text}" for text in wrong]
    problems += [f"{name}.{next(iter(tensors))} is in the file, but config.json leaves {name} dense"
                 for name, tensors in found.items() if name not in entries]
    raise_problems(problems)


def raise_problems(problems: list[str]) -> None:
    """Raise CheckpointError when there are problems."""
    if problems:
        more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError("the files of this checkpoint do not fit its config.json:\n  "
                              + "\n  ".join(problems[:SHOWN]) + more
                              + "\nDownload it again, or write it again.")


def deep_verify(directory: str | os.PathLike) -> list[str]:
    """Read a whole checkpoint and return what is wrong with it, one sentence each; [] when right.

    Loads it with transformers (`import bitlm` registers the quantizer), which checks the headers,
    then looks at every packed tensor: see `content_problems`.
    """
    import transformers

    try:
        read_headers(checkpoint_files(directory))
        config = transformers.AutoConfig.from_pretrained(directory)
        if not getattr(config, "quantization_config", None):
            return [f"{directory} is not packed: its config.json has no quantization_config"]
        architecture = getattr(transformers, (config.architectures or [""])[0], None)
        if architecture is None:
            return [f"transformers {transformers.__version__} does not know the architecture in "
                    f"config.json, {config.architectures}"]
        model = architecture.from_pretrained(directory)
    except (CheckpointError, OSError, RuntimeError, ValueError) as error:
        return [str(error)]
    problems = []
    for name, weight in packed_weights(model).items():
        problems += [f"{name}.{text}" for text in content_problems(weight)]
    return problems


def content_problems(weight: PackedWeight) -> list[str]:
    """Return what is wrong with the contents of a packed weight, as "tensor: sentence".

    Padding bits and digits are 0, sign bits are 0 where the mask is 0 and under salient entries,
    trits are below 243, floats are finite, column lists are sorted and in range, and salient
    values fit their bitmap.
    """
    form, tensors = weight.form, dict(weight.named_tensors())
    problems = [f"{name} has values that are not finite" for name, tensor in tensors.items()
                if tensor.is_floating_point() and not tensor.isfinite().all()]
    problems += damaged_columns(tensors, form.columns)
    if problems:
        return problems
    for plane in planes(form.names):
        own = {name.split(".")[1]: t for name, t in tensors.items()
               if name.startswith(f"plane{plane}.")}
        problems += [f"plane{plane}.{text}" for text in _plane_problems(own, tensors, form)]
    for chain in chains(form.names):
        rank = tensors[f"chain{chain}.right"].shape[-2]
        for leaf, width in (("left", rank), ("right", form.columns)):
            if _padding(tensors[f"chain{chain}.{leaf}"], width):
                problems.append(f"chain{chain}.{leaf} has padding bits that are not 0")
    if "salient.mask" in tensors:
        problems += _salient_problems(tensors, form)
    return problems


def _plane_problems(own: dict[str, Tensor], tensors: dict[str, Tensor], form: Form) -> list[str]:
    columns = own["columns"].shape[-1] if "columns" in own else form.columns
    problems = [f"{leaf} has padding bits that are not 0" for leaf in ("signs", "mask", "zones")
                if leaf in own and _padding(own[leaf], columns)]
    if "trits" in own:
        trits = own["trits"]
        if (trits >= 243).any():
            problems.append("trits has bytes above 242")
        elif (unpack_trits(trits, 5 * ceil(columns / 5))[..., columns:] != -1).any():
            problems.append("trits has padding digits that are not 0")
        return problems
    if "mask" in own and (own["signs"] & ~own["mask"]).any():
        problems.append("signs has bits set where the mask is 0")
    if "columns" not in own:
        for leaf in ("signs", "mask"):
            if leaf in own and _under_salient(own[leaf], tensors, form):
                problems.append(f"{leaf} has bits set under salient entries")
    return problems


def _under_salient(bits: Tensor, tensors: dict[str, Tensor], form: Form) -> bool:
    if "salient.mask" in tensors:
        return bool((bits & tensors["salient.mask"]).any())
    if "salient.columns" not in tensors:
        return False
    # One row of column numbers for each part, which is a slice of the rows.
    codes = unpack_bits(bits, form.columns).unflatten(-2, (form.parts, -1))
    columns = tensors["salient.columns"].long().unsqueeze(-2)
    return bool(codes.gather(-1, columns.expand(*codes.shape[:-1], -1)).any())


def _salient_problems(tensors: dict[str, Tensor], form: Form) -> list[str]:
    mask, values = tensors["salient.mask"], tensors["salient.values"]
    if _padding(mask, form.columns):
        return ["salient.mask has padding bits that are not 0"]
    counts = unpack_bits(mask, form.columns).unflatten(-2, (form.parts, -1)).sum((-1, -2))
    if (counts > values.shape[-1]).any():
        return [f"salient.mask has more bits set than the {values.shape[-1]} stored salient.values"]
    beyond = torch.arange(values.shape[-1]) >= counts.unsqueeze(-1)
    return ["salient.values is not 0 behind the last entry"] if values[beyond].any() else []


def _padding(bits: Tensor, columns: int) -> bool:
    spare = -columns % 8
    return bool(spare and (bits[..., -1] >> (8 - spare)).any())
