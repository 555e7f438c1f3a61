"""Types and shapes in koopt's signatures are checked at run time in every test."""

import sys
import types
import typing

import hypothesis
import jaxtyping
import torch


class _Typing(types.ModuleType):
    """`typing`, but koopt sees TYPE_CHECKING set and so imports what its annotations name."""

    @property
    def TYPE_CHECKING(self) -> bool:
        return sys._getframe(1).f_globals["__name__"].partition(".")[0] == "koopt"


assert "koopt" not in sys.modules, "koopt was imported before its annotations could be switched on"
typing.__class__ = _Typing
# an int is a float to type checkers (PEP 484), and so here
jaxtyping.install_import_hook("koopt", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

hypothesis.settings.register_profile("koopt", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("koopt")

torch.set_num_threads(1)  # on small matrices threads wait for each other
