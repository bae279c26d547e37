"""`torch.compile` of a whole model, which never goes on without it in silence."""

import torch._dynamo
from torch import nn

#: How often one piece of code may be compiled. Models of one process share theirs, and training, evaluation, gradients
#: and shapes each make another graph of it. torch's own limit is 8, which three models pass.
RECOMPILE_LIMIT = 128


def compile_in_place(model: nn.Module, mode: str) -> None:
    """Has the calls of `model` compiled, under the names that its weights always have.

    Past the limit torch would run plain code and only log so; here that is an error (`FailOnRecompileLimitHit`).
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model.compile(mode=mode)
