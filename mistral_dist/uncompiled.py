"""bitsandbytes, without torch's compiler.

It marks two functions for `torch.compile`: de-quantisation as it is where no kernel is. Marking alone imports the compiler, 2.4 of
the 8.4 s of CPU time that a worker took to start, and compiled they could round otherwise than on the next machine, which has
no compiler. Here they stay as they are written. To be imported before PEFT, which imports bitsandbytes, too.
"""

from typing import Any

import torch


def _as_written(function: Any = None, **_: Any) -> Any:
    return _as_written if function is None else function


_compile = torch.compile
torch.compile = _as_written  # type: ignore[assignment]
try:
    import bitsandbytes as bnb
finally:
    torch.compile = _compile

__all__ = ["bnb"]
