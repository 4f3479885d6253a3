"""The list of methods: environment, configuration and known facts. It imports no library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way of computing the kernel."""

    name: str
    label: str
    environment: str  # "library": the running one; "torch" and "jax": below .peers/
    module: str  # holds prepare(case, arrays, dtype, **options) -> a callable that returns the matrix
    configuration: str
    packages: tuple[str, ...]  # whose versions are reported
    options: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = False  # the first call is no measurement
    jacobian: bool = (
        False  # forms the n x P Jacobian or a sequence of products of its size: left out of the large sweeps
    )

    @property
    def ours(self) -> bool:
        """Whether the method is this library."""
        return self.module == "peers.this_library"


METHODS = {
    method.name: method
    for method in [
        Method(
            "library-fast",
            "this library, fast",
            "library",
            "peers.this_library",
            'ntk_gram(model, inputs, outputs=..., precision="fast"), float32 model',
            ("torch",),
            {"precision": "fast"},
        ),
        Method(
            "library-planned",
            "this library, fast, planned",
            "library",
            "peers.this_library",
            "the same with plan=plan_ntk(...) made beforehand, as compiled peers have compiled beforehand",
            ("torch",),
            {"precision": "fast", "planned": True},
        ),
        Method(
            "library-exact",
            "this library, exact",
            "library",
            "peers.this_library",
            'ntk_gram(model, inputs, outputs=..., precision="exact"), float32 model: products summed in float64, which '
            "no peer does",
            ("torch",),
            {"precision": "exact"},
        ),
        Method(
            "nt-structured",
            "neural-tangents, structured",
            "jax",
            "peers.neural_tangents_gram",
            "empirical_ntk_fn(implementation=STRUCTURED_DERIVATIVES, vmap_axes=0), jit, whole batch, NHWC",
            ("neural-tangents", "jax", "jaxlib"),
            {"implementation": 3},
            compiles=True,
        ),
        Method(
            "nt-jacobian",
            "neural-tangents, Jacobian",
            "jax",
            "peers.neural_tangents_gram",
            "empirical_ntk_fn(implementation=JACOBIAN_CONTRACTION, vmap_axes=0), jit, whole batch, NHWC",
            ("neural-tangents", "jax", "jaxlib"),
            {"implementation": 1},
            compiles=True,
            jacobian=True,
        ),
        Method(
            "nngeometry",
            "nngeometry",
            "torch",
            "peers.nngeometry_gram",
            "GramMatrix, whole batch; it always computes the full kernel, of which the trace is then taken",
            ("nngeometry",),
        ),
        Method(
            "torch-func",
            "torch.func tutorial",
            "library",
            "peers.torch_func_gram",
            "vmap(jacrev) and einsum per parameter as in PyTorch's NTK tutorial; samples in tiles whose Jacobians take "
            "4 GB, upper triangle of tiles",
            ("torch",),
            jacobian=True,
        ),
        Method(
            "backpack",
            "BackPACK BatchGrad + GEMM",
            "torch",
            "peers.batch_grad_gram",
            "BatchGrad, one backward per output, products per parameter; whole batch, or tiles of 4 GB",
            ("backpack-for-pytorch",),
            {"peer": "backpack"},
            jacobian=True,
        ),
        Method(
            "opacus",
            "Opacus GradSample + GEMM",
            "torch",
            "peers.batch_grad_gram",
            "GradSampleModule(strict=False), DPLSTM for LSTM, one forward and backward per output (its hooks consume "
            "the activations), products per parameter; whole batch, or tiles of 4 GB",
            ("opacus",),
            {"peer": "opacus"},
            jacobian=True,
        ),
        Method(
            "asdl",
            "ASDL",
            "torch",
            "peers.asdl_gram",
            "asdfghjkl, whole batch; the trace of MLPs by empirical_class_wise_hadamard_ntk and of ResNets by "
            "empirical_class_wise_direct_ntk, everything else by empirical_implicit_ntk",
            ("asdfghjkl",),
        ),
    ]
}
"""The methods that are timed, in the order of the tables."""

ORACLES = {
    method.name: method
    for method in [
        Method(
            "certified",
            "this library, certified",
            "library",
            "peers.this_library",
            'ntk_gram(model, inputs, outputs=..., precision="certified"): all of it in float64',
            ("torch",),
            {"precision": "certified"},
        ),
        Method(
            "naive",
            "double loop",
            "library",
            "peers.naive_gram",
            "autograd.grad of one output of one sample at a time, inner products of the rows, in float64",
            ("torch",),
        ),
    ]
}
"""The methods with which the others are compared."""
