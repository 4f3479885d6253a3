"""``width_floor``: the squared loss that a last layer of few features leaves, whatever its network is."""

from __future__ import annotations

from lightning_conv.arguments import require_type, require_whole
from lightning_conv.linalg.rounding import gamma
from lightning_conv.linalg.spectrum import matrix_spectrum
from lightning_conv.losses.per_sample import SampleLosses

STEPS = 8
"""Times that the rounding of the centred Gram matrix is counted: centring, both factors, the product and its sum."""


def width_floor(losses: SampleLosses, width: int, *, bias: bool = True) -> float | None:
    r"""Bound the squared loss from below for outputs of a linear layer with few inputs.

    .. math:: \sum_i |u_i - y_i|^2 \ge \sum_{j > m} \sigma_j(P Y)^2, \qquad u_i = W h_i + b

    Y, (n, C), holds the targets, m is the number of features h, and :math:`P = I - 1 1^T / n` removes the mean of every column (P = I
    without a bias).

    Proof. With H the features of all samples, :math:`P U = P H W^T + P 1 b^T = P H W^T` has a rank of at most m. As P is a projector,
    :math:`|U - Y|_F \ge |P U - P Y|_F`, and by Eckart and Young no matrix of rank m is closer to P Y than
    :math:`(\sum_{j > m} \sigma_j^2)^{1/2}`. Equality: H the first m left singular vectors of P Y times the values, b the mean of y.

    The eigenvalues of the Gram matrix are bounded (``matrix_spectrum``), and what rounding may have done to the matrix is subtracted
    from each of them.

    Args:
        losses: The losses of the samples with their targets. The features must not depend on anything but the sample, and the outputs
            of the linear layer must be those of the loss.
        width: m.
        bias: Whether the layer has a bias.

    Returns:
        The floor in the scale of the loss, rounded down; None: the loss is not squared.

    Raises:
        TypeError: The losses are no ``SampleLosses``, or the width is no whole number.
        ValueError: The width is negative.

    Cost: n C min(n, C) flops and the eigenvalues of a matrix of that size.

    Source: Eckart & Young 1936.
    """
    require_type("losses", losses, SampleLosses, "SampleLosses(loss_fn, targets)")
    require_whole("width", width, least=0)
    if losses.kind != "squared":
        return None
    targets = losses.targets.double()
    n, outputs = targets.shape
    if width >= min(n, outputs):
        return 0.0
    rows = targets - targets.mean(0) if bias else targets
    gram = rows.T @ rows if outputs <= n else rows @ rows.T
    total = float(targets.square().sum())
    if not total > 0:
        return 0.0
    spectrum = matrix_spectrum((gram + gram.T) / 2)
    moved = STEPS * gamma(max(n, outputs) + STEPS, gram.dtype) * total + float(spectrum.radius or 0.0)
    rest = spectrum.all_eigenvalues()[: len(gram) - width]
    least = float((rest - moved).clamp(min=0).sum()) * (1 - gamma(len(rest) + STEPS, gram.dtype))
    return _scaled(losses, least, outputs)


def _scaled(losses: SampleLosses, least: float, outputs: int) -> float:
    count = 1 if losses.loss.summed else losses.samples
    return least / ((outputs if losses.mean else 1) * count)
