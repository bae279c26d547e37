"""Whether the state of training in a checkpoint is whole, before a run goes on from it.

Lightning takes what it finds: of a loop without its progress, or of a callback whose state is empty, it says nothing,
and the run would go on from somewhere else. So what is there must be of the form that this trainer would save.
"""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from lightning_modules.callbacks import RandomState


def check(saved: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Refuses a state of training that is not whole.

    Args:
        saved: the checkpoint.
        trainer: the one that is to go on, with all its callbacks.

    Raises:
        ValueError: naming the first part that is missing or of another kind.
    """
    if found := _misfit(saved, trainer):
        raise ValueError(f"the checkpoint is damaged: {found}; use another copy, or an earlier checkpoint")


def _misfit(saved: Mapping[str, Any], trainer: L.Trainer) -> str | None:
    callbacks = saved["callbacks"]
    own = {callback.state_key: state for callback in trainer.callbacks if (state := callback.state_dict())}
    if not isinstance(callbacks, Mapping):
        return difference(callbacks, own, "callbacks")
    # A callback that is new in this run begins anew; without the random state the run would be another one.
    expected = {key: state for key, state in own.items() if key in callbacks or key == RandomState().state_key}
    for key, state in expected.items():
        if not callbacks.get(key):  # Lightning passes over what is empty
            return f"callbacks.{key} is {'empty' if key in callbacks else 'missing'}"
        if found := difference(callbacks[key], state, f"callbacks.{key}"):
            return found
    try:
        loops = saved["loops"]["fit_loop"]
        done = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    except (KeyError, TypeError):
        return "loops lacks the progress of training"
    progress = {key: value for key, value in trainer.fit_loop.state_dict().items() if key != "state_dict"}
    if found := difference({key: value for key, value in loops.items() if key != "state_dict"}, progress, "loops"):
        return found
    if "run" in saved and (found := difference(saved["run"], {"batches_that_stepped": 0, "trainer": {}}, "run")):
        return found
    steps, schedule = saved.get("schedule_steps"), saved["hyper_parameters"]["optimisation"]["schedule"]
    if type(steps) not in (int, float) or not steps > 0 or (steps == math.inf and schedule != "constant"):
        return f"schedule_steps is {steps!r:.40} and no number of steps"
    return None if done == saved["global_step"] else f"its global_step is {saved['global_step']} and its loops' {done}"


def difference(saved: Any, own: Any, name: str) -> str | None:
    """Where saved plain data is first of another form than our own; `None` if nowhere.

    Dicts have the same keys, or any where ours is empty, and numbers are of the same kind; counts are not negative.
    """
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            return f"{name} is {saved!r:.40} and no dict"
        for key in dict.fromkeys([*own, *saved]) if own else ():  # ours fills what is empty yet
            if key not in saved or key not in own:
                return f"{name} {'lacks' if key not in saved else 'has a surplus'} {key}"
            if found := difference(saved[key], own[key], f"{name}.{key}"):
                return found
    elif type(own) is int and (type(saved) is not int or saved < 0):
        return f"{name} is {saved!r} and no count"
    elif type(own) in (bool, float, str) and type(saved) is not type(own):
        return f"{name} is {saved!r:.40} and no {type(own).__name__}"
    elif type(own) is float and math.isnan(saved):
        return f"{name} is {saved}"
    elif isinstance(own, Tensor):
        if not isinstance(saved, Tensor) or (saved.shape, saved.dtype) != (own.shape, own.dtype):
            return f"{name} is no tensor of {own.dtype} and shape {list(own.shape)}"
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or (own and not saved):
            return f"{name} is {saved!r:.40} and no list"
    return None
