"""Whether anything as large as the square of the tokens is ever made."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the memory of the largest strided tensor holds that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out
