"""Adam with the interface and the state layout of Apex's ``FusedAdam``, computed by torch.

Upstream's distributed optimizer is written for that layout: the step is counted once a parameter
group (``group["step"]``), and a parameter's state is exactly ``exp_avg`` and ``exp_avg_sq``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from flagscale.errors import ConfigError

__all__ = ["FusedAdam"]


class FusedAdam(torch.optim.Optimizer):
    """Adam (L2 penalty) or AdamW (decoupled weight decay) with one step counter a group.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: L2 penalty, or decoupled decay when ``adam_w_mode``.
        adam_w_mode: Decouple the weight decay (AdamW).
        capturable: Refused: CUDA graphs of the optimizer need Transformer Engine or Apex.
        unsupported: Anything else upstream would hand to Transformer Engine's optimizer.

    Raises:
        ConfigError: On an option only Transformer Engine's or Apex's kernel has.

    Source: Kingma and Ba 2015 (Adam), Loshchilov and Hutter 2019 (AdamW); the update itself is
    ``torch.optim``'s functional one.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
        **unsupported: Any,
    ) -> None:
        refused = sorted(unsupported) + (["capturable"] if capturable else [])
        if refused:
            raise ConfigError(
                "the optimizer options asked for exist only in Transformer Engine's Adam",
                where="torch fallback of the distributed optimizer's Adam",
                got=", ".join(refused),
                cure=(
                    "install Transformer Engine, or drop --use-precision-aware-optimizer and "
                    "--optimizer-cuda-graph"
                ),
            )
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._update = adamw if adam_w_mode else adam

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._update_group(group)
        return loss

    def _update_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        # torch's function counts the step itself, in one tensor a parameter.
        steps_before = [torch.tensor(float(group["step"] - 1)) for _ in params]
        beta1, beta2 = group["betas"]
        self._update(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            steps_before,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
