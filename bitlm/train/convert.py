"""From a dense model to one in training, and on to a packed one: `prepare` and `finish`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention import Coverage as AttentionCoverage
from ..attention import attention_modules, install_attention, uninstall_attention
from ..methods import EncodeError
from ..modules import install, packed_weights
from ..placement import Placement
from ..placement import placement as known_placement
from ..plan import Entry, make_plan
from ..quantizers import ElasticQuantizer, quantizers
from ..quantizers import build as build_quantizer
from ..scheme import Scheme, SchemeError, Training
from ..targets import Skipped, Target, find
from ..weight import KeepsDtype
from .layers import FakeQuantLayer, Patch, fake_quant_layers, patch, unpatch
from .weights import LearnedScales, WeightQuantizer, quantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin as Configuration

FUSED = "fused experts have no fake-quant weights: they stay dense, also in the packed model"
READ = "its model reads the weight itself, past the layer that would fake-quantize it"
# Uses of a weight that are no product with it.
HARMLESS = r"(?!\.(?:dtype|device|shape|data|ndim|size|numel|requires_grad|is_\w+)\b)"


# --- dense -> in training ------------------------------------------------------------------------

def prepare(model: PreTrainedModel, scheme: str | Scheme | dict[str, Any] | Configuration, *,
            training: Training | dict[str, Any] | None = None,
            placement: tuple[str, int] | Placement | None = None, skip: Iterable[str] = (),
            overrides: dict[str, dict[str, Any]] | None = None,
            embeddings: int | Scheme | dict[str, Any] | None = None,
            hessians: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """Give a dense transformers model fake-quant weights, and quantizers, in place; return it.

    scheme: what each linear layer becomes: a preset's name, a Scheme or its dict; or a BitlmConfig,
    which may say what the other arguments say, but nothing twice. training: how the weights are
    trained. placement: the recipe (see placement.PLACEMENTS) and bits (1, 2, 8) of the quantizers
    of inputs and of attention; None: those that scheme or configuration have. skip, overrides,
    embeddings: see plan.Request. With embeddings a tied output head is quantized with
    its table; as TBT has it, dense and untied when packed, it is with skip ("lm_head",). hessians:
    [K, K] by the weights' names, for salience by Hessian.

    To transformers the model stays a dense one: it saves as a dense checkpoint with the tensors of
    the quantizers, which from_pretrained opens prepared again, and dense where there is no bitlm.
    What was not prepared, and why, tells `coverage`.

    Raises ValueError for a model that is prepared or packed already and for what plan, schemes or
    placement do not allow, EncodeError naming a weight that is not finite; the model is then as
    before.
    """
    _check_dense(model)
    asked = _asked(scheme, training=training, skip=list(skip), overrides=overrides,
                   embeddings=embeddings)
    asked = _without_untrainable(model, asked)
    if placement is not None:
        asked = _placed(model, asked, placement)
    config = _config(asked)
    request = config.request
    patches = patches_for(model, make_plan(model, request).entries, _training(config), hessians)
    try:
        install_attention(model, request.attention)
    except ValueError:
        uninstall_attention(model)
        raise
    for path, own in patches.items():
        patch(model.get_submodule(path), own)
    _attach(model, config)
    return model


def patches_for(model: nn.Module, entries: Iterable[Entry], training: Training,
                hessians: Mapping[str, Tensor] | None = None) -> dict[str, Patch]:
    """Return what `patch` gives the layers of planned weights, by the layers' names.

    Quantizers of weights are initialised, but for weights on the meta device.
    """
    entries, hessians, patches = list(entries), hessians or {}, {}
    strange = next((name for name in hessians if name not in {e.name for e in entries}), None)
    if strange is not None:
        raise ValueError(f"a Hessian is given for {strange}, which is no weight to prepare")
    for entry in entries:
        path, weight = entry.name.rpartition(".")[0], model.get_parameter(entry.name)
        if entry.target.tied:
            source = model.get_submodule(entry.target.tied.rpartition(".")[0])
            patches[path] = Patch(None, source=source)
            continue
        own = Patch(_weight_quantizer(entry, training, weight.device),
                    _input_quantizer(entry, weight.device))
        if not weight.is_meta:
            if not bool(weight.isfinite().all()):
                raise EncodeError(f"{entry.name} has NaN or infinite values: prepare a model whose "
                                  "weights are finite")
            matrix = weight.detach().T if entry.target.transposed else weight.detach()
            own.quantizer.initialise(matrix, hessians.get(entry.name))
        for module in (own.quantizer, own.input):
            if module is not None:
                module.train(model.get_submodule(path).training)
        patches[path] = own
    return patches


def _weight_quantizer(entry: Entry, training: Training, device: torch.device) -> WeightQuantizer:
    options: dict[str, Any] = {}
    if entry.target.role == "linear" and entry.scheme.method != "grid":
        options = vars(training)
    try:
        with torch.device(device):
            return quantizer(entry.scheme, (entry.target.rows, entry.target.columns),
                             name=entry.name, **options)
    except SchemeError as error:
        raise SchemeError(f"{entry.name} cannot be trained so: {error}") from None


def _input_quantizer(entry: Entry, device: torch.device) -> nn.Module | None:
    if entry.scheme.input is None:
        return None
    with torch.device(device):
        return build_quantizer(entry.scheme.input, entry.target.columns,
                               entry.name.removesuffix("weight") + "input")


def _check_dense(model: nn.Module) -> None:
    # Not at the top: bitlm is imported while transformers may be half imported.
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no transformers model: prepare the model "
                        "itself, before anything is wrapped around it")
    if fake_quant_layers(model):
        raise ValueError("this model is prepared already: to prepare it in another way, load the "
                         "dense model again")
    if packed_weights(model):
        raise ValueError("this model is packed, and packed weights do not train: prepare the dense "
                         "model")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError("this model is spread over devices by hooks: load it without device_map, "
                         "or open it with quantization_config of stage 'training'")


# --- the configuration ---------------------------------------------------------------------------

def _asked(scheme: str | Scheme | dict[str, Any] | Configuration, **given: Any) -> dict[str, Any]:
    """Return the keys of the configuration that is asked for."""
    plain = isinstance(scheme, str | Scheme | dict)
    asked = {"scheme": scheme, "quant_method": "bitlm"} if plain else scheme.to_dict()
    for key, value in given.items():
        if value is None or value in ([], {}):
            continue
        if asked.get(key):
            raise ValueError(f"{key} is in the configuration already: leave the argument out")
        asked[key] = value
    return asked | {"stage": "training"}


def _without_untrainable(model: nn.Module, asked: dict[str, Any]) -> dict[str, Any]:
    targets, _ = find(model, (), bool(asked.get("embeddings")))
    names = [target.name for target in targets if _untrainable(model, target)]
    if not names:
        return asked
    others = [name for name, _ in model.named_parameters() if name not in names]
    return asked | {"skip": [*asked.get("skip", ()), _pattern(names, others)]}


def _untrainable(model: nn.Module, target: Target) -> str:
    """Return why a weight cannot be trained by a fake-quant layer; "" for one that can."""
    if target.role == "experts":
        return FUSED
    path, _, child = target.name.removesuffix(".weight").rpartition(".")
    return READ if _reads_weight(type(model.get_submodule(path)), child) else ""


@cache
def _reads_weight(owner: type[nn.Module], child: str) -> bool:
    """Tell whether the code of a class uses the weight of a layer in it other than by calling that.

    As Mamba's mixers do.
    """
    try:
        code = inspect.getsource(owner)
    except (OSError, TypeError):  # made in a session: there is no file
        return False
    # But not: isinstance(self.wo.weight, ..., getattr(self.wo.weight, ..., zeros_(self.wo.weight)
    read = rf"(?<!isinstance\()(?<!getattr\()(?<!_\()\bself\.{child}\.weight\b{HARMLESS}"
    return bool(re.search(read, code))


def _placed(model: nn.Module, asked: dict[str, Any], placed: tuple[str, int] | Placement
            ) -> dict[str, Any]:
    """Add the quantizers of a placement to what is asked for."""
    if not isinstance(placed, Placement):
        placed = known_placement(*placed)
    request = _config(asked).request
    if request.attention or request.scheme.input:
        raise ValueError("the scheme or configuration has quantizers of activations already: leave "
                         "placement out")
    weights = [e.name for e in make_plan(model, request).entries if e.target.role == "linear"]
    asked = asked | {"scheme": request.scheme.replace(input=placed.inputs),
                     "overrides": placed.overrides(weights) | request.overrides}
    if attention_modules(model)[0]:
        asked["attention"] = placed.attention
    return asked


def _config(asked: dict[str, Any]) -> Configuration:
    # By its registry: bitlm.hf stands above this package, and has registered its configuration.
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(asked)


def _attach(model: PreTrainedModel, config: Configuration) -> None:
    """Let transformers know what the model is now."""
    from transformers.quantizers.auto import AutoHfQuantizer

    AutoHfQuantizer.from_config(config, pre_quantized=True).attach(model)


def _training(config: Configuration) -> Training:
    return Training.from_dict(config.training or {})


def _pattern(names: list[str], others: Iterable[str]) -> str:
    """Return a regular expression that finds these names and none of the others, if possible short.
    """
    text = "|".join(sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names}))
    if any(re.search(f"^(?:{text})$", other) for other in others):
        text = "|".join(map(re.escape, names))
    return f"^(?:{text})$"


# --- what a prepared model is --------------------------------------------------------------------

@dataclass(frozen=True)
class Coverage:
    """What of a model has fake-quant weights and rounded attention, and why the rest has not.

    prepared: scheme of each weight. skipped: the dense ones with the reason. attention: modules.
    """

    prepared: dict[str, Scheme]
    skipped: tuple[Skipped, ...]
    attention: AttentionCoverage


def coverage(model: PreTrainedModel) -> Coverage:
    """Return what of a prepared model trains quantized; raises ValueError for another model."""
    layers = _prepared(model)
    request = model.config.quantization_config.request
    prepared = {f"{path}.weight": own.weight_quantizer.scheme for path, own in layers.items()}
    with _as_dense(layers):
        targets, dense = find(model, (), request.embeddings is not None)
    skipped = [own for own in dense if not _is_quantizers(model, own.name)]
    for target in targets:
        if target.name not in prepared:
            cannot = _untrainable(model, target)
            found = next((p for p in request.skip if re.search(p, target.name)), "")
            skipped.append(Skipped(target.name, target.numel, cannot or f"skipped by {found!r}",
                                   loud=bool(cannot)))
    modules, others = attention_modules(model)
    others |= dict.fromkeys((name for name, own in modules.items()
                             if "quantizers" not in own._modules), "not asked for")
    installed = tuple(name for name in modules if name not in others)
    return Coverage(prepared, tuple(skipped), AttentionCoverage(installed, others))


@contextmanager
def _as_dense(layers: Mapping[str, FakeQuantLayer]) -> Iterator[None]:
    """Let layers be dense for a while."""
    taken = {layer: unpatch(layer) for layer in layers.values()}
    try:
        yield
    finally:
        for layer, own in taken.items():
            patch(layer, own)


def _is_quantizers(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), KeepsDtype)


def _prepared(model: nn.Module) -> dict[str, FakeQuantLayer]:
    layers = fake_quant_layers(model)
    if not layers:
        raise ValueError("this model is packed already" if packed_weights(model) else
                         "this model is not prepared: bitlm.train.prepare(model, scheme) does that")
    return layers


# --- while it trains -----------------------------------------------------------------------------

def set_parameter(model: PreTrainedModel, parameter: float) -> None:
    """Give the estimators of all weights a parameter, which is saved with the model.

    For schedules. Identities, of embeddings for instance, stay. Raises ValueError where there is
    nothing else.
    """
    found = [layer.weight_quantizer for layer in _prepared(model).values()
             if layer.weight_quantizer.estimator != "identity"]
    if not found:
        raise ValueError("all estimators of this model are the identity, which has no parameter")
    for own in found:
        own.parameter = parameter
    config = model.config.quantization_config
    config.training = replace(_training(config), parameter=parameter).to_dict()


def drop_second_basis(model: PreTrainedModel) -> None:
    """Go on with the first of two learned bases, as BinaryDM does for the last part of a training.

    Between two runs of a trainer: see LearnedScales.drop_second. Raises ValueError where no weight
    has two.
    """
    layers = _prepared(model)
    names = [f"{path}.weight" for path, layer in layers.items()
             if isinstance(layer.weight_quantizer, LearnedScales)
             and layer.weight_quantizer.second_scales is not None]
    if not names:
        raise ValueError("no weight of this model has two learned bases")
    for name in names:
        layers[name.removesuffix(".weight")].weight_quantizer.drop_second()
    others = [f"{path}.weight" for path in layers if f"{path}.weight" not in names]
    overrides = model.config.quantization_config.overrides
    overrides[_pattern(names, others)] = {"planes": 1}


# --- in training -> packed -----------------------------------------------------------------------

@torch.no_grad()
def finish(model: PreTrainedModel) -> PreTrainedModel:
    """Pack the weights of a prepared model as they were trained, in place; return it in eval mode.

    Its outputs are those that it had in eval mode, up to the order of sums. It is then like any
    packed model: it saves, generates, and loads with plain from_pretrained.

    Raises ValueError for a model that is not prepared or is sharded, RuntimeError naming a
    quantizer that saw no batch, EncodeError naming a weight that is not finite. The model is then
    as before.
    """
    layers = _prepared(model)
    unset = [name for name, own in quantizers(model).items()
             if isinstance(own, ElasticQuantizer) and not own.update_ready()]
    if unset:
        raise RuntimeError(f"{unset[0]} has no step yet: train the model first, or call "
                           "bitlm.quantizers.initialise with a batch")
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError("the parameters of this model are sharded: save it, load that with "
                         "from_pretrained, and finish the loaded one")
    packed = {path: layer.packed() for path, layer in layers.items() if layer.source is None}
    asked = model.config.quantization_config.to_dict()
    asked.pop("training", None)
    inputs = {path: unpatch(layer).input for path, layer in layers.items()}
    for path, weight in packed.items():
        install(model, f"{path}.weight", weight, inputs[path])
    _attach(model, _config(asked | {"stage": "packed"}))
    return model.eval()
