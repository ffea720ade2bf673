"""All heads as stacked parameters, so that one matrix product, one optimiser and one moving average serve them all.

H heads, D feature dimension, M hidden width, P bottleneck width, K clusters, n rows. A head is
Linear(D, M) - GELU - Linear(M, P) - L2-normalise - weight-normalised Linear(P, K) without bias (METHOD section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

INIT_STD = 0.02
NORM_EPS = 1e-12


@dataclass
class HeadParameters:
    """Parameters of a run of heads: float32, contiguous, heads first."""

    hidden_weight_HMD: torch.Tensor
    hidden_bias_HM: torch.Tensor
    bottleneck_weight_HPM: torch.Tensor
    bottleneck_bias_HP: torch.Tensor
    prototypes_HKP: torch.Tensor

    @classmethod
    def initialise(
        cls, num_heads: int, dim: int, hidden_dim: int, bottleneck_dim: int, num_clusters: int, seed: int
    ) -> HeadParameters:
        """Weights truncated normal (deviation 0.02), biases 0. Head h depends on `seed` and h alone, so the first heads
        of a larger ensemble are those of a smaller one."""
        parameters = cls(
            hidden_weight_HMD=torch.empty(num_heads, hidden_dim, dim),
            hidden_bias_HM=torch.zeros(num_heads, hidden_dim),
            bottleneck_weight_HPM=torch.empty(num_heads, bottleneck_dim, hidden_dim),
            bottleneck_bias_HP=torch.zeros(num_heads, bottleneck_dim),
            prototypes_HKP=torch.empty(num_heads, num_clusters, bottleneck_dim),
        )
        weights = (parameters.hidden_weight_HMD, parameters.bottleneck_weight_HPM, parameters.prototypes_HKP)
        for head in range(num_heads):
            generator = torch.Generator().manual_seed(_mix_seed(seed, head))
            for weight in weights:
                torch.nn.init.trunc_normal_(weight[head], std=INIT_STD, generator=generator)
        return parameters

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def named(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> HeadParameters:
        """The same structure with `function` applied to every tensor."""
        return HeadParameters(**{name: function(tensor) for name, tensor in self.named().items()})

    def heads(self, heads: slice) -> HeadParameters:
        """Views of some of the heads."""
        return self.map(lambda tensor: tensor[heads])

    @property
    def num_heads(self) -> int:
        return self.prototypes_HKP.shape[0]

    @property
    def num_clusters(self) -> int:
        return self.prototypes_HKP.shape[1]


@dataclass
class ForwardCache:
    """What the backward pass needs of the forward pass."""

    hidden_nHM: torch.Tensor
    activation_nHM: torch.Tensor
    bottleneck_HnP: torch.Tensor
    inverse_norm_Hn1: torch.Tensor
    unit_prototypes_HKP: torch.Tensor
    logits_HnK: torch.Tensor


def head_logits(parameters: HeadParameters, inputs_nD: torch.Tensor) -> torch.Tensor:
    """Cosine of each row's bottleneck output with each head's prototypes.

    Args:
        parameters: of the heads to run, float32.
        inputs_nD: normalised features in the dtype of the matrix products.

    Returns:
        float32 (H, n, K), in -1..1.
    """
    return forward(parameters, inputs_nD).logits_HnK


def forward(parameters: HeadParameters, inputs_nD: torch.Tensor) -> ForwardCache:
    """As :func:`head_logits`, with what :func:`backward` needs. Outside autograd."""
    H, M, D = parameters.hidden_weight_HMD.shape
    n, dtype = inputs_nD.shape[0], inputs_nD.dtype
    # The input is shared, so the first layer of all heads is one product.
    hidden_weight = parameters.hidden_weight_HMD.view(H * M, D).to(dtype)
    hidden = F.linear(inputs_nD, hidden_weight, parameters.hidden_bias_HM.view(H * M).to(dtype))
    activation_nHM = F.gelu(hidden).view(n, H, M)
    bottleneck_HnP = torch.baddbmm(
        parameters.bottleneck_bias_HP.to(dtype).unsqueeze(1),
        activation_nHM.transpose(0, 1),
        parameters.bottleneck_weight_HPM.to(dtype).transpose(1, 2),
    ).float()
    # Cosines are divided by a small temperature next: bfloat16's three digits would not do. This product is small.
    inverse_norm_Hn1 = bottleneck_HnP.square().sum(dim=-1, keepdim=True).clamp_min(NORM_EPS).rsqrt_()
    unit_prototypes_HKP = F.normalize(parameters.prototypes_HKP, dim=-1)
    logits_HnK = torch.bmm(bottleneck_HnP, unit_prototypes_HKP.transpose(1, 2)).mul_(inverse_norm_Hn1)
    return ForwardCache(
        hidden.view(n, H, M), activation_nHM, bottleneck_HnP, inverse_norm_Hn1, unit_prototypes_HKP, logits_HnK
    )


def backward(
    parameters: HeadParameters,
    inputs_nD: torch.Tensor,
    cache: ForwardCache,
    logits_gradient_HnK: torch.Tensor,
    gradient: HeadParameters,
) -> None:
    """Write the gradient of a loss into `gradient`, given its gradient with respect to the logits.

    Written out because autograd would keep and convert every float32 intermediate of the two normalisations: that costs
    as much as the products. With y the bottleneck output and p a unit prototype, z = (y/|y|).p gives
    dz/dy = (p - z y/|y|) / |y|.
    """
    H, n, _ = logits_gradient_HnK.shape
    dtype = inputs_nD.dtype
    scaled_HnK = logits_gradient_HnK * cache.inverse_norm_Hn1
    radial_Hn1 = (scaled_HnK * cache.logits_HnK).sum(dim=-1, keepdim=True).mul_(cache.inverse_norm_Hn1)
    bottleneck_gradient_HnP = torch.bmm(scaled_HnK, cache.unit_prototypes_HKP)
    bottleneck_gradient_HnP.addcmul_(radial_Hn1, cache.bottleneck_HnP, value=-1.0)

    unit_gradient_HKP = torch.bmm(scaled_HnK.transpose(1, 2), cache.bottleneck_HnP)
    radial_HK1 = (unit_gradient_HKP * cache.unit_prototypes_HKP).sum(dim=-1, keepdim=True)
    norm_HK1 = parameters.prototypes_HKP.norm(dim=-1, keepdim=True).clamp_min(NORM_EPS)
    gradient.prototypes_HKP.copy_((unit_gradient_HKP - radial_HK1 * cache.unit_prototypes_HKP) / norm_HK1)

    gradient.bottleneck_bias_HP.copy_(bottleneck_gradient_HnP.sum(dim=1))
    bottleneck_gradient = bottleneck_gradient_HnP.to(dtype)
    activation_HnM = cache.activation_nHM.transpose(0, 1)
    gradient.bottleneck_weight_HPM.copy_(torch.bmm(bottleneck_gradient.transpose(1, 2), activation_HnM))
    activation_gradient_HnM = torch.bmm(bottleneck_gradient, parameters.bottleneck_weight_HPM.to(dtype))
    hidden_gradient = torch.ops.aten.gelu_backward(activation_gradient_HnM.transpose(0, 1), cache.hidden_nHM)
    hidden_gradient = hidden_gradient.reshape(n, -1)
    gradient.hidden_bias_HM.copy_(hidden_gradient.sum(dim=0, dtype=torch.float32).view(H, -1))
    gradient.hidden_weight_HMD.copy_((hidden_gradient.t() @ inputs_nD).view_as(gradient.hidden_weight_HMD))


def _mix_seed(seed: int, head: int) -> int:
    return int(np.random.SeedSequence([seed, head]).generate_state(1, np.uint64)[0] >> 1)
