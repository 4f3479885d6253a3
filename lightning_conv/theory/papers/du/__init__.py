"""Du, Zhai, Poczos, Singh 2019 (two layers) and Du, Lee, Li, Wang, Zhai 2019 (deep): the inequalities of their proofs.

The loss is S = 1/2 sum (u - y)^2 throughout, without 1/n. Step sizes are those on S; ``LossScale.step_on_sum`` converts
those of a run.
"""

from lightning_conv.theory.papers.du.descent import (
    Linearisation,
    contraction_criterion,
    linearisation,
    linearisation_criteria,
    linearised_rate,
    step_contraction_criterion,
    step_criterion,
)
from lightning_conv.theory.papers.du.gram import hadamard_gram, last_hidden_gram
from lightning_conv.theory.papers.du.kernel import (
    drift_criterion,
    initial_criterion,
    lambda_min_criterion,
    lambda_min_share_criterion,
    own_lambda_min_criterion,
)
from lightning_conv.theory.papers.du.labels import generalisation_measure, label_energies, predicted_residuals
from lightning_conv.theory.papers.du.movement import (
    Movement,
    layer_movement,
    layer_movement_criterion,
    layer_norms,
    layer_norms_criterion,
    layer_radius,
    neuron_movement,
    neuron_movement_criterion,
    neuron_radius,
)
from lightning_conv.theory.papers.du.propagation import feature_sensitivity, propagation_bound
from lightning_conv.theory.papers.du.two_layer import TwoLayerDescent
from lightning_conv.theory.tools.hidden_states import pattern_changes

__all__ = [
    "Linearisation",
    "Movement",
    "TwoLayerDescent",
    "contraction_criterion",
    "drift_criterion",
    "feature_sensitivity",
    "generalisation_measure",
    "hadamard_gram",
    "initial_criterion",
    "label_energies",
    "lambda_min_criterion",
    "lambda_min_share_criterion",
    "last_hidden_gram",
    "layer_movement",
    "layer_movement_criterion",
    "layer_norms",
    "layer_norms_criterion",
    "layer_radius",
    "linearisation",
    "linearisation_criteria",
    "linearised_rate",
    "neuron_movement",
    "neuron_movement_criterion",
    "neuron_radius",
    "own_lambda_min_criterion",
    "pattern_changes",
    "predicted_residuals",
    "propagation_bound",
    "step_contraction_criterion",
    "step_criterion",
]
