"""A training step for GPUs: what model.py, sinkhorn.py and loss.py compute, in few passes over memory.

A step on a GPU waits for memory more than for products. So here cosines are float16 and their gradients bfloat16;
Sinkhorn-Knopp keeps only its scales, from which a target is made anew wherever it is needed; and ``torch.compile``
makes few kernels of each function. Everything within a kernel, and every sum, is float32. With float32 arrays, and not
compiled, the functions give the numbers of the plain ones: a test holds them together.

H heads, V = 2 views (an image and its neighbour), B pairs of this worker, K clusters, n = V B rows; S, M, P and the two
shapes of inputs as in model.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.communicator import Communicator, SingleWorker
from icce_ray.methods.heads.model import NORM_EPS, HeadParameters, linear, weight_gradient
from icce_ray.methods.heads.sinkhorn import MAX_EXPONENT

MIN_COMPILED_WORK = 1e12
"""Steps x heads x rows x clusters from which on compiling, some half a minute, is soon paid back."""

Function = Callable[..., Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """The teacher's targets of some heads, not yet made: log target = (cosine - 1) / temperature + row + column."""

    cosines_HVBK: torch.Tensor
    row_HVB1: torch.Tensor
    column_HV1K: torch.Tensor


class FusedStep:
    """The step of TEMI's loss on one neighbour an image.

    Args:
        config: temperatures, beta, Sinkhorn-Knopp.
        compiled: by ``torch.compile``.
        cosine_dtype, gradient_dtype: of arrays as large as n x K.
    """

    def __init__(
        self,
        config: HeadsConfig,
        *,
        compiled: bool,
        cosine_dtype: torch.dtype = torch.float16,
        gradient_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.config = config
        self.cosine_dtype, self.gradient_dtype = cosine_dtype, gradient_dtype

        def prepared(function: Function) -> Function:
            return torch.compile(function) if compiled else function

        self._forward, self._cosines = prepared(_forward), prepared(_cosines)
        self._column_mass, self._scales = prepared(_column_mass), prepared(_scales)
        self._statistics, self._losses, self._backward = prepared(_statistics), prepared(_losses), prepared(_backward)

    def teacher_cosines(self, teacher: HeadParameters, inputs: torch.Tensor) -> torch.Tensor:
        """(H, V, B, K) cosines of the teacher's outputs with its prototypes."""
        return _by_view(self._cosines(*teacher.tensors(), inputs, self.cosine_dtype))

    def targets(self, cosines_HVBK: torch.Tensor, communicator: Communicator) -> Targets:
        """As `loss.teacher_targets`."""
        temperature = self.config.teacher_temperature
        H, V, B, K = cosines_HVBK.shape
        mass_HV1K = torch.ones((H, V, 1, K), device=cosines_HVBK.device)
        row_HVB1 = torch.zeros((H, V, B, 1), device=cosines_HVBK.device)
        column_HV1K = torch.zeros_like(mass_HV1K)
        for _ in range(self.config.sinkhorn_iterations if self.config.sinkhorn else 1):
            if self.config.sinkhorn:
                mass_HV1K = communicator.sum_(self._column_mass(cosines_HVBK, row_HVB1, temperature))
            row_HVB1, column_HV1K = self._scales(cosines_HVBK, mass_HV1K, temperature)
        return Targets(cosines_HVBK, row_HVB1, column_HV1K)

    def statistics(self, targets: Targets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of this worker's targets: their sum over views and images (H, K), `loss.pair_agreement` (B,), and the labels
        of the first view (H, B)."""
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self._statistics(
            targets.cosines_HVBK, targets.row_HVB1, targets.column_HV1K, self.config.teacher_temperature
        )
        return found

    def write_gradient(
        self,
        student: HeadParameters,
        inputs: torch.Tensor,
        targets: Targets,
        log_prior_HK: torch.Tensor,
        weight_B: torch.Tensor,
        ce_weight: torch.Tensor,
        scale: torch.Tensor,
        gradient: HeadParameters,
    ) -> torch.Tensor:
        """`model.forward`, `loss.temi_losses` and `model.backward`. Returns the loss (H,), summed over pairs; writes
        `scale` times its gradient. `ce_weight` and `scale` are tensors, or each value would be compiled for."""
        hidden_HnM, activation_HnM, unit_HnP, inverse_norm_Hn1, cosines_HnK = self._forward(
            *student.tensors(), inputs, self.cosine_dtype
        )
        config = self.config
        loss_H: torch.Tensor
        loss_H, slope_HnK, radial_Hn1 = self._losses(
            _by_view(cosines_HnK), targets.cosines_HVBK, targets.row_HVB1, targets.column_HV1K, log_prior_HK, weight_B,
            ce_weight, scale, config.student_temperature, config.teacher_temperature, config.beta, self.gradient_dtype,
        )  # fmt: skip
        self._backward(
            *student.tensors(), inputs, hidden_HnM, activation_HnM, unit_HnP, inverse_norm_Hn1, slope_HnK,
            radial_Hn1, *gradient.tensors(),
        )  # fmt: skip
        return loss_H

    def try_out(self, parameters: HeadParameters, inputs: torch.Tensor) -> None:
        """Compute a step, and with it compile all functions; nothing is kept."""
        device, (H, K, _) = parameters.prototypes_HKP.device, parameters.prototypes_HKP.shape
        targets = self.targets(self.teacher_cosines(parameters, inputs), SingleWorker())
        _, weight_B, _ = self.statistics(targets)
        one = torch.ones((), device=device)
        log_prior_HK = torch.zeros((H, K), device=device)
        gradient = parameters.map(torch.empty_like)
        self.write_gradient(parameters, inputs, targets, log_prior_HK, weight_B, one, one, gradient)


def can_fuse(config: HeadsConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether training so is for this module: on a GPU, in bfloat16, TEMI's loss, one neighbour an image, and
    temperatures T at which no sum of exponentials underflows: cosines less 1, over T, are at least -2/T."""
    lowest = min(config.teacher_temperature, config.student_temperature)
    is_known = config.loss == "temi" and config.num_positives == 1 and 2.0 / lowest <= MAX_EXPONENT
    return is_known and device.type == "cuda" and dtype == torch.bfloat16


def compiled_step(
    config: HeadsConfig, student: HeadParameters, inputs: torch.Tensor, *, num_steps: int
) -> FusedStep | None:
    """The compiled step for a run where it pays; None where it does not, or where torch cannot compile.

    Args:
        config: the `heads` section.
        student: parameters, on the device of the run, of a block of heads.
        inputs: of the shape, dtype and device of theirs in a step.
        num_steps: of the run.
    """
    work = num_steps * config.num_heads * inputs.shape[-2] * student.num_clusters
    if not can_fuse(config, inputs.device, inputs.dtype) or work < MIN_COMPILED_WORK:
        return None
    step = FusedStep(config, compiled=True)
    try:
        step.try_out(student, inputs)
    except Exception as error:  # a compiler that is missing, a torch that does not go with it: of many types
        logger.warning("heads: torch cannot compile the training step, which will take twice as long: %s", error)
        return None
    return step


def _by_view(array_HnK: torch.Tensor) -> torch.Tensor:
    H, n, K = array_HnK.shape
    return array_HnK.view(H, 2, n // 2, K)


def _forward(
    hidden_weight_HMS: torch.Tensor, hidden_bias_HM: torch.Tensor, bottleneck_weight_HPM: torch.Tensor,
    bottleneck_bias_HP: torch.Tensor, prototypes_HKP: torch.Tensor, inputs: torch.Tensor, cosine_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Cosines (H, n, K), and before them what `_backward` needs."""
    hidden_HnM = linear(hidden_weight_HMS, hidden_bias_HM, inputs)
    activation_HnM = F.gelu(hidden_HnM)
    bottleneck_HnP = linear(bottleneck_weight_HPM, bottleneck_bias_HP, activation_HnM).float()
    inverse_norm_Hn1 = bottleneck_HnP.square().sum(dim=-1, keepdim=True).clamp_min(NORM_EPS).rsqrt()
    unit_HnP = bottleneck_HnP * inverse_norm_Hn1
    prototypes = F.normalize(prototypes_HKP, dim=-1).to(cosine_dtype)
    cosines_HnK = torch.bmm(unit_HnP.to(cosine_dtype), prototypes.transpose(1, 2))
    return hidden_HnM, activation_HnM, unit_HnP, inverse_norm_Hn1, cosines_HnK


def _cosines(*arguments: Any) -> torch.Tensor:
    return _forward(*arguments)[-1]


def _log_target(
    cosines_HVBK: torch.Tensor, row_HVB1: torch.Tensor | float, column_HV1K: torch.Tensor | float, temperature: float
) -> torch.Tensor:
    return (cosines_HVBK.float() - 1.0) * (1.0 / temperature) + row_HVB1 + column_HV1K


def _column_mass(cosines_HVBK: torch.Tensor, row_HVB1: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mass of each cluster before the columns are scaled, (H, V, 1, K)."""
    return _log_target(cosines_HVBK, row_HVB1, 0.0, temperature).exp().sum(dim=2, keepdim=True)


def _scales(
    cosines_HVBK: torch.Tensor, mass_HV1K: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of the scales of rows (H, V, B, 1) and columns (H, V, 1, K) that give every cluster of `mass` the
    same, then every row a sum of 1."""
    column_HV1K = -mass_HV1K.log()
    column_HV1K = column_HV1K - column_HV1K.amax(dim=-1, keepdim=True)
    row_sum = _log_target(cosines_HVBK, 0.0, column_HV1K, temperature).exp().sum(dim=-1, keepdim=True)
    return -row_sum.log(), column_HV1K


def _statistics(
    cosines_HVBK: torch.Tensor, row_HVB1: torch.Tensor, column_HV1K: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q_HVBK = _log_target(cosines_HVBK, row_HVB1, column_HV1K, temperature).exp()
    agreement_HB = (q_HVBK[:, 0] * q_HVBK[:, 1]).sum(dim=-1)
    return q_HVBK.sum(dim=(1, 2)), agreement_HB.sum(dim=0), cosines_HVBK[:, 0].argmax(dim=-1)


def _losses(
    student_HVBK: torch.Tensor, teacher_HVBK: torch.Tensor, row_HVB1: torch.Tensor, column_HV1K: torch.Tensor,
    log_prior_HK: torch.Tensor, weight_B: torch.Tensor, ce_weight: torch.Tensor, scale: torch.Tensor,
    student_temperature: float, teacher_temperature: float, beta: float, gradient_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss (H,); `scale` times its slope by the student's cosines (H, n, K); and the sum of slope times cosine
    (H, n, 1), which is what the normalisation takes out of it again."""
    H, V, B, K = student_HVBK.shape
    cosines = student_HVBK.float()
    # Less the most that they can be, so that no pass is needed to look for it; see `can_fuse`.
    logits = (cosines - 1.0) * (1.0 / student_temperature)
    # Each view's student is compared with the other view's teacher.
    other_log_target = _log_target(teacher_HVBK, row_HVB1, column_HV1K, teacher_temperature).flip(1)
    shared = (logits + other_log_target) * beta - log_prior_HK[:, None, None]
    log_norm, log_shared = (terms.exp().sum(dim=-1, keepdim=True).log() for terms in (logits, shared))
    student = (logits - log_norm).exp()
    pseudo_label = other_log_target.argmax(dim=-1, keepdim=True)
    is_pseudo_label = (torch.arange(K, device=cosines.device) == pseudo_label).float()
    weight_B1 = weight_B[:, None]
    loss_HVB1 = -0.5 * weight_B1 * (log_shared - beta * log_norm)
    loss_HVB1 = loss_HVB1 + 0.5 * ce_weight * (log_norm - (logits * is_pseudo_label).sum(dim=-1, keepdim=True))
    slope = -0.5 * beta * weight_B1 * ((shared - log_shared).exp() - student)
    slope = (slope + 0.5 * ce_weight * (student - is_pseudo_label)) * (scale / student_temperature)
    radial_HVB1 = (slope * cosines).sum(dim=-1, keepdim=True)
    return loss_HVB1.sum(dim=(1, 2, 3)), slope.to(gradient_dtype).view(H, V * B, K), radial_HVB1.view(H, V * B, 1)


def _backward(
    hidden_weight_HMS: torch.Tensor, hidden_bias_HM: torch.Tensor, bottleneck_weight_HPM: torch.Tensor,
    bottleneck_bias_HP: torch.Tensor, prototypes_HKP: torch.Tensor, inputs: torch.Tensor, hidden_HnM: torch.Tensor,
    activation_HnM: torch.Tensor, unit_HnP: torch.Tensor, inverse_norm_Hn1: torch.Tensor, slope_HnK: torch.Tensor,
    radial_Hn1: torch.Tensor, hidden_weight_gradient_HMS: torch.Tensor, hidden_bias_gradient_HM: torch.Tensor,
    bottleneck_weight_gradient_HPM: torch.Tensor, bottleneck_bias_gradient_HP: torch.Tensor,
    prototypes_gradient_HKP: torch.Tensor,
) -> None:  # fmt: skip
    """As `model.backward`. With u the unit output, of norm 1/r, and p a unit prototype: the slope by the output is
    r (sum of slope times p, less u times the radial part)."""
    H, n, _ = slope_HnK.shape
    dtype, slope_dtype = inputs.dtype, slope_HnK.dtype
    norm_HK1 = prototypes_HKP.norm(dim=-1, keepdim=True).clamp_min(NORM_EPS)
    unit_prototypes_HKP = prototypes_HKP / norm_HK1
    unit_gradient_HKP = torch.bmm(slope_HnK.transpose(1, 2), unit_HnP.to(slope_dtype)).float()
    radial_HK1 = (unit_gradient_HKP * unit_prototypes_HKP).sum(dim=-1, keepdim=True)
    prototypes_gradient_HKP.copy_((unit_gradient_HKP - radial_HK1 * unit_prototypes_HKP) / norm_HK1)

    unit_gradient_HnP = torch.bmm(slope_HnK, unit_prototypes_HKP.to(slope_dtype)).float()
    bottleneck_gradient_HnP = (unit_gradient_HnP - radial_Hn1 * unit_HnP) * inverse_norm_Hn1
    bottleneck_bias_gradient_HP.copy_(bottleneck_gradient_HnP.sum(dim=1))
    bottleneck_gradient = bottleneck_gradient_HnP.to(dtype)
    bottleneck_weight_gradient_HPM.copy_(weight_gradient(bottleneck_gradient, activation_HnM))
    activation_gradient_HnM = torch.bmm(bottleneck_gradient, bottleneck_weight_HPM.to(dtype))
    hidden_gradient_HnM = torch.ops.aten.gelu_backward(activation_gradient_HnM, hidden_HnM)
    # As a product, or what is summed would be computed twice.
    ones_H1n = torch.ones((H, 1, n), dtype=dtype, device=inputs.device)
    hidden_bias_gradient_HM.copy_(torch.bmm(ones_H1n, hidden_gradient_HnM).squeeze(1))
    hidden_weight_gradient_HMS.copy_(weight_gradient(hidden_gradient_HnM, inputs))
