"""Liger's losses, which are written in Triton and serve on a GPU."""

import importlib
import sys
from functools import partial

from .case_data import STEPS
from .peer import LeftOut


def from_liger(module, name):
    """Imports and calls a class of Liger. Liger looks for peft, which imports transformers (5 to 10 s), so peft is hidden."""
    hidden = "peft" not in sys.modules
    if hidden:
        sys.modules["peft"] = None
    try:
        return getattr(importlib.import_module(f"liger_kernel.transformers.{module}"), name)()
    except ImportError as error:
        raise LeftOut(f"{error}: pip install liger-kernel") from error
    except Exception as error:  # importing its many modules may raise anything
        raise LeftOut(f"Liger cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        if hidden:
            sys.modules.pop("peft", None)


def liger_cross_entropy():
    return from_liger("cross_entropy", "LigerCrossEntropyLoss")


def import_compilers():
    """Imports the modules that take seconds, so no competitor is timed with it. A missing one is reported when its turn comes."""
    compilers = (partial(importlib.import_module, name) for name in ("triton", "torch._inductor.compile_fx"))
    for load in (liger_cross_entropy, *compilers):
        try:
            load()
        except Exception as error:
            print(f"{type(error).__name__}: {error}")


def on_fresh(peer, own, logits):
    """Gives fresh logits to a competitor that overwrites its logits with the gradient, as long as results are checked."""
    run, checked = peer.run, iter(range(STEPS))

    def on_fresh_logits():
        if next(checked, None) is not None:
            for x in own:
                x.copy_(logits)
        return run()

    peer.run = on_fresh_logits
    return peer
