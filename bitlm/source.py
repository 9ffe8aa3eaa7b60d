"""The dense model to start from: its files, its skeleton, its weights mapped, its tokenizer."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import nn

from . import checkpoint
from .targets import is_fused_experts

log = logging.getLogger("bitlm")

# What of a model's folder belongs to a packed copy of it besides config and weights.
COMPANIONS = ("tokenizer*", "vocab*", "*.spm", "*.codes", "normalizer.json", "[0-9]_*/*",
              "additional_chat_templates/*", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "spiece.model", "sentencepiece*", "*.tiktoken",
              "chat_template*", "preprocessor_config.json", "processor_config.json",
              "generation_config.json", "modules.json", "sentence_bert_config.json",
              "config_sentence_transformers.json", "LICENSE*")


class SourceError(ValueError):
    """A model that cannot be read: the message names the file and the next step."""


def resolve(model: str | os.PathLike, revision: str | None = None) -> Path:
    """Return the local folder of a model: a path that exists, else the hub's copy, downloaded.

    Raises SourceError for a path or id that cannot be had.
    """
    path = Path(model)
    if path.is_dir():
        return path
    text = str(model)
    if path.exists():
        raise SourceError(f"{text} is a file: give the folder that holds config.json")
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise SourceError(f"{text} does not exist: give a model folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *COMPANIONS]
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=wanted))
    except HFValidationError:
        raise SourceError(f"{text} is neither a folder here nor a valid hub id") from None
    except HfHubHTTPError as error:
        raise SourceError(f"no folder {text} here, and the hub says: "
                          f"{str(error).splitlines()[0]}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise SourceError(f"no folder {text} here, and the hub cannot be reached "
                          f"({type(error).__name__}): check the name, the network, or "
                          "HF_HUB_OFFLINE") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors shards of a model folder.

    Raises SourceError where there is only pickle, CheckpointError where files are missing.
    """
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors*")):
        raise SourceError(f"{folder} holds its weights as pickle ({pickles[0]}), which is never "
                          "read: convert it to safetensors first (load it with transformers, "
                          "save_pretrained)")
    return [Path(name) for name in checkpoint.checkpoint_files(folder)]


def read_config(folder: Path):
    """Return the transformers config of a dense model folder.

    Raises SourceError for a missing, broken or unknown config, and for a quantized model.
    """
    from transformers import AutoConfig
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no config.json: is it a model folder?")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{folder / 'config.json'} cannot be read: "
                          f"{str(error).strip().splitlines()[0]}") from None
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        known = quantized if isinstance(quantized, dict) else quantized.to_dict()
        how = known.get("quant_method")
        raise SourceError(f"{folder} is already quantized ({how}): start from the dense model")
    return config


def model_class(config) -> type[nn.Module]:
    """Return the transformers class that a config names, AutoModel's choice if it names none."""
    import transformers
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    try:
        return transformers.AutoModel._model_mapping[type(config)]
    except KeyError:
        raise SourceError(f"transformers {transformers.__version__} has no model for "
                          f"{config.model_type!r}") from None


def skeleton(config, dtype: torch.dtype) -> nn.Module:
    """Return the model on the meta device, without memory, in `dtype`."""
    with torch.device("meta"):
        return model_class(config)._from_config(config, dtype=dtype)


def stored_dtype(headers: dict) -> torch.dtype:
    """Return the float dtype that most bytes of a checkpoint have."""
    sizes: dict[torch.dtype, int] = {}
    for header in headers.values():
        if header.dtype.is_floating_point:
            size = prod(header.shape) * header.dtype.itemsize
            sizes[header.dtype] = sizes.get(header.dtype, 0) + size
    return max(sizes, key=sizes.get) if sizes else torch.float32


def load(folder: Path, config) -> nn.Module:
    """Return the dense model with its weights mapped from the files: memory only as it is touched.

    Raises SourceError when planned weights are missing from the files.
    """
    cls = model_class(config)
    with torch.device("meta"):
        fused = any(is_fused_experts(module) for module in cls._from_config(config).modules())
    # One dtype for plan and model, also where the config names another than the files have.
    dtype = stored_dtype(read_headers(folder))
    with quiet():
        options = {"dtype": dtype, "output_loading_info": True, "local_files_only": True}
        if not fused:
            model, info = cls.from_pretrained(folder, **options)
        else:
            # transformers joins the experts of such checkpoints into new tensors: on disk, here.
            scratch = tempfile.TemporaryDirectory(prefix="bitlm-experts-")
            model, info = cls.from_pretrained(folder, device_map={"": "disk"},
                                              offload_folder=scratch.name, **options)
            _map_offloaded(model)
            model.bitlm_scratch = scratch  # lives as long as the mapped tensors
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(f"{folder} lacks {missing[0]}"
                          + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
                          + f" of {cls.__name__}: the checkpoint is not complete")
    return model.eval().requires_grad_(False)


def _map_offloaded(model: nn.Module) -> None:
    """Replace accelerate's offload hooks by the mapped tensors that they would load."""
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if isinstance(each, AlignDevicesHook) and each.offload:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if parameter.is_meta:
                        module._parameters[name] = nn.Parameter(each.weights_map[name],
                                                                requires_grad=False)
                for name, buffer in list(module.named_buffers(recurse=False)):
                    if buffer.is_meta:
                        module._buffers[name] = each.weights_map[name]
        if hook is not None:
            remove_hook_from_module(module)
    del model.hf_device_map
    model.tie_weights()


def has_device(device: str) -> bool:
    """Tell whether tensors can be on a device, as torch names it."""
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def nbytes(headers: dict) -> int:
    """Return the bytes of all tensors in checkpoint headers."""
    return sum(prod(header.shape) * header.dtype.itemsize for header in headers.values())


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and advice while the context lasts."""
    from transformers.utils import logging as theirs
    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    offload = logging.getLogger("accelerate.big_modeling")
    own = offload.level
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    offload.setLevel(logging.ERROR)
    try:
        yield
    finally:
        offload.setLevel(own)
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def fingerprint(folder: Path, files: list[Path]) -> str:
    """Return a hash of the config, the shards' headers and samples of their data.

    Cheap for large models, and different for any model that was retrained or replaced.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, 1 << 26)))
            for part in range(16):
                file.seek(size * part // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()


def read_headers(folder: Path) -> dict:
    """Return checkpoint.read_headers of the model's shards."""
    return checkpoint.read_headers(weight_files(folder))


def tokenizer(folder: Path):
    """Return the tokenizer of a model folder, None if it has none."""
    if not any(next(folder.glob(p), None) for p in ("tokenizer*", "vocab*", "spiece.model")):
        return None
    from transformers import AutoTokenizer
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise SourceError(f"the tokenizer in {folder} cannot be read: "
                                     f"{str(error).strip().splitlines()[0]}") from None
