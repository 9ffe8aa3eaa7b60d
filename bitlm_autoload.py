"""Registers bitlm with transformers as soon as that is there, without loading either.

`import bitlm` uses this, and so does `import torch` where bitlm is installed: an entry point of
the group `torch.backends` names `hook`, so that packed checkpoints open without `import bitlm`.
The module stands outside of the package because torch is half imported when it calls the hook, and
cannot be imported if the hook cannot: so this file is copied into every installation, editable ones
too (pyproject.toml), and does without the package when that is gone.
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns the hook off.
"""

from __future__ import annotations

import sys

REGISTRY = "transformers.quantizers.auto"
# The modules after which registering is tried. The registry is enough, unless it was being imported
# when the watcher came, because it had itself imported torch: then the others follow.
WATCHED = (REGISTRY, "transformers.modeling_utils", "transformers.models.auto.auto_factory")
_warned: list[Exception] = []  # Registering is tried again and again, but complains once.


class Watcher:
    """An import finder that finds nothing itself but tries `register` after watched modules."""

    def find_spec(self, name, path=None, target=None):
        late = name.startswith("transformers.") and _ready(REGISTRY)
        if not late and name not in WATCHED:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                _try_after(spec.loader)
                return spec
        return None


def _try_after(loader) -> None:
    """Make a loader try to register once its module has run."""
    run = getattr(loader, "exec_module", None)

    def exec_module(module):
        run(module)
        vars(loader).pop("exec_module", None)  # Gone already where modules share a loader.
        if _watching() and _settled(module.__name__):
            register()

    if run is not None and isinstance(getattr(loader, "__dict__", None), dict):  # not a class
        loader.exec_module = exec_module


def _ready(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _settled(finished: str = "") -> bool:
    """Tell whether the registry and torch, which `bitlm.hf` imports, are wholly imported.

    finished: a module that has run but does not look it yet.
    """
    return _ready("torch") and (finished == REGISTRY or _ready(REGISTRY))


def install() -> None:
    """Register now if transformers' registry is loaded, else once it is."""
    if not (_settled() and register()):
        watch()


def _watching() -> bool:
    return any(isinstance(finder, Watcher) for finder in sys.meta_path)


def watch() -> None:
    """Put the watcher in front of the import finders, once."""
    if not _watching():
        sys.meta_path.insert(0, Watcher())


def unwatch() -> None:
    """Take the watcher away."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Watcher)]


def register() -> bool:
    """Register bitlm with transformers and take the watcher away; tell whether it was possible.

    Never raises: an installation whose package is gone must not break transformers.
    """
    if "bitlm.hf" in sys.modules and not _ready("bitlm.hf"):
        return False  # It is being imported, has itself brought transformers in, and registers.
    try:
        import bitlm.hf

        bitlm.hf.register()
    except Exception as error:
        if _is_gone(error):
            unwatch()
        elif not _warned:
            _warned.append(error)
            _logger().warning("bitlm is not registered with transformers: %r", error)
        return False
    unwatch()
    return True


def _is_gone(error: Exception) -> bool:
    """Tell whether the package itself was not found: uninstalled, or its checkout moved away.

    The finder of an editable installation then names a file that is not there.
    """
    if isinstance(error, ModuleNotFoundError):
        return error.name in ("bitlm", "bitlm.hf")
    return isinstance(error, FileNotFoundError) and "bitlm" not in sys.modules


def hook() -> None:
    """Entry point of `torch.backends`: watch for transformers. Imports nothing, never raises."""
    try:
        watch()
    except Exception as error:
        _logger().debug("no autoload: %r", error)


def _logger():
    import logging  # Here, because it is most of what `import bitlm` would cost.

    return logging.getLogger("bitlm")
