from __future__ import annotations

import pytest
import torch

from icce_ray.methods.heads.model import HeadParameters, backward, forward

from .reference import ReferenceHead


def make_parameters(num_heads: int = 3) -> HeadParameters:
    parameters = HeadParameters.initialise(range(num_heads), 7, 16, 8, 5, seed=1)
    generator = torch.Generator().manual_seed(0)
    return parameters.map(lambda tensor: tensor + 0.1 * torch.randn(tensor.shape, generator=generator))


def test_cosines_are_those_of_one_module_per_head() -> None:
    parameters, x, own = make_parameters(), torch.randn(11, 7), torch.randn(3, 11, 7)
    for head in range(3):
        reference = ReferenceHead(parameters, head)
        torch.testing.assert_close(forward(parameters, x).cosines_HnK[head], reference(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            forward(parameters, own).cosines_HnK[head], reference(own[head]), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("num_heads", "is_shared"), [(1, True), (3, True), (3, False)])
def test_the_written_out_gradient_is_autograds(num_heads: int, is_shared: bool) -> None:
    parameters, x = make_parameters(num_heads), torch.randn(11, 7) if is_shared else torch.randn(num_heads, 11, 7)
    logits_gradient = torch.randn(num_heads, 11, 5)
    gradient = backward(parameters, x, forward(parameters, x), logits_gradient)
    for head in range(num_heads):
        reference = ReferenceHead(parameters, head)
        (reference(x if is_shared else x[head]) * logits_gradient[head]).sum().backward()
        for ours, theirs in [
            (gradient.hidden_weight_HMS, reference.hidden.weight.grad),
            (gradient.hidden_bias_HM, reference.hidden.bias.grad),
            (gradient.bottleneck_weight_HPM, reference.bottleneck.weight.grad),
            (gradient.bottleneck_bias_HP, reference.bottleneck.bias.grad),
            (gradient.prototypes_HKP, reference.prototypes.grad),
        ]:
            torch.testing.assert_close(ours[head], theirs, rtol=1e-4, atol=1e-5)


def test_a_head_does_not_depend_on_the_other_heads() -> None:
    some = HeadParameters.initialise(range(1, 3), 7, 16, 8, 5, seed=4)
    many = HeadParameters.initialise(range(6), 7, 16, 8, 5, seed=4)
    for name, tensor in some.named().items():
        assert torch.equal(tensor, many.named()[name][1:3])
    assert not torch.equal(many.prototypes_HKP[0], many.prototypes_HKP[1])


def test_bfloat16_products_keep_cosines_to_two_digits() -> None:
    parameters, x = make_parameters(), torch.randn(64, 7)
    exact, fast = (forward(parameters, inputs).cosines_HnK for inputs in (x, x.bfloat16()))
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, exact, rtol=0, atol=0.03)
