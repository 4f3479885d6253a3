"""What is known of a kernel that was measured: which one it is, its tags, and how it is stored."""

from __future__ import annotations

from typing import Any

from lightning_conv.kernels.contraction import is_full
from lightning_conv.kernels.gram import KernelGram


def is_of_loss(gram: KernelGram) -> bool:
    """Return whether a kernel is that of the loss gradients, s_i^T K_ij s_j, and not the NTK."""
    return gram.outputs == "cotangents"


def tags_of(gram: KernelGram) -> str:
    """Return what the tags of a kernel's numbers begin with: numbers of the loss gradients must not pass for those of the NTK."""
    return "loss_kernel" if is_of_loss(gram) else "kernel"


def kernel_name(gram: KernelGram) -> str:
    """Return what a kernel is called in the title of a figure."""
    return "loss-gradient kernel" if is_of_loss(gram) else "kernel"


def not_full(gram: KernelGram) -> str:
    """Return why a theorem about the full kernel of all outputs says nothing about this kernel; empty if it is the full one."""
    if is_full(gram):
        return ""
    if is_of_loss(gram):
        return 'the kernel is that of the loss gradients, not the NTK that the theorem is about; Probe(outputs="full") gives that'
    return f'the kernel is summed over {gram.n_outputs} outputs; Probe(outputs="full") gives the one that the theorem is about'


def gram_state(gram: KernelGram) -> dict[str, Any]:
    """Return a Gram matrix as plain types, for a checkpoint: without the plan and the layers' matrices."""
    return gram.facts() | {"matrix": gram.matrix.cpu()}


def gram_from_state(state: dict[str, Any]) -> KernelGram:
    """Rebuild a Gram matrix from what ``gram_state`` returned."""
    return KernelGram.from_facts(state["matrix"], state)
