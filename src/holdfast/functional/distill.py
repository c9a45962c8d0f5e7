"""How far a model has moved from another one, measured where it speaks."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def next_token_kl(
    logits: Float[Tensor, "b t v"],
    reference: Float[Tensor, "b t v"],
    labels: Int[Tensor, "b t"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean KL(reference || model) over the positions that predict a target, both at `temperature`.

    labels: targets as a causal language model takes them (position i is predicted at i - 1; -100 is none). Without the
    factor temperature^2 that others put before it: LwF's loss (Li and Hoiem 2018) has none. 0 where there is no target.
    """
    targets = labels[:, 1:] != -100
    if not bool(targets.any()):
        return logits.sum() * 0.0
    new = functional.log_softmax(logits[:, :-1][targets].float() / temperature, dim=-1)
    old = functional.log_softmax(reference[:, :-1][targets].float() / temperature, dim=-1)
    return functional.kl_div(new, old, log_target=True, reduction="batchmean")


def squared_gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The squared gradient of each tensor that has one: one sample's part of a diagonal Fisher matrix.

    parameters: of any shape; each result has its parameter's, fp32 on its device. Source: EWC (Kirkpatrick et al.
    2017).
    """
    return {name: p.grad.detach().float().square() for name, p in parameters.items() if p.grad is not None}
