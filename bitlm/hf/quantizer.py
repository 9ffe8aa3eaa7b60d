"""The quantizer that transformers calls while it loads and saves packed models."""

from __future__ import annotations

import re
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    SplitModulelist,
    WeightConverter,
)
from transformers.quantizers.base import HfQuantizer

from ..attention import install_attention, uninstall_attention
from ..checkpoint import CheckpointError, of_quantizer, raise_problems, split_name
from ..methods.registry import statistics_needed
from ..modules import PackedLinear, install, packed_weights, uninstall
from ..ops.form import check
from ..packing import pack_weight
from ..plan import Entry, Request, make_plan
from ..quantizers import ElasticQuantizer, quantizers
from ..targets import EXPERT_LEAVES, Target
from . import skeleton
from .experts import use_packed_experts
from .order import put_dense_first
from .resizing import refuse_resizing
from .tying import install_twins, rewrite_tied_keys, submodels, tied_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BitlmQuantizer(HfQuantizer):
    """Loads packed checkpoints, packs dense ones while they load, and saves packed models.

    pre_quantized: the checkpoint is packed. Otherwise each planned weight is encoded as it arrives.

    In the training stage it prepares models in place of packing, and then leaves them: hf/training.
    """

    requires_calibration = False

    def __init__(self, quantization_config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.tensor_names: list[str] = []
        self.entries: dict[str, Entry] = {}  # planned and still dense, while packing on the fly
        self.sizes_known = True
        self.errors: list[str] = []
        self.offloads = False
        self.drawn: list[Entry] = []  # in training: planned, but not in the files

    @property
    def in_training(self) -> bool:
        return self.quantization_config.stage == "training"

    # What transformers asks ---------------------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of packed weights train; the weights themselves do not."""
        return True

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """The tensors that stand for a weight: transformers copies expert converters for them."""
        return {"weight": [f"weight.{name}" for name in self.tensor_names]}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        self.offloads = any(device not in (None, "cpu") for device in devices)
        if not self.pre_quantized and "disk" in devices:
            raise ValueError("a model cannot be packed while it is offloaded to disk: write a "
                             "packed checkpoint with `bitlm quantize`, then load that like this")

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any
                                 ) -> bool:
        if self.pre_quantized:
            # Waives transformers' shape check for a tensor whose size only the data knows.
            return not self.sizes_known and split_name(param_name)[1] == "salient.values"
        return param_name in self.entries

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        entry = None if self.pre_quantized else self.entries.get(param_name)
        return entry.nbytes() / param.numel() if entry else param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None
                      ) -> torch.dtype | None:
        # Stored scales keep their dtype, also where transformers keeps a module in float32 (T5).
        name = converter.target_patterns[0]
        if split_name(name)[1] or of_quantizer(name):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def get_quantize_ops(self) -> ConversionOps:
        return Encode(self)

    def update_weight_conversions(self, weight_conversions: list,
                                  model: PreTrainedModel | None = None) -> list:
        base = super().update_weight_conversions
        if "model" not in signature(base).parameters:
            return weight_conversions  # 5.17: its converters match the longer names untold
        return base(weight_conversions, model)

    def _process_model_before_weight_loading(self, model: PreTrainedModel,
                                             checkpoint_files: list[str] | None = None,
                                             **kwargs: Any) -> None:
        refuse_tensor_parallel(model)
        request = self.quantization_config.request
        if self.in_training:
            if self.pre_quantized:
                from . import training
                self.drawn = training.build(model, self.quantization_config, checkpoint_files)
            return
        if not self.pre_quantized:
            entries = make_plan(model, request).by_name()
            needy = [e for e in entries.values() if statistics_needed(e.scheme) != "none"]
            if needy:
                raise ValueError(
                    f"the scheme of {needy[0].name} needs calibration text, which loading has not: "
                    "use `bitlm quantize MODEL --calibrate FILE`, or a scheme without `compensate`")
            self.entries = entries
            return
        self.sizes_known = bool(checkpoint_files)
        found = skeleton.build(model, request, checkpoint_files)
        self.tensor_names = tensor_names(model)
        own = [re.escape(name.removeprefix(found.prefix[0])) for name in found.guards]
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()), *(rf"(^|\.){name}$" for name in own)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.errors:
            raise ValueError(f"{len(self.errors)} weights could not be packed:\n  "
                             + "\n  ".join(self.errors[:5]))
        refuse_tensor_parallel(model)
        if self.in_training:
            from . import training
            if self.pre_quantized:
                training.complete(model, self.quantization_config, self.drawn)
            else:
                training.prepare(model, self.quantization_config)
            return
        if self.pre_quantized:
            check_loaded(model)
        else:
            # What the dense checkpoint lacked was drawn anew after loading: pack that too.
            for name in list(self.entries):
                path, _, leaf = name.rpartition(".")
                self.pack(model, name, getattr(model.get_submodule(path), leaf))
            add_quantizers(model, self.quantization_config.request)
        self.finish(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict]:
        """Return the state dict with the guard: see `guard_name`."""
        refuse_squeezing(model)
        state = model.state_dict()
        guard = guard_name(model)
        if guard is not None:
            state[guard] = torch.empty(0, dtype=torch.uint8)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None
                    ) -> PreTrainedModel:
        for name in packed_weights(model):
            uninstall(model, name)
        uninstall_attention(model)
        return model.to(dtype) if dtype is not None else model

    # What it does ------------------------------------------------------------------------------

    @torch.no_grad()
    def pack(self, model: PreTrainedModel, name: str, dense: Tensor) -> list[str]:
        """Encode one planned weight and install it under all its tied names, which are returned."""
        entry = self.entries[name]
        packed = pack_weight(entry, dense)
        install(model, name, packed.weight)
        twins = install_twins(model, name, tuple(self.quantization_config.skip))
        rewrite_tied_keys(model)
        for other in (name, *twins):
            self.entries.pop(other, None)
        return [name, *twins]

    def finish(self, model: PreTrainedModel) -> None:
        """Bring a model whose packed weights are in place into the state of a loaded one."""
        freeze(model)
        for module in quantizers(model).values():
            if isinstance(module, ElasticQuantizer):
                module.update_ready()
        use_packed_experts(model)
        refuse_resizing(model)
        put_dense_first(model)
        self.tensor_names = tensor_names(model)
        if not self.offloads:  # kernels read another order, and torch.compile wants it there
            prepare(model)
        if not self.pre_quantized:
            self.pre_quantized = True
            set_conversions(self, model)

    def attach(self, model: PreTrainedModel) -> None:
        """Make a model that was packed in memory like one that `from_pretrained` returned.

        One that was prepared for training, if that is the stage.
        """
        if self.in_training:
            from . import training
            training.attach(model, self.quantization_config)
            return
        skip = tuple(self.quantization_config.skip)
        for name in packed_weights(model):
            if tied_group(model, name)[0] == name:
                install_twins(model, name, skip)
        rewrite_tied_keys(model)
        model.tie_weights(recompute_mapping=False)
        add_quantizers(model, self.quantization_config.request)
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        model.config.quantization_config = self.quantization_config
        for module in submodels(model):
            module.config._is_quantized = True
        self.finish(model)
        set_conversions(self, model)


