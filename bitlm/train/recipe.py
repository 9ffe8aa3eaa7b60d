"""Settings of a recipe: its defaults, a profile, a file of the user's, KEY=VALUE, in this order.

A recipe is a Python file with a `run(settings, say)` and a TOML file of the same name beside it:

    task = "sst2"               a default; its type is the type of the setting
    [teacher]                   a table of settings, `teacher.lr` on the command line
    lr = 2e-5
    [profiles.small]            what a profile changes; the first profile is the default
    batch = 32
    [by_task.cola]              what holds where `task` is "cola"; also inside a profile
    epochs = 50
    [by_scheme.w1a1]            the same of a scheme, and of w1a1+estimators; also inside by_task

What it does not name is as in COMMON. A user's own TOML file names the recipe (`recipe = "glue"`),
may name a profile, and changes what it likes. Settings that do not exist are errors, and the
nearest name is suggested.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import inspect
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bitlm

from ..scheme import SchemeError

PROFILES, BY = "profiles", "by_"
OWN = ("recipe", "profile")  # keys of a user's file that are no settings


# What every recipe has, unless it says otherwise.
COMMON: dict[str, Any] = {
    "out": "",              # output folder, see `stages`
    "model": "",            # folder or hub id that the teacher is made from
    "student": "",          # dense model that the student is made from, or a checkpoint of a
                            # student to go on from; "": the teacher
    "data": "",             # file, folder of split files, or hub id
    "limit": 0,             # rows of training data; 0: all
    "scheme": "w1a8",       # w1a16, w1a8, w1.58a8, w1a1+estimators, ...; several with commas;
                            # "": only the teacher
    "weights": "tbt",       # how weights become codes, see `schemes.WEIGHTS`
    "placement": "tbt",     # which activations are rounded: tbt, bit, bipft, bivit, minmax
    "estimators": 0,        # rank of BiPFT's low-rank estimators; 0: none
    "estimator": "identity",  # of the gradient of codes, see `estimators.ESTIMATORS`
    "noise": False,         # FDA's learned noise, with estimator fda
    "embeddings": 0,        # bits of token embeddings: 1, 2 (ternary), 3 to 8; 0: dense
    "skip": [],             # regular expressions of weights that stay dense
    "fields": {},           # fields of the Scheme that differ, as {group_size = 64}
    "losses": [["task", 1.0]],  # [name, weight] or [name, weight, options], see `terms.KINDS`
    "lr": 1e-4,
    "quantizer_lr": 1e-4,   # of steps, moves and scales of quantizers (BiT); 0: as `lr`
    "epochs": 1.0,
    "steps": 0,             # in place of epochs
    "batch": 16,            # rows of one process
    "accumulate": 1,        # batches of one step
    "schedule": "linear",   # transformers' name of a learning rate schedule
    "warmup": 0.0,          # steps, below 1 the part of all steps
    "weight_decay": 0.0,
    "dropout": -1.0,        # of the students; negative: as in the model
    "seed": 0,
    "bf16": False,
    "checkpointing": False,  # recompute activations in the backward pass
    "grouped": True,        # batches of rows of similar length
    "log_every": 50,        # steps
    "save_every": 500,      # steps
    "eval_every": 0,        # steps; then the best checkpoint is kept; 0: only at the end
    "eval_limit": 0,        # rows to measure while it trains; 0: all
    "patience": 0,          # evaluations without a better score until it stops; 0: never
    "teacher": {"model": "", "lr": 2e-5, "epochs": 0.0, "steps": 0, "batch": 16, "accumulate": 1,
                "schedule": "linear", "warmup": 0.0, "weight_decay": 0.0},
}


class RecipeError(SchemeError):
    """A recipe or a setting that does not exist: the message says which do."""


@dataclass(frozen=True)
class Settings:
    """The layers of a recipe's settings, the weakest first.

    Each is a tree of values, with tables `by_KEY` of what holds where KEY has a value.
    """

    recipe: str
    profile: str
    layers: tuple[dict[str, Any], ...]

    def at(self, **fixed: Any) -> SimpleNamespace:
        """Return the settings as attributes, tables as namespaces, with some of them fixed.

        fixed: in place of what the layers say, as the scheme of one stage of several.
        """
        values = _plain(self.layers[0])
        choice = {key: fixed.get(key, [each[key] for each in self.layers if key in each][-1])
                  for key, value in values.items() if not isinstance(value, dict | list)}
        for layer in self.layers:
            _apply(values, layer, choice)
        _change(values, fixed)
        return _namespace(values)


def scheme_names(text: str) -> list[str]:
    """Return the schemes that a text names, each by its usual name: small letters, w1.58 for w2."""
    return [re.sub("^w2(?=a)", "w1.58", name.strip().lower()) for name in text.split(",")] \
        if text.strip() else []


def settings(path: Path, pairs: Iterable[str] = (), file: Path | None = None) -> Settings:
    """Return the settings of the recipe at `path`, a Python file with its TOML beside it.

    pairs: KEY=VALUE, `profile` among them. file: a user's TOML. Raises RecipeError for keys, values
    and profiles that do not exist, before anything is read or trained.
    """
    own = read_toml(path.with_suffix(".toml"))
    profiles = own.pop(PROFILES, {})
    _check({key: value for key, value in own.items() if key in COMMON}, COMMON, f"{path.stem}.toml")
    own, given = copy.deepcopy(COMMON), own
    _change(own, given)
    defaults = _plain(own)
    users = read_toml(file) if file else {}
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key:
            raise RecipeError(f"{pair!r} is no KEY=VALUE: the keys are {_names(defaults)}")
        if key == "profile":
            users["profile"] = text
        else:
            _put(arguments, key.split("."), _parsed(defaults, key, text))
    profile = users.pop("profile", None) or next(iter(profiles), "")
    users.pop("recipe", None)
    if profile and profile not in profiles:
        raise RecipeError(f"unknown profile {profile!r}" + _near(profile, profiles)
                          + f": {path.stem} has {', '.join(profiles) or 'none'}")
    layers = (own, profiles.get(profile, {}), users, arguments)
    _name_schemes(own)
    for layer, where in zip(layers[1:], (f"profile {profile}", str(file), "the arguments")):
        _check(layer, defaults, where)
        _name_schemes(layer)
    for key, table in own.items():
        if key.startswith(BY):
            for value, changes in table.items():
                _check(changes, defaults, f"{key}.{value}")
    return Settings(path.stem, profile, layers)


def find(name: str) -> tuple[Path, Path | None]:
    """Return the Python file of a recipe and the user's TOML file, None without one.

    name: of a recipe that comes with bitlm, a path to a recipe's Python file, or a path to a TOML
    file that names one. Raises RecipeError where there is none.
    """
    path = Path(name)
    if path.suffix == ".toml":
        asked = read_toml(path).get("recipe", "")
        if not asked or not isinstance(asked, str) or asked.endswith(".toml"):
            raise RecipeError(f"{path} does not say which recipe it is for: add recipe = "
                              f"\"NAME\", one of {', '.join(shipped())}")
        beside = path.parent / asked
        return (beside if asked.endswith(".py") and beside.is_file() else find(asked)[0]), path
    if path.suffix == ".py":
        if not path.is_file():
            raise RecipeError(f"no such file: {path}")
        return path, None
    known = shipped()
    if name not in known:
        raise RecipeError(f"unknown recipe {name!r}{_near(name, known)}: the recipes are "
                          f"{', '.join(known)}; or give a file, NAME.py or NAME.toml")
    return known[name], None


def shipped() -> dict[str, Path]:
    """Return the recipes that come with bitlm by name: in the package, else in the checkout."""
    places = [Path(place) / "recipes" for place in bitlm.__path__]
    places += [Path(bitlm.__file__).parent.parent / "recipes"]
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.glob("*.py")):
            if path.with_suffix(".toml").is_file():
                found.setdefault(path.stem, path)
    return found


def load(path: Path) -> ModuleType:
    """Return a recipe's module. Raises RecipeError where it has no function `run`."""
    spec = importlib.util.spec_from_file_location(f"bitlm_recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not inspect.isfunction(getattr(module, "run", None)):
        raise RecipeError(f"{path} is no recipe: it has no function run(settings)")
    return module


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's tables; RecipeError where it is missing or damaged."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"no such file: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no TOML file: {error}") from None


# --- trees ---------------------------------------------------------------------------------------

def _name_schemes(layer: dict[str, Any]) -> None:
    """Give the schemes that a layer names their usual names, in place."""
    if "scheme" in layer:
        layer["scheme"] = ",".join(scheme_names(layer["scheme"]))
    for key, value in layer.items():
        if key == BY + "scheme":
            layer[key] = {",".join(scheme_names(name)): own for name, own in value.items()}
        elif key.startswith(BY):
            for own in value.values():
                _name_schemes(own)


def _apply(values: dict[str, Any], layer: dict[str, Any], choice: dict[str, Any]) -> None:
    """Change values by a layer, then by its tables of the cases that hold."""
    _change(values, _plain(layer))
    for key, chosen in choice.items():
        cases = layer.get(BY + key, {})
        for name in dict.fromkeys((str(chosen).partition("+")[0], str(chosen))):
            if name in cases:
                _apply(values, cases[name], choice)


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a layer without its conditional tables."""
    return copy.deepcopy({key: value for key, value in tree.items()
                          if not key.startswith(BY) and key not in OWN})


def _change(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _change(values[key], value)
        else:
            values[key] = _as(values.get(key), value)


def _as(default: Any, value: Any) -> Any:
    """Return a whole number as the float that a setting is."""
    return float(value) if isinstance(default, float) and isinstance(value, int) else value


def _namespace(values: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{key: _namespace(value) if isinstance(value, dict) else value
                              for key, value in values.items()})


def plain(settings: SimpleNamespace) -> dict[str, Any]:
    """Return settings as JSON types."""
    return {key: plain(value) if isinstance(value, SimpleNamespace) else value
            for key, value in vars(settings).items()}


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _names(defaults: dict[str, Any], prefix: str = "") -> str:
    return ", ".join(_names(value, f"{prefix}{key}.") if isinstance(value, dict) and value
                     else prefix + key for key, value in defaults.items())


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f", did you mean {near[0]}?" if near else ""


def _instead(name: str, known: Iterable[str], all_of_them: str) -> str:
    """Return which setting was meant, or which there are."""
    return _near(name, known) or f": the settings are {all_of_them}"


def _check(changes: dict[str, Any], defaults: dict[str, Any], where: str, prefix: str = "") -> None:
    """Raise RecipeError for keys that have no default, and for values of another type."""
    for key, value in changes.items():
        if not prefix and key.startswith(BY) and key.removeprefix(BY) in defaults:
            for case, own in value.items():
                _check(own, defaults, f"{where}, {key}.{case}")
            continue
        name = prefix + key
        if key not in defaults:
            known = [prefix + each for each in defaults]
            raise RecipeError(f"{where}: unknown setting {name!r}"
                              + _instead(name, known, _names(defaults, prefix)))
        default = defaults[key]
        if default == {} and isinstance(value, dict):
            continue  # a free table, which is checked where it is used
        if isinstance(default, dict) and isinstance(value, dict):
            _check(value, default, where, f"{name}.")
        elif not _fits(default, value):
            raise RecipeError(f"{where}: {name} is {value!r}, it should be {_word(default)}")


def _fits(default: Any, value: Any) -> bool:
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _word(default: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text",
            list: "a list", dict: "a table"}[type(default)]


def _parsed(defaults: dict[str, Any], key: str, text: str) -> Any:
    """Return the VALUE of KEY=VALUE in the type that the setting has."""
    found: Any = defaults
    parts = key.split(".")
    for number, part in enumerate(parts):
        if found == {}:
            return _toml_value(text)
        if not isinstance(found, dict) or part not in found:
            known = [".".join([*parts[:number], each]) for each in
                     (found if isinstance(found, dict) else defaults)]
            raise RecipeError(f"unknown setting {key!r}{_instead(key, known, _names(defaults))}")
        found = found[part]
    value = text if isinstance(found, str) else _toml_value(text)
    if not _fits(found, value):
        raise RecipeError(f"{key}={text}: {text!r} is not {_word(found)}")
    return value


def _toml_value(text: str) -> Any:
    """Return what a text means as a TOML value; the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
