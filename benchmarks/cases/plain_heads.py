"""The plain way to train many heads, to measure against: one module, one teacher and one optimiser a head, float32,
autograd, a Python loop. The same objective and the same draws."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.model import HeadParameters
from icce_ray.methods.heads.optimizer import teacher_momentum


class PlainHead(torch.nn.Module):
    def __init__(self, parameters: HeadParameters, head: int) -> None:
        super().__init__()
        num_hidden, dim = parameters.hidden_weight_HMS.shape[1:]
        num_bottleneck = parameters.bottleneck_weight_HPM.shape[1]
        self.hidden, self.bottleneck = torch.nn.Linear(dim, num_hidden), torch.nn.Linear(num_hidden, num_bottleneck)
        self.prototypes = torch.nn.Parameter(parameters.prototypes_HKP[head].clone())
        with torch.no_grad():
            self.hidden.weight.copy_(parameters.hidden_weight_HMS[head])
            self.hidden.bias.zero_()
            self.bottleneck.weight.copy_(parameters.bottleneck_weight_HPM[head])
            self.bottleneck.bias.zero_()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = F.normalize(self.bottleneck(F.gelu(self.hidden(inputs))), dim=-1)
        return output @ F.normalize(self.prototypes, dim=-1).T


class PlainTrainer:
    """Trains copies of the heads that `parameters` describes."""

    def __init__(
        self, parameters: HeadParameters, config: HeadsConfig, steps_per_epoch: int, device: str = "cpu"
    ) -> None:
        self.device = device
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.momentum = teacher_momentum(config, steps_per_epoch)
        self.norm = torch.nn.BatchNorm1d(parameters.hidden_weight_HMS.shape[2], affine=False).to(device)
        self.students = [PlainHead(parameters, head).to(device) for head in range(len(parameters.prototypes_HKP))]
        self.teachers = copy.deepcopy(self.students)
        self.priors = [
            torch.full((parameters.prototypes_HKP.shape[1],), 1 / parameters.prototypes_HKP.shape[1], device=device)
            for _ in self.students
        ]
        self.optimizers = [
            torch.optim.AdamW(head.parameters(), weight_decay=config.weight_decay) for head in self.students
        ]
        self.num_steps = 0

    def step(self, features: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> None:
        """One update on the pairs `rows` (2, B)."""
        config = self.config
        batch = torch.from_numpy(features[rows.ravel()].astype(np.float32)).to(self.device)
        view_a, view_b = self.norm(batch).chunk(2)
        with torch.no_grad():
            targets = [(self._targets(teacher(view_a)), self._targets(teacher(view_b))) for teacher in self.teachers]
        weight = torch.stack([(a * b).sum(dim=-1) for a, b in targets]).mean(dim=0)
        position = self.num_steps / self.steps_per_epoch
        ce_weight = config.max_ce_weight * (1 - np.cos(np.pi * position / config.num_epochs)) / 2
        rate = config.learning_rate * rows.shape[1] / 256 * min(1.0, (position + 1e-2) / max(config.warmup_epochs, 1))
        for head, (target_a, target_b) in enumerate(targets):
            prior = self.priors[head].lerp_(torch.cat([target_a, target_b]).mean(dim=0), 1 - config.prior_momentum)
            log_a = F.log_softmax(self.students[head](view_a) / config.student_temperature, dim=-1)
            log_b = F.log_softmax(self.students[head](view_b) / config.student_temperature, dim=-1)
            shared_a = ((log_a.exp() * target_b) ** config.beta / prior).sum(dim=-1)
            shared_b = ((log_b.exp() * target_a) ** config.beta / prior).sum(dim=-1)
            entropy = F.nll_loss(log_a, target_b.argmax(dim=-1)) + F.nll_loss(log_b, target_a.argmax(dim=-1))
            loss = -(weight * (shared_a.log() + shared_b.log())).mean() / 2 + ce_weight * entropy / 2
            self.optimizers[head].zero_grad()
            loss.backward()
            for group in self.optimizers[head].param_groups:
                group["lr"] = rate
            self.optimizers[head].step()
            with torch.no_grad():
                pairs = zip(self.teachers[head].parameters(), self.students[head].parameters(), strict=True)
                for slow, fast in pairs:
                    slow.lerp_(fast, 1 - self.momentum)
        self.num_steps += 1

    def label_matrix(self, features: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """(H, N) clusters by the teachers."""
        whole = torch.from_numpy(features.astype(np.float32))
        inputs = (whole - whole.mean(dim=0)) / whole.std(dim=0)
        with torch.no_grad():
            return torch.stack([teacher(inputs).argmax(dim=-1) for teacher in self.teachers]).numpy()

    def _targets(self, logits: torch.Tensor) -> torch.Tensor:
        log_q = logits / self.config.teacher_temperature
        for _ in range(self.config.sinkhorn_iterations):
            log_q = log_q - torch.logsumexp(log_q, dim=0, keepdim=True)
            log_q = torch.log_softmax(log_q, dim=1)
        return log_q.exp()
