"""The closed-form start of an extracted model: what can be solved is solved before anything is trained."""

from kinprune.calibration.batch_norm import batch_norms, frozen_batch_norm, is_folded, reestimate_batch_norm
from kinprune.calibration.closed_form import ClosedForm, can_judge, closed_form
from kinprune.calibration.head import HeadSolution, fit_head, head_inputs, solve_head
from kinprune.calibration.probe import Probe, answers_of, solve_probe
from kinprune.calibration.reconstruction import LayerReconstruction, reconstruct
from kinprune.calibration.residual import ReconstructionLayer, describe_layers
from kinprune.calibration.statistics import match_batch_norm

__all__ = [
    "ClosedForm",
    "HeadSolution",
    "LayerReconstruction",
    "Probe",
    "ReconstructionLayer",
    "answers_of",
    "batch_norms",
    "can_judge",
    "closed_form",
    "describe_layers",
    "fit_head",
    "frozen_batch_norm",
    "head_inputs",
    "is_folded",
    "match_batch_norm",
    "reconstruct",
    "reestimate_batch_norm",
    "solve_head",
    "solve_probe",
]