class Encode(ConversionOps):
    """Packs the weights that transformers has just read, instead of putting them into the model."""

    def __init__(self, quantizer: BitlmQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "",
                model: PreTrainedModel | None = None, missing_keys: set[str] | None = None,
                **kwargs: Any) -> dict[str, Any]:
        rest = {}
        for name, value in input_dict.items():
            if name not in self.quantizer.entries:
                rest[name] = value
                continue
            dense = value[0] if isinstance(value, list) else value
            try:
                done = self.quantizer.pack(model, name, dense)
            except ValueError as error:
                # Raised here it would become a line of transformers' report: raised at the end.
                self.quantizer.errors.append(str(error))
                continue
            if missing_keys is not None:
                missing_keys.difference_update(done)
        return rest


def add_quantizers(model: PreTrainedModel, request: Request) -> None:
    """Give a model that was packed in memory the quantizers it lacks of those that are asked for.

    Raises ValueError for a layer that has another one.
    """
    head = model.get_output_embeddings()
    for name, weight in packed_weights(model).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, PackedLinear):
            continue
        target = Target(name, *weight.shape, "head" if layer is head else "linear", weight.dtype)
        entry = Entry(target, request.scheme_for(target))
        if layer.input is None:
            layer.input = skeleton.input_quantizer(entry, weight.device)
        elif layer.input.spec != entry.scheme.input:
            raise ValueError(f"{layer.input.name} is {layer.input.spec}, but the configuration "
                             f"asks for {entry.scheme.input}")
    install_attention(model, request.attention)


