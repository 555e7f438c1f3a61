"""Shapes and types of koopt's functions are checked at run time in every test."""

import typing

import torch
from jaxtyping import install_import_hook

# koopt imports jaxtyping for type checkers alone; here the annotations are to be real.
typing.TYPE_CHECKING = True
with install_import_hook("koopt", "beartype.beartype"):
    import koopt
    import koopt.forecasters
typing.TYPE_CHECKING = False
