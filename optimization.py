"""How a stage's weights are updated: AdamW, the warm-up of its learning rates, and the average of
the weights."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine import parameters
from groundwork.errors import UserError


def make_optimizer(parts, rates, weight_decay=0.0):
    """AdamW (Loshchilov and Hutter, 2019), whose decay is no part of the gradient; without decay it
    is Adam.

    What is usual to leave alone does not decay: biases, the scales of norms, and embeddings.

    Args:
        parts: modules, of which it changes what takes gradients.
        rates: name of the option -> learning rate, for each of the parts in their order.
        weight_decay: a matrix loses `rate * weight_decay` of itself in each update.

    Returns:
        the optimizer; a group of its parameters has as "rate" the name of the option that its
        learning rate is from.
    """
    groups = []
    for part, (name, rate) in zip(parts, rates.items(), strict=True):
        own = [p for p in part.parameters() if p.requires_grad]
        group = {"params": own, "lr": rate, "weight_decay": 0.0, "rate": name}
        if not weight_decay:
            groups.append(group)
            continue
        embeddings = {m.weight for m in part.modules() if isinstance(m, nn.Embedding)}
        matrices = {p for p in own if p.dim() > 1} - embeddings
        decaying, others = ([p for p in own if (p in matrices) is which] for which in (True, False))
        groups.append(group | {"params": decaying, "weight_decay": weight_decay})
        groups.append(group | {"params": others})
    return torch.optim.AdamW(groups, fused=True)


def rates_of(optimizer):
    """Name of the option -> learning rate now, without the warm-up."""
    return {group["rate"]: group["lr"] for group in optimizer.param_groups}


class Updates:
    """The optimizer of a stage, and what goes with each of its updates, by hooks: the rates are
    warmed up before it, and weights averaged after it.

    Args:
        parts: name -> module to train.
        rates: see `make_optimizer`.
        config: a `config.TrainingConfig`, of which these count:
            weight_decay: see `make_optimizer`.
            warmup: updates over which the rates rise in proportion to the updates done: they are
                multiplied by min(1, n / warmup) for the n-th. What the groups of the optimizer
                hold, and the schedule changes, stays the rate after the warm-up.
            ema: δ of the moving average δ·average + (1 - δ)·weights; 0: nothing is averaged. The
                first update's weights are the first average; at the n-th n / (n + 9) is taken for
                δ where that is less, so that these are soon forgotten, as TensorFlow does.

    Attributes:
        count: updates done in the stage.
        averages: name -> `AveragedModel`, empty where nothing is averaged.
    """

    def __init__(self, parts, rates, config):
        self.parts, self.option_rates, self.config, self.count = parts, rates, config, 0
        self.optimizer = self._make_optimizer(config.weight_decay)
        self.optimizer.register_step_pre_hook(self._before)
        self.optimizer.register_step_post_hook(self._after)

        def average(averages, weights, n):
            decay = min(config.ema, float((1 + n) / (10 + n)))
            get_ema_multi_avg_fn(decay)(averages, weights, n)

        averaged = parts if config.ema else {}
        self.averages = {
            name: AveragedModel(part, multi_avg_fn=average) for name, part in averaged.items()
        }

    def _make_optimizer(self, weight_decay):
        return make_optimizer(self.parts.values(), self.option_rates, weight_decay)

    def rates(self):
        """The learning rates of the update that was the last, a list in the order of the parts."""
        return [rate * self._warmth(self.count) for rate in rates_of(self.optimizer).values()]

    def _warmth(self, n):
        return min(1.0, n / self.config.warmup) if self.config.warmup else 1.0

    def averaged(self):
        """Name -> module with the averaged weights."""
        return {name: average.module for name, average in self.averages.items()}

    def _before(self, optimizer, *_):
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self._warmth(self.count + 1)

    def _after(self, optimizer, *_):
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.count += 1
        for name, average in self.averages.items():
            average.update_parameters(self.parts[name])

    # -------------------------------------------------------------------------------- saving

    def contents(self):
        """What a checkpoint holds beside the averaged weights, which stand in the place of those
        that training goes on with: see `checkpoints.OPTIONAL`."""
        if not self.averages:
            return {}
        raw = {name: part.state_dict() for name, part in self.parts.items()}
        averaged = [int(average.n_averaged) for average in self.averages.values()]
        return {"raw": raw, "averaged": averaged[0]}

    def restore(self, checkpoint):
        """Goes on from a checkpoint of the stage, whose averaged weights, if it has them, are those
        of the parts now. Learning rates that differ from its run's apply from here on.

        Raises:
            UserError: it is of other weights.
        """
        before = checkpoint["options"]
        decay, tuned = before.get("weight_decay") or 0.0, before.get("tune_from", 8)
        if "encoder" in self.parts and tuned != self.config.tune_from:
            raise UserError(
                f"the checkpoint's fine-tuning trains the encoder's stages from stride {tuned} on: "
                f"continue it with --tune_from {tuned}, or begin anew with --overwrite"
            )
        if bool(decay) == bool(self.config.weight_decay):
            load_optimizer(self.optimizer, checkpoint["optimizer"])
        else:  # its parameters were grouped otherwise
            theirs = self._make_optimizer(decay)
            load_optimizer(theirs, checkpoint["optimizer"])
            self.optimizer.state.update(theirs.state)
            for group in self.optimizer.param_groups:
                group["lr"] = rates_of(theirs)[group["rate"]]
        for group in self.optimizer.param_groups:
            if self.option_rates[group["rate"]] != before.get(group["rate"]):
                group["lr"] = self.option_rates[group["rate"]]
        steps = [int(state["step"]) for state in self.optimizer.state.values()]
        self.count = max(steps, default=0)
        self._restore_averages(checkpoint.get("raw", {}), checkpoint.get("averaged", 0))

    def _restore_averages(self, raw, count):
        for name, weights in raw.items():
            try:
                self.parts[name].load_state_dict(weights)
            except (KeyError, RuntimeError) as error:
                raise UserError(
                    f"the checkpoint's weights before averaging are not of its {name}: start anew "
                    "with --overwrite"
                ) from error
        for average in self.averages.values():
            average.n_averaged.fill_(count)


# ------------------------------------------------------------------------- its state from a file


@torch.no_grad()
def load_optimizer(optimizer, state):
    """Gives Adam the state of a checkpoint.

    Raises:
        UserError: the state is not that of these parameters: fused updates trust it.
    """
    groups = optimizer.state_dict()["param_groups"]
    own = parameters(optimizer)
    theirs, moments = state.get("param_groups"), state.get("state")
    if (
        not isinstance(theirs, list)
        or not all(isinstance(group, dict) for group in theirs)
        or [group.get("params") for group in theirs] != [group["params"] for group in groups]
        or not all(same_form(group.get("lr"), 0.0) for group in theirs)
        or not isinstance(moments, dict)
        or not moments.keys() <= set(range(len(own)))
        or not all(_is_adams(moments[i], own[i]) for i in moments)
    ):
        raise UserError(
            "the checkpoint's optimizer is of another model: start anew with --overwrite"
        )
    copies = {  # laid out like the parameters
        i: {
            name: value if name == "step" else torch.empty_like(own[i]).copy_(value)
            for name, value in moments[i].items()
        }
        for i in moments
    }
    for group, their in zip(groups, theirs, strict=True):
        group["lr"] = their["lr"]  # all else is as training sets it
    optimizer.load_state_dict({"state": copies, "param_groups": groups})


def same_form(value, own):
    """Whether a state read from a file has the form of our own: numbers where it has numbers, and
    all else the same."""
    if isinstance(own, dict):
        return (
            isinstance(value, dict)
            and value.keys() == own.keys()
            and all(same_form(value[key], own[key]) for key in own)
        )
    if isinstance(own, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(own)
            and all(map(same_form, value, own))
        )
    if type(own) in (int, float):
        return type(value) in (int, float) and not math.isnan(value)
    return type(value) is type(own) and value == own


def _is_adams(state, parameter):
    """Whether a dict of tensors is Adam's state of a parameter."""
    return (
        isinstance(state, dict)
        and state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        and all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        and all(tensor.dtype is torch.float32 for tensor in state.values())
        and state["step"].shape == ()
        and state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    )
