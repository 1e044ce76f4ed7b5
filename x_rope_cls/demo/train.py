"""Training and evaluation: the same for every variant."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Split, Task
from .model import Classifier

BATCH = 64
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
_WARM_UP = 0.1  # of all steps


@dataclass(frozen=True)
class Result:
    """One training run.

    Attributes:
        model: with the weights of the epoch that had the lowest validation loss.
        epoch: which one that was, from 1.
        val_accuracy: at that epoch.
        test_accuracy: of those weights.
    """

    model: Classifier
    epoch: int
    val_accuracy: float
    test_accuracy: float


def steps_per_epoch(task: Task) -> int:
    """Batches of an epoch; the last one may be smaller."""
    return math.ceil(len(task.train) / BATCH)


def train(
    model: Classifier, task: Task, rotary: Any, epochs: int, seed: int, on_step: Callable[[], None] = lambda: None
) -> Result:
    """Trains a model and tests it once.

    Args:
        model: changed in place.
        task: the data.
        rotary: tables of the tokens, as the model takes them.
        epochs: passes over the training data.
        seed: of the order of the batches and of dropout.
        on_step: called after each step.
    """
    optimizer = make_optimizer(model)
    total = epochs * steps_per_epoch(task)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, total))
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    best_loss, best_epoch, best_accuracy, best_weights = math.inf, 0, 0.0, copy.deepcopy(model.state_dict())
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in _batches(task.train, order):
            training_step(model, optimizer, batch, rotary)
            schedule.step()
            on_step()
        loss, accuracy = evaluate(model, task.val, rotary)
        if loss < best_loss:
            best_loss, best_epoch, best_accuracy = loss, epoch, accuracy
            best_weights = copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    return Result(model, best_epoch, best_accuracy, evaluate(model, task.test, rotary)[1])


def make_optimizer(model: Classifier) -> torch.optim.Optimizer:
    """AdamW, without weight decay on biases, gains and tokens."""
    matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and not _is_token(name)]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=_LEARNING_RATE)


def _is_token(name: str) -> bool:
    return "token" in name or name == "pool.queries"


def training_step(model: Classifier, optimizer: torch.optim.Optimizer, batch: Split, rotary: Any) -> None:
    """Forward, backward and update on one batch."""
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(batch.x, batch.mask, rotary), batch.y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def logits(model: Classifier, split: Split, rotary: Any) -> Tensor:
    """(recordings, classes), in evaluation mode."""
    model.eval()
    parts = [split.rows(slice(start, start + 256)) for start in range(0, len(split), 256)]
    return torch.cat([model(part.x, part.mask, rotary) for part in parts])


def evaluate(model: Classifier, split: Split, rotary: Any) -> tuple[float, float]:
    """Mean cross entropy, and the share of recordings whose class is right."""
    found = logits(model, split, rotary)
    return F.cross_entropy(found, split.y).item(), accuracy(found, split.y)


def accuracy(found: Tensor, y: Tensor) -> float:
    """The share of rows whose largest logit is that of the right class."""
    return (found.argmax(dim=-1) == y).float().mean().item()


def _batches(split: Split, order: torch.Generator) -> Iterator[Split]:
    for index in torch.randperm(len(split), generator=order).split(BATCH):
        yield split.rows(index)


def _schedule(step: int, total: int) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to 0."""
    warm_up = max(1, round(_WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))
