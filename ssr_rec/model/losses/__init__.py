"""Losses of tasks: of one row each, with how a logit becomes a prediction.

    loss = MSE(MSEConfig(), number)             # number: what the schema says of the label
    loss(logits, labels)                        # (B,), (B,) -> (B,)
    loss.link().predict(logits.numpy())         # in the label's units

``TaskLoss`` is the contract; ``ssr_rec/config/losses.py`` has the settings, ``docs/losses.md`` shows their use.
"""

from ssr_rec.model.losses.base import TaskLoss

__all__ = ["TaskLoss"]
