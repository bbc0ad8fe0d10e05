"""The closed-form start of an extracted model: what can be solved is solved before anything is trained."""

from kinprune.calibration.batch_norm import batch_norms, frozen_batch_norm, is_folded, reestimate_batch_norm
from kinprune.calibration.closed_form import ClosedForm, closed_form
from kinprune.calibration.head import HeadSolution, solve_head
from kinprune.calibration.reconstruction import LayerReconstruction, reconstruct
from kinprune.calibration.residual import ReconstructionLayer, describe_layers
from kinprune.calibration.statistics import match_batch_norm

__all__ = [
    "ClosedForm",
    "HeadSolution",
    "LayerReconstruction",
    "ReconstructionLayer",
    "batch_norms",
    "closed_form",
    "describe_layers",
    "frozen_batch_norm",
    "is_folded",
    "match_batch_norm",
    "reconstruct",
    "reestimate_batch_norm",
    "solve_head",
]
