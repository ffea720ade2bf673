"""AdamW of all heads against torch.optim's."""

from __future__ import annotations

import subprocess
import sys

import torch

from icce_ray.methods.heads.model import HeadParameters
from icce_ray.methods.heads.optimizer import BIASES, Moments, adamw_update


def parameters() -> HeadParameters:
    return HeadParameters.initialise(range(2), 5, 4, 3, 6, seed=0).map(lambda tensor: tensor + 0.1)


def test_it_moves_parameters_as_torchs_does_and_leaves_what_is_frozen() -> None:
    ours = parameters()
    theirs = {name: torch.nn.Parameter(tensor) for name, tensor in parameters().named().items()}
    moments = Moments(ours.map(torch.zeros_like), ours.map(torch.zeros_like))
    groups = [
        {"params": [tensor for name, tensor in theirs.items() if name not in BIASES], "weight_decay": 0.1},
        {"params": [theirs[name] for name in BIASES], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, fused=True)
    torch.manual_seed(0)
    for step in range(8):
        frozen = ["prototypes_HKP"] if step < 3 else []
        gradient = ours.map(torch.randn_like)
        for name, tensor in gradient.named().items():
            theirs[name].grad = None if name in frozen else tensor.clone()
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        reference.step()
        num_updates = {name: step for name in theirs if name not in frozen}
        if not frozen:
            num_updates["prototypes_HKP"] = step - 3
        adamw_update(ours, gradient, moments, num_updates, 0.01 * (step + 1), weight_decay=0.1)
    for name, tensor in ours.named().items():
        assert torch.equal(tensor, theirs[name]), name


def test_training_does_not_import_torchs_compiler() -> None:
    script = """
import sys
import numpy as np
from icce_ray import ICCE

features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
ICCE(2, n_heads=2, epochs=2, random_state=0).fit(features).predict(features)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
