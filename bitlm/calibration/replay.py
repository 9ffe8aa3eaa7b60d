"""Run a model one block at a time, over all calibration batches, for any architecture.

The model's own forward makes every block's masks, position embeddings and other arguments, so no
calling convention has to be known. To reach block i again, the visits before it return what the
last one of their stack (encoder, decoder) returned in the pass before: a block's arguments other
than the hidden state do not depend on it, and outputs have the same structure all along a stack.
Only the last outputs of each stack are kept; over a budget they live in memory-mapped files.
Whether this holds is tried on a few tokens; where it does not, because a model adds up the outputs
of several blocks itself (XLM), the outputs of every visit are kept.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

MEMORY_BUDGET = 1 << 30  # bytes


class _Stop(Exception):
    """Ends a forward whose rest is not needed."""


class Replay:
    """Visits blocks in execution order; use as a context manager.

    blocks: name -> module. batches: keyword arguments of the model, one dict a batch.
    memory_budget: bytes of kept outputs beyond which they go to a file (default: MEMORY_BUDGET).
    """

    def __init__(self, model: nn.Module, blocks: dict[str, nn.Module],
                 batches: list[dict[str, Any]], memory_budget: int | None = None) -> None:
        self.model = model
        self.blocks = blocks
        self.batches = batches
        self._kept = _Outputs(MEMORY_BUDGET if memory_budget is None else memory_budget)
        self._visit = None
        self._every_visit = False

    def __enter__(self) -> Replay:
        self._routed = {name: block.forward for name, block in self.blocks.items()}
        for name, block in self.blocks.items():
            block.forward = self._route(name)
        return self

    def __exit__(self, *_: object) -> None:
        for block in self.blocks.values():
            del block.forward  # the instance attribute: the class's own shows again
        self._kept.close()

    def visits(self) -> list[str]:
        """Return the block names in the order of one forward; shared blocks appear repeatedly."""
        order: list[str] = []
        inputs: list[list[Tensor]] = []
        last: dict[str, Any] = {}
        outputs: list[dict[str, Any]] = []

        def note(name: str, forward, args, kwargs):
            order.append(name)
            inputs.append(_tensors((args, kwargs)))
            outputs.append(dict(last))
            last[_stack(name)] = forward(*args, **kwargs)
            return _copied(last[_stack(name)])

        # A few tokens tell the order; all of them would pay for the logits of a whole batch.
        few = {name: value[:1, :8] if isinstance(value, Tensor) else value
               for name, value in self.batches[0].items()}
        self._forward(note, few)
        self._every_visit = not all(self._arrives(number, few, inputs[number], outputs[number])
                                    for number in range(len(order)))
        return order

    def _arrives(self, number: int, batch: dict[str, Any], expected: list[Tensor],
                 answers: dict[str, Any]) -> bool:
        """Tell whether visit `number` gets its inputs when its stack's last output answers."""
        count, right = 0, False

        def visit(name: str, forward, args, kwargs):
            nonlocal count, right
            count += 1
            if count <= number:
                return _copied(answers[_stack(name)])
            found = _tensors((args, kwargs))
            right = len(found) == len(expected) and all(map(torch.equal, found, expected))
            raise _Stop

        self._forward(visit, batch)
        return right

    def observe(self, number: int, before_batch=lambda: None) -> None:
        """Run visit `number` on every batch, for its hooks; its outputs are not kept."""
        for index, batch in enumerate(self.batches):
            before_batch()
            self._run_to(number, index, batch, keep=False)

    def advance(self, number: int) -> None:
        """Run visit `number` on every batch and keep its outputs for the visit after it."""
        for index, batch in enumerate(self.batches):
            self._run_to(number, index, batch, keep=True)

    def observe_rest(self, visits: int, before_batch=lambda: None) -> None:
        """Run what lies outside the blocks on every batch; the blocks answer from what is kept."""
        for index, batch in enumerate(self.batches):
            before_batch()
            self._run_to(visits, index, batch, keep=False)

    def _run_to(self, number: int, index: int, batch: dict[str, Any], keep: bool) -> None:
        count = 0

        def visit(name: str, forward, args, kwargs):
            nonlocal count
            count += 1
            key = count if self._every_visit else _stack(name), index
            if count <= number:
                return self._kept[key]
            output = forward(*args, **kwargs)
            if keep:
                self._kept[key] = output
            raise _Stop

        self._forward(visit, batch)

    def _forward(self, visit, batch: dict[str, Any]) -> None:
        self._visit = visit
        try:
            with torch.no_grad():
                self.model(**batch)
        except _Stop:
            pass
        finally:
            self._visit = None

    def _route(self, name: str):
        def routed(*args, **kwargs):
            return self._visit(name, self._routed[name], args, kwargs)
        return routed


def _stack(name: str) -> str:
    return name.rpartition(".")[0]


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def _copied(nested: Any) -> Any:
    """Return a copy of nested tensors: models may add to an output in place."""
    return pytree.tree_map_only(Tensor, torch.clone, nested)


class _Outputs:
    """What a stack's last visit returned for a batch: tensors in memory or in mapped files."""

    def __init__(self, memory_budget: int) -> None:
        self._budget = memory_budget
        self._items: dict[tuple[str | int, int], Any] = {}
        self._files = 0
        self._folder: tempfile.TemporaryDirectory | None = None

    def __getitem__(self, key: tuple[str | int, int]) -> Any:
        return _copied(self._items[key])

    def __setitem__(self, key: tuple[str | int, int], value: Any) -> None:
        leaves, spec = pytree.tree_flatten(value)
        self._items.pop(key, None)
        here = sum(_nbytes(x) for item in self._items.values() for x in pytree.tree_leaves(item)
                   if isinstance(x, Tensor) and not _mapped(x))
        size = sum(_nbytes(x) for x in leaves if isinstance(x, Tensor))
        if here + size > self._budget:
            leaves = [self._spill(x) if isinstance(x, Tensor) else x for x in leaves]
        self._items[key] = pytree.tree_unflatten(leaves, spec)

    def _spill(self, tensor: Tensor) -> Tensor:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="bitlm-blocks-")
        self._files += 1
        path = Path(self._folder.name, str(self._files))
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        path.unlink()  # the mapping keeps the bytes until it is dropped
        mapped = mapped.view(tensor.shape)
        mapped.copy_(tensor)
        mapped.spilled = True
        return mapped

    def close(self) -> None:
        self._items.clear()
        if self._folder is not None:
            self._folder.cleanup()


def _mapped(tensor: Tensor) -> bool:
    return getattr(tensor, "spilled", False)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
