"""A plugin by somebody else: an argument, listeners, a model hook and a patch."""

from __future__ import annotations

import functools
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from flagscale.errors import ConfigError
from flagscale.hooks import ExitEvent, ForwardLoss, Hooks, StepEvent, TrainStart
from flagscale.patches import Kind, Patch, PatchGroup
from flagscale.plugins import Plugin


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--example-journal", default=None, help="JSON lines of what was seen")
    parser.add_argument("--example-lr-factor", type=float, default=1.0)


def verify_arguments(args: Namespace) -> None:
    if args.example_lr_factor <= 0:
        raise ConfigError("the factor must be positive", where="--example-lr-factor")


def connect(hooks: Hooks, args: Namespace) -> None:
    def write(event: str, **facts: object) -> None:
        with open(args.example_journal, "a") as journal:
            journal.write(json.dumps({"event": event, **facts}) + "\n")

    def start(event: TrainStart) -> None:
        write("start", iteration=event.iteration, chunks=len(event.model))

    def loss(event: ForwardLoss) -> None:
        tokens = (event.token_losses.float() * event.loss_mask).sum(dim=1)
        write("loss", per_sample=(tokens / event.loss_mask.sum(dim=1)).tolist())

    def step(event: StepEvent) -> None:
        write("step", iteration=event.iteration, learning_rate=event.learning_rate)

    def end(event: ExitEvent) -> None:
        write("exit", exit_code=event.exit_code)

    hooks.on_train_start.append(start)
    hooks.on_forward_loss.append(loss)
    hooks.on_step_end.append(step)
    hooks.on_exit.append(end)


def pre_wrap_hooks(args: Namespace) -> list[Callable[[list[Any]], list[Any]]]:
    def name_the_chunks(model: list[Any]) -> list[Any]:
        for chunk in model:
            chunk.example_name = "seen"
        return model

    return [name_the_chunks]


def scale_lr(original: Callable[..., float]) -> Callable[..., float]:
    @functools.wraps(original)
    def get_lr(self: Any, param_group: dict[str, Any]) -> float:
        from megatron.training import get_args

        return original(self, param_group) * get_args().example_lr_factor

    return get_lr


PLUGIN = Plugin(
    name="example",
    patch_groups=(
        PatchGroup(
            name="example-lr",
            patches=(
                Patch(
                    "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.get_lr",
                    Kind.METHOD,
                    scale_lr,
                    "bdd1e022e1c9f647",
                ),
            ),
            reason="this team scales its learning rates",
            upstream="not a defect",
        ),
    ),
    add_arguments=add_arguments,
    verify_arguments=verify_arguments,
    pre_wrap_hooks=pre_wrap_hooks,
    connect=connect,
)