def freeze(model: nn.Module) -> None:
    """Keep gradients away from the stored tensors, and from the quantizers trained with them."""
    tensors = [p for weight in packed_weights(model).values() for p in weight.parameters()]
    for tensor in (*tensors, *skeleton.quantizer_tensors(model).values()):
        tensor.requires_grad_(False)


def prepare(model: nn.Module) -> None:
    """Prepare all packed weights that are on the CPU for its kernels.

    Raises CheckpointError naming the weight whose stored tensors are damaged.
    """
    for name, weight in packed_weights(model).items():
        try:
            weight.prepare()
        except ValueError as error:
            raise CheckpointError(f"{name}.{error}; the weight is damaged: write the checkpoint "
                                  "again, or download it again") from error


def tensor_names(model: nn.Module) -> list[str]:
    """Return the names of all packed tensors, those of experts first.

    transformers decides by the first name alone whether it copies an expert converter.
    """
    packed = packed_weights(model).values()
    ordered = sorted(packed, key=lambda weight: not weight.form.experts)
    return list(dict.fromkeys(name for weight in ordered for name in weight.form.names))


def guard_name(model: PreTrainedModel) -> str | None:
    """Return the dense name under which the guard against loading without bitlm is saved.

    There transformers finds a tensor of length 0 in the place of a weight and raises, where it
    would otherwise go on with random weights. It stands at the first packed linear layer; experts
    that a converter collects would break over it.
    """
    converters = [conversion.reverse_transform() for conversion in model._weight_conversions or ()
                  if isinstance(conversion, WeightConverter)]
    packed = packed_weights(model)
    names = sorted(packed, key=lambda n: (n.rpartition(".")[2] in EXPERT_LEAVES,
                                          isinstance(model.get_submodule(n.rpartition(".")[0]),
                                                     nn.Embedding)))
    for name in names:
        if not any(converter.rename_source_key(name)[1] for converter in converters):
            return name
    # Only experts are packed, and all are kept one by one: a name that no converter takes on the
    # way out but one does on the way in.
    for converter in converters:
        for name in names:
            renamed, pattern = converter.rename_source_key(name)
            if pattern:
                return renamed.replace("*", "0")
    return None


def check_loaded(model: PreTrainedModel) -> None:
    """Raise CheckpointError for packed tensors that no file gave or whose sizes do not add up."""
    problems = []
    for name, weight in packed_weights(model).items():
        tensors = dict(weight.named_tensors())
        # transformers marks what it has loaded. What it will fetch from disk is still on meta.
        problems += [f"{name}.{tensor} was not loaded" for tensor, value in tensors.items()
                     if not value.is_meta and not getattr(value, "_is_hf_initialized", False)]
        problems += [f"{name}.{text}" for text in check(
            weight.form, {n: tuple(t.shape) for n, t in tensors.items()},
            {n: t.dtype for n, t in tensors.items()})]
    problems += [f"{name} was not loaded"
                 for name, value in skeleton.quantizer_tensors(model).items()
                 if not value.is_meta and not getattr(value, "_is_hf_initialized", False)]
    raise_problems(problems)


def set_conversions(quantizer: BitlmQuantizer, model: PreTrainedModel) -> None:
    """Give a model whose weights were packed after loading the converters that save them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # As transformers does for a model that was not loaded: a prefix is not known to be there.
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    model._weight_conversions = quantizer.update_weight_conversions(conversions, model)


def refuse_squeezing(model: PreTrainedModel) -> None:
    """Raise where transformers, before 5.23, would drop axes of length 1 from experts it saves."""
    split = SplitModulelist(dim=0).convert({"x": torch.zeros(1, 1, 2)}, ["x"], ["y.*"])
    apart = any(isinstance(entry, WeightConverter) for entry in model._weight_conversions or ())
    thin = [name for name, weight in packed_weights(model).items() if weight.form.experts
            and any(1 in tensor.shape[1:] for _, tensor in weight.named_tensors())]
    if split["y.0"].shape != (1, 2) and apart and thin:
        raise RuntimeError(f"this transformers would save {thin[0]} in a wrong shape: "
                           'pip install -U "transformers>=5.23"')


def refuse_tensor_parallel(model: PreTrainedModel) -> None:
    """Raise for `tp_plan`: packed weights cannot be split over devices in this version."""
    plan = getattr(getattr(model.config, "distributed_config", None), "tp_plan", None)
    if plan is not None or getattr(model, "_tp_size", None) is not None:
        raise ValueError("bitlm has no tensor parallelism: leave tp_plan out and use "
                         'device_map="auto" to spread the layers over devices')
