"""Stage 1 transcribed plainly from its formulas: one module per head, autograd, a Python loop over heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.model import HeadParameters


class ReferenceHead(torch.nn.Module):
    def __init__(self, parameters: HeadParameters, head: int, columns: torch.Tensor | None = None) -> None:
        super().__init__()
        self.columns = slice(None) if columns is None else columns
        self.hidden = torch.nn.Linear(1, 1)
        self.hidden.weight = torch.nn.Parameter(parameters.hidden_weight_HMS[head].clone())
        self.hidden.bias = torch.nn.Parameter(parameters.hidden_bias_HM[head].clone())
        self.bottleneck = torch.nn.Linear(1, 1)
        self.bottleneck.weight = torch.nn.Parameter(parameters.bottleneck_weight_HPM[head].clone())
        self.bottleneck.bias = torch.nn.Parameter(parameters.bottleneck_bias_HP[head].clone())
        self.prototypes = torch.nn.Parameter(parameters.prototypes_HKP[head].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = F.normalize(self.bottleneck(F.gelu(self.hidden(x[:, self.columns]))), dim=-1)
        return unit @ F.normalize(self.prototypes, dim=-1).T


def sinkhorn(logits: torch.Tensor, temperature: float, num_iterations: int, balance: float = 1.0) -> torch.Tensor:
    num_images, num_clusters = logits.shape
    kernel = torch.exp(logits.double() / temperature)
    images, clusters = torch.ones(num_images, 1).double(), torch.ones(num_clusters).double()
    for _ in range(num_iterations):
        clusters = (num_clusters * (kernel * images).sum(dim=0)) ** -balance
        images = 1 / (num_images * (kernel * clusters).sum(dim=1, keepdim=True))
    return (kernel * images * clusters * num_images).float()


class ReferenceTrainer:
    """Same schedule as the real trainer; batches of two views are handed in."""

    def __init__(
        self,
        parameters: HeadParameters,
        config: HeadsConfig,
        steps_per_epoch: int,
        columns_HS: torch.Tensor | None = None,
    ) -> None:
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        remembered = min(max(1, 0.05 * steps_per_epoch * config.num_epochs), 250)
        self.teacher_momentum = 1 - 1 / remembered if config.teacher_momentum == "auto" else config.teacher_momentum
        self.num_heads, self.num_clusters, _ = parameters.prototypes_HKP.shape
        seen = [None] * self.num_heads if columns_HS is None else list(columns_HS)
        self.students = [ReferenceHead(parameters, head, columns) for head, columns in enumerate(seen)]
        self.teachers = [ReferenceHead(parameters, head, columns) for head, columns in enumerate(seen)]
        self.priors = [torch.full((self.num_clusters,), 1.0 / self.num_clusters) for _ in range(self.num_heads)]
        self.optimizers = []
        for student in self.students:
            weights = [student.hidden.weight, student.bottleneck.weight, student.prototypes]
            biases = [student.hidden.bias, student.bottleneck.bias]
            groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": biases, "weight_decay": 0.0}]
            self.optimizers.append(torch.optim.AdamW(groups, lr=0.0))

    def targets(self, logits: torch.Tensor) -> torch.Tensor:
        if self.config.sinkhorn:
            return sinkhorn(logits, self.config.teacher_temperature, self.config.sinkhorn_iterations, self.balance)
        return F.softmax(logits / self.config.teacher_temperature, dim=-1)

    def step(self, view_a: torch.Tensor, view_b: torch.Tensor, step: int) -> list[float]:
        """One update; the loss of each head, mean over pairs."""
        config, num_pairs = self.config, len(view_a)
        position = step / self.steps_per_epoch
        # That of a head with few empty clusters.
        num_falls = max(1, round(0.2 * config.num_epochs))
        self.balance = max(0.0, 1 - int(position) / num_falls) if config.balance == "auto" else config.balance
        warmup_steps = min(config.warmup_epochs, config.num_epochs) * self.steps_per_epoch
        learning_rate = config.learning_rate * num_pairs / 256
        if step < warmup_steps:
            learning_rate *= (step + 1) / warmup_steps
        ce_weight = config.max_ce_weight * (1 - math.cos(math.pi * position / config.num_epochs)) / 2

        with torch.no_grad():
            pairs = [(self.targets(teacher(view_a)), self.targets(teacher(view_b))) for teacher in self.teachers]
        weight = sum((a * b).sum(dim=-1) for a, b in pairs) / self.num_heads
        losses = []
        for head, (target_a, target_b) in enumerate(pairs):
            batch_prior = torch.cat([target_a, target_b]).mean(dim=0)
            momentum = config.prior_momentum
            self.priors[head] = momentum * self.priors[head] + (1 - momentum) * batch_prior
            prior = self.priors[head]
            q_a = F.softmax(self.students[head](view_a) / config.student_temperature, dim=-1)
            q_b = F.softmax(self.students[head](view_b) / config.student_temperature, dim=-1)
            information_a = torch.log(((q_a * target_b) ** config.beta / prior).sum(dim=-1))
            information_b = torch.log(((q_b * target_a) ** config.beta / prior).sum(dim=-1))
            temi = -weight * (information_a + information_b) / 2
            entropy_a = F.nll_loss(q_a.log(), target_b.argmax(dim=-1), reduction="none")
            entropy_b = F.nll_loss(q_b.log(), target_a.argmax(dim=-1), reduction="none")
            loss = (temi + ce_weight * (entropy_a + entropy_b) / 2).mean()
            losses.append(loss.item())

            optimizer = self.optimizers[head]
            optimizer.zero_grad()
            # The loss of a step is the mean over heads.
            (loss / self.num_heads).backward()
            if position < config.freeze_last_layer_epochs:
                self.students[head].prototypes.grad = None
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        with torch.no_grad():
            for teacher, student in zip(self.teachers, self.students, strict=True):
                for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                    slow.copy_(self.teacher_momentum * slow + (1 - self.teacher_momentum) * fast)
        return losses
