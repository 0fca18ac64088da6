"""What a forward and backward of the base keeps, moves and computes, found by running it without any memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_LARGE = 32 << 20
_GAPS = 1.1
_FREED = 0.45
"""Of what checkpointed layers free on a heap, the part that is not used again: measured, on five runs."""


@dataclass(frozen=True)
class BaseTrace:
    """Of one micro-batch of one rank, in the model's dtype."""

    kept: int
    """Bytes that the forward leaves for the backward, logits included."""
    peak: int
    """Bytes at the worst moment of both, without weights."""
    heap_peak: int
    """Bytes that glibc's allocator holds at the worst moment on a CPU: blocks of less than 32 MiB stay with the process
    once they have been used (``M_MMAP_THRESHOLD``), larger ones come and go. So it is the worst moment of either, the
    former with a tenth for gaps between blocks."""
    forward_flops: int
    backward_flops: int
    moved: int
    """Bytes that passes other than products of matrices read and write."""
    products: tuple[tuple[int, int, int, int], ...]
    """Products of [m, k] by [k, n], and how many of each: (m, k, n, count); by most operations first."""

    def with_gaps(self, whole: BaseTrace) -> BaseTrace:
        """Of checkpointed layers on a CPU, ``whole`` being the same without checkpointing. On the heap, what stays of a
        layer comes to lie among what it has freed, which is then too small for the next one."""
        freed = max(0, whole.heap_peak - self.heap_peak)
        return replace(self, heap_peak=self.heap_peak + int(_FREED * freed))

    def twice_as_wide(self) -> BaseTrace:
        """Of the same model with twice as many bytes in every number."""
        wide = {name: 2 * getattr(self, name) for name in ("kept", "peak", "heap_peak", "moved")}
        return replace(self, **wide)


def trace_base(
    model: nn.Module,
    sequences: int,
    length: int,
    *,
    gradient_checkpointing: bool = False,
    frozen: bool = True,
    keeps_inputs: bool = False,
) -> BaseTrace:
    """Run an imagined model (:func:`imagined`) over ``sequences`` × ``length`` tokens, inside of whose ``with`` this is
    called; the gradient goes back to the embeddings, and to weights unless they are ``frozen``.

    Args:
        keeps_inputs: linear layers are those of DeepSpeed's stage 3, which keep their inputs in any case.

    Raises:
        Exception: whatever a model raises whose shapes depend on what is computed, such as some with experts.
    """
    model.train().requires_grad_(not frozen)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # An encoder and its decoder have modules of their own for one table.
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == vocabulary]
    hooks = [m.register_forward_hook(lambda *args: args[-1].requires_grad_()) for m in embeddings]
    weights = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    watch, flops = _Watch(weights), FlopCounterMode(display=False, custom_mapping=_more_flops())
    ids = torch.ones(sequences, length, dtype=torch.int64)
    after_forward = []
    try:
        # Apart, because PyTorch's counter holds on to what checkpointed layers compute again.
        for mode, said in ((flops, flops.get_total_flops), (watch, lambda: watch.live)):
            # Whatever this process has switched off or replaced: training runs in another one.
            attention = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
            with attention, _linear_layers(keeps_inputs), mode:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                after_forward.append(said())
                loss.backward()
                del loss
            model.zero_grad()
    finally:
        for hook in hooks:
            hook.remove()
    forward, kept = after_forward
    products = sorted(watch.products.items(), key=lambda item: -item[1] * item[0][0] * item[0][1] * item[0][2])
    return BaseTrace(
        kept=kept,
        peak=watch.peak,
        heap_peak=watch.peak_of[True] + int(_GAPS * watch.peak_of[False]),
        forward_flops=forward,
        backward_flops=flops.get_total_flops() - forward,
        moved=watch.moved,
        products=tuple((*shape, count) for shape, count in products),
    )


@contextmanager
def _linear_layers(keeps_inputs: bool) -> Iterator[None]:
    """Those of stage 3, or PyTorch's, which DeepSpeed replaces for good in a process once it has prepared stage 3."""
    former, functional.linear = functional.linear, torch._C._nn.linear
    try:
        if keeps_inputs:
            from deepspeed.runtime.zero.linear import zero3_linear_wrap

            functional.linear = zero3_linear_wrap
        yield
    finally:
        functional.linear = former


def _grouped_product(first: torch.Size, second: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of [m, k] by [experts, k, n], of which each row meets one expert."""
    return 2 * first[-2] * first[-1] * second[-1]


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Of a forward: scores, and their sum of values."""
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


def _attention_backward(grad: torch.Size, *of_forward: Any, **__: Any) -> int:
    """Of its backward, which computes the scores again: five products for the forward's two."""
    return _attention(*of_forward) * 5 // 2


def _more_flops() -> dict[Any, Any]:
    """Of operators that PyTorch does not count."""
    names = {
        "_grouped_mm": _grouped_product,
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    }
    return {getattr(torch.ops.aten, name): count for name, count in names.items() if hasattr(torch.ops.aten, name)}


class _Watch(TorchDispatchMode):
    """Counts the bytes of storages that are alive, those that passes move, and products of matrices."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.live = self.peak = self.moved = 0
        self.products: Counter[tuple[int, int, int]] = Counter()
        # By whether blocks are large.
        self.live_of, self.peak_of = {False: 0, True: 0}, {False: 0, True: 0}
        self._weights = weights
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        for tensor in made:
            self._note(tensor)
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            first, second = given[-2:]
            batch = first.shape[0] if first.dim() == 3 else 1
            self.products[(first.shape[-2], first.shape[-1], second.shape[-1])] += batch
        elif name == "_grouped_mm":
            self.products[(given[0].shape[-2], given[0].shape[-1], given[1].shape[-1])] += 1
        elif func.namespace == "aten":
            sources = {id(t.untyped_storage()) for t in given}
            view = all(id(t.untyped_storage()) in sources for t in made) and not func._schema.is_mutable
            if not view and name not in ("detach", "_unsafe_view", "empty", "empty_like"):
                self.moved += sum(t.numel() * t.element_size() for t in _moved(name, given, made))
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number = id(storage)
        if number in self._seen or number in self._weights:
            return
        size, large = storage.nbytes(), storage.nbytes() >= _LARGE

        def gone(_: Any) -> None:
            self._seen.pop(number, None)
            self.live -= size
            self.live_of[large] -= size

        self._seen[number] = weakref.ref(storage, gone)
        self.live += size
        self.live_of[large] += size
        self.peak = max(self.peak, self.live)
        self.peak_of[large] = max(self.peak_of[large], self.live_of[large])


def _moved(name: str, given: list[Tensor], made: list[Tensor]) -> list[Tensor]:
    """What a pass reads and writes: of an embedding's table only the rows that it gives."""
    return [*made, *made] if name in ("embedding", "index_select", "gather") else [*given, *made]
