"""``OwnSamples``: a proof, from the operators of a forward pass, that what it returns for a sample depends on no other sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_conv.kernels.reading.sample_places import Along, CouplesError, Found, elementwise
from lightning_conv.kernels.reading.sample_rules import ELEMENTWISE, RULES
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, input_tensors
from lightning_conv.networks.narrow_memory import READERS, Readers
from lightning_conv.networks.narrow_types import tensors_in, written_by

HIDDEN = READERS | {Tensor.tolist, Tensor.data.__set__}  # type: ignore[attr-defined]
"""What reads or replaces numbers without an operator."""

DROPPING = "aten::_scaled_dot_product_"
"""Operators that are random for a rate of dropout alone, which their rule looks at."""


class OwnSamples(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow the dimension of the samples through all operators of a forward pass.

    Each tensor is one of three: it depends on the samples, along a dimension that is known; it depends on none of them (weights, buffers,
    and what is made of these alone); or it came from elsewhere, by NumPy, from a list, or as an attribute. A forward is proven if every
    operator has a rule that tells where the samples are in its result, and no tensor from elsewhere enters. It says nothing on other
    batches, whose size a forward may ask for.

    Args:
        module: the network.

    Cost: some 20 us per operator.
    """

    supports_higher_order_operators = True

    def __init__(self, module: StatelessModule) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module, self._samples = module, 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._readers = Readers(self._read, HIDDEN)
        self._found = Found(self._along)
        self.holds = True
        """Whether all forwards so far are proven."""
        self.why = ""
        """The first operator without a proof."""

    def outputs(self, inputs: Inputs) -> Tensor:
        """Return ``StatelessModule.outputs``, and look at how they are made.

        Args:
            inputs: samples, in the layout in which they are passed.
        """
        if not self.holds or len(input_tensors(inputs)[0]) == 1:  # the only sample of its batch
            return self._module.outputs({}, inputs)
        self._known = WeakIdKeyDictionary()
        tensors = input_tensors(inputs)
        self._samples = len(tensors[0])
        for each in (*self._module.parameters.values(), *self._module.buffers.values()):
            self._known[each] = None
        for each in tensors:
            self._known[each] = Along(0)
        with self._readers, self:
            found = self._module.outputs({}, inputs)
        if self.holds and (found not in self._known or self._known[found] != Along(0)):
            self._give_up("the result")
        self._known = WeakIdKeyDictionary()
        return found

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note where the samples are in its results."""
        laid = args[0].stride() if func is torch.ops.aten.as_strided_.default else ()
        result = func(*args, **(kwargs or {}))
        if laid and _same_layout(laid, *args):
            return result
        if self.holds:
            with torch._C.DisableTorchFunction():
                try:
                    self._follow(func, args, dict(kwargs or {}), result)
                except Exception:  # besides ``CouplesError`` whatever a rule did not expect, which proves nothing
                    self._give_up(str(func))
        return result

    def _along(self, tensor: Tensor) -> Along | None:
        return self._known[tensor]  # type: ignore[no-any-return]

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        random = torch.Tag.nondeterministic_seeded in func.tags and not func._schema.name.startswith(DROPPING)
        if func.namespace != "aten" or random:
            raise CouplesError
        given, made = tensors_in((args, kwargs)), tensors_in(result)
        if all(self._along(each) is None for each in given):
            for each in made:
                self._known[each] = _repeated(func, args, each, self._samples)
            return
        written = written_by(func, args, kwargs)
        if any(self._along(each) is None for each in written) or not made:
            raise CouplesError
        for each, along in zip(made, self._places(func, args, kwargs, result, given, made), strict=False):
            if any(each is one for one in written):
                if along != self._along(each):
                    raise CouplesError
            elif along is not None:
                self._known[each] = along
            # Others, such as statistics for a backward pass, are taken as from elsewhere.

    def _places(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        given: Sequence[Tensor],
        made: Sequence[Tensor],
    ) -> Sequence[Along | None]:
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        if torch.Tag.pointwise in func.tags or name in ELEMENTWISE:
            return [elementwise(given, each, self._found) for each in made]
        if (rule := RULES.get(name)) is None:
            raise CouplesError
        names = [each.name for each in func._schema.arguments]
        named = dict(zip(names, args, strict=False)) | kwargs
        return rule(named | ({"stack": True} if name == "stack" else {}), result, self._found, self._samples)

    def _read(self, tensor: Tensor, name: str) -> None:
        del tensor
        self._give_up(name)

    def _give_up(self, why: str) -> None:
        if self.holds:
            self.holds, self.why = False, why


def _same_layout(
    before: Sequence[int], tensor: Tensor, size: Sequence[int], stride: Sequence[int], *rest: object
) -> bool:
    """Return whether ``as_strided_`` leaves all numbers where they are, as pooling does which says that channels are innermost."""
    pairs = zip(tensor.shape, before, stride, strict=False)
    return not rest and tuple(tensor.shape) == tuple(size) and all(one == other for n, one, other in pairs if n > 1)


def _repeated(func: Any, args: Sequence[Any], made: Tensor, samples: int) -> Along | None:
    """Return where the samples are in numbers that were repeated for each of them, such as positions; None: they were not."""
    if func is not torch.ops.aten.expand.default:
        return None
    lead = made.ndim - args[0].ndim
    new = [dim for dim in range(made.ndim) if dim < lead or args[0].shape[dim - lead] == 1]
    fitting = [dim for dim in new if made.shape[dim] == samples]
    return Along(fitting[0]) if len(fitting) == 1 and samples > 1 else None
