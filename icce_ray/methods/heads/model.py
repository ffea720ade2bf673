"""All heads as stacked parameters, so that one matrix product, one optimiser and one moving average serve them all.

H heads, D feature dimension, S of them that a head sees, M hidden width, P bottleneck width, K clusters, n rows. A head
is Linear(S, M) - GELU - Linear(M, P) - L2-normalise - weight-normalised Linear(P, K) without bias (METHOD section 2).
Inputs are (n, S), the same for all heads, or (H, n, S), a head's own.
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

    hidden_weight_HMS: torch.Tensor
    hidden_bias_HM: torch.Tensor
    bottleneck_weight_HPM: torch.Tensor
    bottleneck_bias_HP: torch.Tensor
    prototypes_HKP: torch.Tensor

    @classmethod
    def initialise(
        cls,
        num_heads: int,
        num_inputs: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_clusters: int,
        seed: int,
        input_share: float = 1.0,
    ) -> HeadParameters:
        """Weights truncated normal (deviation 0.02), biases 0. Head h depends on `seed` and h alone, so the first heads
        of a larger ensemble are those of a smaller one. Where the inputs are a share of the features, the first layer's
        weights are larger, so that what it gives is not smaller."""
        parameters = cls(
            hidden_weight_HMS=torch.empty(num_heads, hidden_dim, num_inputs),
            hidden_bias_HM=torch.zeros(num_heads, hidden_dim),
            bottleneck_weight_HPM=torch.empty(num_heads, bottleneck_dim, hidden_dim),
            bottleneck_bias_HP=torch.zeros(num_heads, bottleneck_dim),
            prototypes_HKP=torch.empty(num_heads, num_clusters, bottleneck_dim),
        )
        weights = (parameters.hidden_weight_HMS, parameters.bottleneck_weight_HPM, parameters.prototypes_HKP)
        for head in range(num_heads):
            generator = torch.Generator().manual_seed(_mix_seed(seed, head))
            for weight in weights:
                torch.nn.init.trunc_normal_(weight[head], std=INIT_STD, generator=generator)
        if input_share < 1.0:
            parameters.hidden_weight_HMS.div_(input_share**0.5)
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

    hidden_HnM: torch.Tensor
    activation_HnM: torch.Tensor
    bottleneck_HnP: torch.Tensor
    inverse_norm_Hn1: torch.Tensor
    unit_prototypes_HKP: torch.Tensor
    logits_HnK: torch.Tensor


def head_logits(parameters: HeadParameters, inputs: torch.Tensor) -> torch.Tensor:
    """Cosine of each row's bottleneck output with each head's prototypes.

    Args:
        parameters: of the heads to run, float32.
        inputs: normalised features, (n, S) or (H, n, S), in the dtype of the matrix products.

    Returns:
        float32 (H, n, K), in -1..1.
    """
    return forward(parameters, inputs).logits_HnK


def linear(weight_HMS: torch.Tensor, bias_HM: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """A layer of S inputs and M outputs of each head, (H, n, M), in the dtype of the inputs."""
    H, M, S = weight_HMS.shape
    weight_HMS, bias_HM = weight_HMS.to(inputs.dtype), bias_HM.to(inputs.dtype)
    if inputs.dim() == 3:
        return torch.baddbmm(bias_HM.unsqueeze(1), inputs, weight_HMS.transpose(1, 2))
    # Of inputs that all heads share, it is one product.
    hidden = F.linear(inputs, weight_HMS.view(H * M, S), bias_HM.view(H * M))
    return hidden.view(-1, H, M).transpose(0, 1)


def weight_gradient(gradient_HnM: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """(H, M, S), from the gradient with respect to what :func:`linear` gives."""
    H, n, M = gradient_HnM.shape
    if inputs.dim() == 3:
        return torch.bmm(gradient_HnM.transpose(1, 2), inputs)
    flat = gradient_HnM.transpose(0, 1).reshape(n, H * M)
    return (flat.t() @ inputs).view(H, M, -1)


def forward(parameters: HeadParameters, inputs: torch.Tensor) -> ForwardCache:
    """As :func:`head_logits`, with what :func:`backward` needs. Outside autograd."""
    hidden_HnM = linear(parameters.hidden_weight_HMS, parameters.hidden_bias_HM, inputs)
    activation_HnM = F.gelu(hidden_HnM)
    bottleneck_HnP = linear(parameters.bottleneck_weight_HPM, parameters.bottleneck_bias_HP, activation_HnM).float()
    # Cosines are divided by a small temperature next: bfloat16's three digits would not do. This product is small.
    inverse_norm_Hn1 = bottleneck_HnP.square().sum(dim=-1, keepdim=True).clamp_min(NORM_EPS).rsqrt_()
    unit_prototypes_HKP = F.normalize(parameters.prototypes_HKP, dim=-1)
    logits_HnK = torch.bmm(bottleneck_HnP, unit_prototypes_HKP.transpose(1, 2)).mul_(inverse_norm_Hn1)
    return ForwardCache(hidden_HnM, activation_HnM, bottleneck_HnP, inverse_norm_Hn1, unit_prototypes_HKP, logits_HnK)


def backward(
    parameters: HeadParameters,
    inputs: torch.Tensor,
    cache: ForwardCache,
    logits_gradient_HnK: torch.Tensor,
    gradient: HeadParameters,
) -> None:
    """Write the gradient of a loss into `gradient`, given its gradient with respect to the logits.

    Written out because autograd would keep and convert every float32 intermediate of the two normalisations: that costs
    as much as the products. With y the bottleneck output and p a unit prototype, z = (y/|y|).p gives
    dz/dy = (p - z y/|y|) / |y|.
    """
    dtype = inputs.dtype
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
    gradient.bottleneck_weight_HPM.copy_(weight_gradient(bottleneck_gradient, cache.activation_HnM))
    activation_gradient_HnM = torch.bmm(bottleneck_gradient, parameters.bottleneck_weight_HPM.to(dtype))
    hidden_gradient_HnM = torch.ops.aten.gelu_backward(activation_gradient_HnM, cache.hidden_HnM)
    gradient.hidden_bias_HM.copy_(hidden_gradient_HnM.sum(dim=1, dtype=torch.float32))
    gradient.hidden_weight_HMS.copy_(weight_gradient(hidden_gradient_HnM, inputs))


def _mix_seed(seed: int, head: int) -> int:
    return int(np.random.SeedSequence([seed, head]).generate_state(1, np.uint64)[0] >> 1)
