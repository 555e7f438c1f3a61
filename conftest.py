import pytest


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace):
    import torch

    import koopt

    doctest_namespace.update(koopt=koopt, torch=torch, nn=torch.nn)
