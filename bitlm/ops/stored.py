"""The stored tensors of one packed weight and their prepared weight: which of them is in memory.

Tensors that lie in a file are mapped, and the system drops their pages when it needs to. Where they
are in anonymous memory (packed in memory, experts joined while loading) they would double the
weight: then those that the prepared weight holds bit for bit are released once it is there, and
brought back when somebody asks for them.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import cache, library
from .cache import Prepared, undisturbed, version
from .cpu import takes, unsupported
from .form import Form
from .restore import restorable, restore

# torch.compile of older versions cannot follow the property that brings tensors back (weight.py):
# there they stay.
RELEASES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

# A program that asks for the tensors again and again would unpack them again and again.
MOST_RELEASES = 2

_released: weakref.WeakSet[Stored] = weakref.WeakSet()


class Stored:
    """slots: for each tensor of the form, in its order, the `_parameters` of a module and a key.

    While tensors are away (`away`), their slots hold parameters on meta; the modules bring them
    back before they let anybody look.
    """

    def __init__(self, form: Form, slots: Sequence[tuple[dict[str, nn.Parameter], str]],
                 owner: nn.Module) -> None:
        self.form, self.text, self.slots = form, form.text, slots
        self._owner = weakref.ref(owner)
        self.away = False
        self._reason = unsupported(form, torch.float32)
        self._lock = threading.RLock()
        # For each slot its tensor as it was: version and address.
        self._sources: list[tuple[dict, str, weakref.ref[Tensor], int, int]] = []
        self._entry: weakref.ref[Prepared] | None = None
        self._kept: Prepared | None = None  # while tensors are away nothing else keeps it
        self._releases = 0

    def blob_for(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the prepared weight when a call with these can use it alone, else None."""
        if self._reason is not None or not takes(x, bias):
            return None
        entry = self._entry and self._entry()
        if entry is not None:
            for parameters, name, source, at, address in self._sources:
                tensor = parameters[name]
                if tensor is not source() or at >= 0 and tensor._version != at or \
                        tensor.data_ptr() != address:
                    break
            else:
                return entry.blob
        entry = self.prepare()
        return entry and entry.blob

    def in_order(self) -> bool:
        """Tell whether the instruction set in use reads the prepared weight; if not, forget it."""
        entry = self._kept or self._entry and self._entry()
        if entry is None or entry.order == library.native().bitlm_cpu_order():
            return True
        self.restore()
        cache.forget(entry)
        self._entry = None
        return False

    def borrow(self) -> list[Tensor]:
        """Return the tensors for a moment: those that are away are brought back for the caller."""
        with self._lock, undisturbed():
            tensors = [parameters[name] for parameters, name in self.slots]
            if not self.away:
                return tensors
            back = self._unpacked(tensors)
            return [back.get(name, tensor) for name, tensor in zip(self.form.names, tensors)]

    def restore(self) -> None:
        """Bring the tensors back for good, or until the next call releases them again."""
        with self._lock, undisturbed():
            if not self.away:
                return
            tensors = [parameters[name] for parameters, name in self.slots]
            back = self._unpacked(tensors)
            for name, empty, (parameters, leaf) in zip(self.form.names, tensors, self.slots):
                if name in back:
                    parameters[leaf] = _like(empty, back[name])
            entry, self._kept, self.away = self._kept, None, False
            _released.discard(self)
            tensors = [parameters[name] for parameters, name in self.slots]
            entry.remember(tensors)
            cache.put(entry, tensors)
            self._entry = None  # the next call looks at everything again

    def _unpacked(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        like = {n: t for n, t in zip(self.form.names, tensors) if t.is_meta}
        return restore(self._kept.blob, self._kept.origins, like, torch.get_num_threads())

    def prepare(self) -> Prepared | None:
        """Make the prepared weight; None where the tensors are not there or there is no kernel."""
        if self._reason is not None:
            return None
        with self._lock, undisturbed():
            if self.away:
                entry = self._kept
            else:
                tensors = [parameters[name] for parameters, name in self.slots]
                if not all(t.is_cpu and type(t) in (Tensor, nn.Parameter) for t in tensors):
                    return None  # offloaded, or not for computing with
                entry = cache.prepared(self.text, tensors)
                if RELEASES and self._releases < MOST_RELEASES:
                    self._release(entry, tensors)
            sources = []
            for parameters, name in self.slots:
                tensor = parameters[name]
                sources.append((parameters, name, weakref.ref(tensor), version(tensor),
                                tensor.data_ptr()))
            self._sources, self._entry = sources, weakref.ref(entry)
            owner = self._owner()
            # Tensors that come and go with offload hooks are offloaded to save memory.
            if owner is not None and not any(hasattr(m, "_hf_hook") for m in owner.modules()):
                owner.blob = entry.blob
            return entry

    def drop_blob(self) -> None:
        """Forget the prepared weight: the tensors change."""
        owner = self._owner()
        if owner is not None:
            owner.blob = None
        entry = self._kept or self._entry and self._entry()
        self.restore()
        if entry is not None:
            cache.forget(entry)
            self._entry = None

    def _release(self, entry: Prepared, tensors: list[Tensor]) -> None:
        """Release what the prepared weight gives back exactly, if nobody else can hold it."""
        named = dict(zip(self.form.names, tensors))
        names = restorable(entry.origins, named)
        del named
        slots = dict(zip(self.form.names, self.slots))
        places = dict(zip(self.form.names, range(len(tensors))))
        tensors_of = [tensors[places[name]] for name in names]
        tensors.clear()
        if not tensors_of or not _alone(tensors_of):
            return
        back = restore(entry.blob, entry.origins, dict(zip(names, tensors_of)),
                       torch.get_num_threads())
        if not all(torch.equal(back[name], tensor) for name, tensor in zip(names, tensors_of)):
            return  # bits that mean nothing, as padding that is not 0
        for name, tensor in zip(names, tensors_of):
            parameters, leaf = slots[name]
            parameters[leaf] = _like(tensor, torch.empty_like(tensor, device="meta"))
        _restore_on_compile()
        self._kept, self.away = entry, True
        self._releases += 1
        _released.add(self)


def _like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Return a parameter with other values and what has been written on the old one."""
    fresh = nn.Parameter(values, requires_grad=False)
    fresh.__dict__.update(parameter.__dict__)
    return fresh


def _alone(tensors: list[Tensor]) -> bool:
    """Tell whether tensors are in anonymous memory of their own that nobody else can reach.

    tensors: held by one dict and this list, and nothing else that the caller knows of.
    """
    addresses = []
    for i in range(len(tensors)):
        storage = tensors[i].untyped_storage()
        # Python's references: list, dict and argument; torch, name and argument. Torch's: one of
        # the tensor, and of the storage another one for Python.
        if sys.getrefcount(tensors[i]) > 3 or sys.getrefcount(storage) > 3 or \
                tensors[i]._use_count() > 1 or \
                torch._C._storage_Use_Count(storage._cdata) > 2 or storage.is_shared():
            return False
        addresses.append(storage.data_ptr())
    return _anonymous(addresses)


def _anonymous(addresses: list[int]) -> bool:
    """Tell whether all addresses are in memory without a file behind; False where none can tell."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except OSError:
        return False
    found = 0
    for line in lines:
        place, _, _, _, inode = line.split(None, 5)[:5]
        start, _, end = place.partition("-")
        low, high = int(start, 16), int(end, 16)
        inside = sum(low <= address < high for address in addresses)
        if inside and inode != "0":
            return False
        found += inside
    return found == len(addresses)


def _restore_on_compile() -> None:
    """Have torch.compile find all tensors in their place.

    It asks a module that it meets for its parameters, which brings them back; that is not promised
    anywhere, so they also come back before. Importing it takes a second: not before it is used.
    """
    dynamo = sys.modules.get("torch._dynamo.callback")
    if dynamo is not None and _restore_all not in dynamo.callback_handler.start_callbacks:
        dynamo.callback_handler.register_start_callback(_restore_all)


def _restore_all(*_: object) -> None:
    for stored in list(_released):
        stored._releases = MOST_RELEASES  # a compiled graph keeps the tensors
        stored.restore()
