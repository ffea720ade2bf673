"""The heads: their parameters, stacked, and their forward and backward pass (docs/METHOD.md, "Architecture").

H heads, S feature dimensions that a head sees, M hidden width, P bottleneck width, K clusters, n rows. A head is
Linear(S, M) - GELU - Linear(M, P) - L2-normalise - weight-normalised Linear(P, K) without bias. Inputs are (n, S), the
same for all heads, or (H, n, S), each head's own. Products are in the dtype of the inputs; parameters, cosines and
gradients are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from icce_ray.random_numbers import seed_of

INIT_STD = 0.02
NORM_EPS = 1e-12


@dataclass
class HeadParameters:
    """Parameters of several heads: float32, contiguous, heads first."""

    hidden_weight_HMS: torch.Tensor
    hidden_bias_HM: torch.Tensor
    bottleneck_weight_HPM: torch.Tensor
    bottleneck_bias_HP: torch.Tensor
    prototypes_HKP: torch.Tensor

    @classmethod
    def initialise(
        cls, heads: range, num_inputs: int, hidden_dim: int, bottleneck_dim: int, num_clusters: int, seed: int,
        input_share: float = 1.0,
    ) -> HeadParameters:  # fmt: skip
        """Weights from a truncated normal of deviation 0.02, biases 0. Head h depends on `seed` and h alone, so the
        first heads of a larger ensemble are those of a smaller one. Where the inputs are a share of the features, the
        first layer's weights are larger, so that its output is not smaller."""
        num_heads = len(heads)
        parameters = cls(
            hidden_weight_HMS=torch.empty(num_heads, hidden_dim, num_inputs),
            hidden_bias_HM=torch.zeros(num_heads, hidden_dim),
            bottleneck_weight_HPM=torch.empty(num_heads, bottleneck_dim, hidden_dim),
            bottleneck_bias_HP=torch.zeros(num_heads, bottleneck_dim),
            prototypes_HKP=torch.empty(num_heads, num_clusters, bottleneck_dim),
        )
        weights = (parameters.hidden_weight_HMS, parameters.bottleneck_weight_HPM, parameters.prototypes_HKP)
        for row, head in enumerate(heads):
            generator = torch.Generator().manual_seed(seed_of(seed, head))
            for weight in weights:
                torch.nn.init.trunc_normal_(weight[row], std=INIT_STD, generator=generator)
        if input_share < 1.0:
            parameters.hidden_weight_HMS.div_(input_share**0.5)
        return parameters

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def named(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> HeadParameters:
        """The same structure with `function` applied to every tensor."""
        return HeadParameters(*map(function, self.tensors()))

    def heads(self, heads: slice) -> HeadParameters:
        """Views of some of the heads."""
        return self.map(lambda tensor: tensor[heads])


@dataclass(frozen=True)
class PrototypeDtypes:
    """Dtypes of the products with the prototypes. Cosines are divided by a small temperature next, for which bfloat16
    has too few digits."""

    cosines: torch.dtype = torch.float32
    gradients: torch.dtype = torch.float32


@dataclass
class ForwardCache:
    """The cosines, and intermediate results that the backward pass needs."""

    hidden_HnM: torch.Tensor
    activation_HnM: torch.Tensor
    bottleneck_weight_HPM: torch.Tensor
    """In the dtype of the products."""
    bottleneck_HnP: torch.Tensor
    inverse_norm_Hn1: torch.Tensor
    unit_prototypes_HKP: torch.Tensor
    cosines_HnK: torch.Tensor
    """Cosine of each row's bottleneck output with each prototype, float32, -1 to 1."""


def forward(
    parameters: HeadParameters, inputs: torch.Tensor, dtypes: PrototypeDtypes = PrototypeDtypes()
) -> ForwardCache:
    """The cosines of some heads for normalised features, (n, S) or (H, n, S) in the dtype of the products, and what
    :func:`backward` needs. Outside autograd."""
    hidden_HnM = _linear(parameters.hidden_weight_HMS.to(inputs.dtype), parameters.hidden_bias_HM, inputs)
    activation_HnM = F.gelu(hidden_HnM)
    bottleneck_weight = parameters.bottleneck_weight_HPM.to(inputs.dtype)
    bottleneck_HnP = _linear(bottleneck_weight, parameters.bottleneck_bias_HP, activation_HnM).float()
    inverse_norm_Hn1 = bottleneck_HnP.square().sum(dim=-1, keepdim=True).clamp_min(NORM_EPS).rsqrt_()
    unit_prototypes_HKP = F.normalize(parameters.prototypes_HKP, dim=-1)
    if dtypes.cosines == torch.float32:
        cosines_HnK = torch.bmm(bottleneck_HnP, unit_prototypes_HKP.transpose(1, 2)).mul_(inverse_norm_Hn1)
    else:  # float16 has a narrow range: it is given unit vectors
        unit_HnP = (bottleneck_HnP * inverse_norm_Hn1).to(dtypes.cosines)
        cosines_HnK = torch.bmm(unit_HnP, unit_prototypes_HKP.to(dtypes.cosines).transpose(1, 2)).float()
    return ForwardCache(
        hidden_HnM, activation_HnM, bottleneck_weight, bottleneck_HnP, inverse_norm_Hn1, unit_prototypes_HKP,
        cosines_HnK,
    )  # fmt: skip


def backward(
    parameters: HeadParameters,
    inputs: torch.Tensor,
    cache: ForwardCache,
    cosines_gradient_HnK: torch.Tensor,
    dtypes: PrototypeDtypes = PrototypeDtypes(),
) -> HeadParameters:
    """The gradient of a loss with respect to the parameters, given its gradient with respect to the cosines.

    Written out because autograd would keep and convert every float32 intermediate of the two normalisations, which
    costs as much as the products. With y the bottleneck output and p a unit prototype, z = (y/|y|).p gives
    dz/dy = (p - z y/|y|) / |y|.
    """
    scaled_HnK = cosines_gradient_HnK * cache.inverse_norm_Hn1
    radial_Hn1 = (scaled_HnK * cache.cosines_HnK).sum(dim=-1, keepdim=True).mul_(cache.inverse_norm_Hn1)
    scaled_HnK = scaled_HnK.to(dtypes.gradients)
    bottleneck_gradient_HnP = torch.bmm(scaled_HnK, cache.unit_prototypes_HKP.to(dtypes.gradients)).float()
    bottleneck_gradient_HnP = bottleneck_gradient_HnP.addcmul(radial_Hn1, cache.bottleneck_HnP, value=-1.0)

    unit_gradient_HKP = torch.bmm(scaled_HnK.transpose(1, 2), cache.bottleneck_HnP.to(dtypes.gradients)).float()
    radial_HK1 = (unit_gradient_HKP * cache.unit_prototypes_HKP).sum(dim=-1, keepdim=True)
    norm_HK1 = parameters.prototypes_HKP.norm(dim=-1, keepdim=True).clamp_min(NORM_EPS)

    bottleneck_gradient = bottleneck_gradient_HnP.to(inputs.dtype)
    activation_gradient_HnM = torch.bmm(bottleneck_gradient, cache.bottleneck_weight_HPM)
    hidden_gradient_HnM = torch.ops.aten.gelu_backward(activation_gradient_HnM, cache.hidden_HnM)
    return HeadParameters(
        hidden_weight_HMS=_weight_gradient(hidden_gradient_HnM, inputs),
        hidden_bias_HM=hidden_gradient_HnM.sum(dim=1, dtype=torch.float32),
        bottleneck_weight_HPM=_weight_gradient(bottleneck_gradient, cache.activation_HnM),
        bottleneck_bias_HP=bottleneck_gradient_HnP.sum(dim=1),
        prototypes_HKP=(unit_gradient_HKP - radial_HK1 * cache.unit_prototypes_HKP) / norm_HK1,
    )


def _linear(weight_HMS: torch.Tensor, bias_HM: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """A layer of S inputs and M outputs of each head, (H, n, M), in the dtype of the inputs."""
    H, M, S = weight_HMS.shape
    bias_HM = bias_HM.to(inputs.dtype)
    if inputs.dim() == 3:
        return torch.baddbmm(bias_HM.unsqueeze(1), inputs, weight_HMS.transpose(1, 2))
    # Inputs that all heads share make it one product.
    hidden = F.linear(inputs, weight_HMS.view(H * M, S), bias_HM.view(H * M))
    return hidden.view(-1, H, M).transpose(0, 1)


def _weight_gradient(gradient_HnM: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Float32 (H, M, S), from the gradient with respect to the output of :func:`_linear`."""
    H, n, M = gradient_HnM.shape
    if inputs.dim() == 3:
        return torch.bmm(gradient_HnM.transpose(1, 2), inputs).float()
    flat = gradient_HnM.transpose(0, 1).reshape(n, H * M)
    return (flat.t() @ inputs).float().view(H, M, -1)
