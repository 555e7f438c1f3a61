"""Dense float64 kernels on small batched matrices: factors of tall data, leading subspaces, powers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Complex, Float
    from torch import Tensor

EPS = torch.finfo(torch.float64).eps
ON_CIRCLE = 1e-8  # |lambda| this close to 1 counts as 1: a defective pair splits by sqrt(eps)
TRUSTED = 1e-6  # relative error above which an eigendecomposition is not used
PARALLEL = 1e-3  # eigenvectors of eigenvalue 1 closer than this are one defective pair, which drifts
SUBSPACE_ERROR = 1e-8  # largest angle accepted from a Gram matrix
OVERSAMPLING = 4
SWEEPS = 4
CHUNK = 4096  # rows of a tall factor at a time, so that a piece stays in cache


def triangular_factor(rows: Float[Tensor, "*batch time state"]) -> Float[Tensor, "*batch time rank"]:
    """``R^T`` of ``rows^T = Q R``: the snapshots in an orthonormal basis of their span, chunk by chunk in float64."""
    factor = None
    for piece in rows.split(CHUNK, dim=-1):
        tall = piece.to(torch.float64).mT
        if factor is not None:
            tall = torch.cat([factor, tall], dim=-2)
        factor = torch.linalg.qr(tall, mode="r").R
    assert factor is not None
    return factor.mT


def gram(rows: Float[Tensor, "*batch time state"]) -> Float[Tensor, "*batch time time"]:
    """``rows rows^T`` accumulated in float64, chunk by chunk."""
    total = None
    for piece in rows.split(16 * CHUNK, dim=-1):
        exact = piece.to(torch.float64)
        product = exact @ exact.mT
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def combine(
    coefficients: Float[Tensor, "*batch time"], rows: Float[Tensor, "*batch time state"]
) -> Float[Tensor, "*batch state"]:
    """``coefficients @ rows`` accumulated in float64, chunk by chunk, returned in the dtype of `rows`."""
    weights = coefficients.unsqueeze(-2)
    pieces = rows.split(16 * CHUNK, dim=-1)
    return torch.cat([(weights @ piece.to(torch.float64)).squeeze(-2).to(rows.dtype) for piece in pieces], dim=-1)


def thin_svd(rows: Float[Tensor, "*batch time state"]) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition ``rows = left diag(values) right^T``, by QR first where there are many more rows."""
    if rows.shape[-2] <= 2 * rows.shape[-1]:
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        return left, values, right.mT
    tall, small = torch.linalg.qr(rows)
    left, values, right = torch.linalg.svd(small, full_matrices=False)
    return tall @ left, values, right.mT


def leading_eigenvectors(
    symmetric: Float[Tensor, "batch n n"], count: int
) -> tuple[Float[Tensor, "batch count"], Float[Tensor, "batch n count"], Bool[Tensor, " batch"]]:
    """The largest eigenvalues of positive semidefinite matrices by block subspace iteration.

    Returns eigenvalues (falling), orthonormal eigenvectors, and which matrices have their leading subspace to
    ``SUBSPACE_ERROR``: residual and rounding over the gap (Davis & Kahan). The others need a factor that is not squared.
    """
    size = symmetric.shape[-1]
    width = min(size, count + OVERSAMPLING)
    generator = torch.Generator().manual_seed(0)  # a fixed start: the same data always give the same operator
    block = torch.randn(size, width, generator=generator, dtype=torch.float64).to(symmetric.device)
    block = torch.linalg.qr(symmetric @ (symmetric @ block)).Q
    for sweep in range(SWEEPS):
        image = symmetric @ block
        values, rotation = torch.linalg.eigh(block.mT @ image)
        values, rotation = values.flip(-1), rotation.flip(-1)
        block, image = block @ rotation, image @ rotation
        error = (image - block * values.unsqueeze(-2))[..., :count].norm(dim=(-2, -1)) + EPS * values[..., 0]
        gap = values[..., count - 1] - (values[..., count] if width > count else 0.0)
        settled = (error <= SUBSPACE_ERROR * gap) & (gap > 0)
        if sweep == SWEEPS - 1 or bool(settled.all()):
            break
        block = torch.linalg.qr(symmetric @ torch.linalg.qr(image).Q).Q
    return values[..., :count], block[..., :count], settled


def eig(matrix: Float[Tensor, "*batch n n"]) -> tuple[Complex[Tensor, "*batch n"], Complex[Tensor, "*batch n n"]]:
    """Eigenvalues and eigenvectors; on the CPU, where batches of small matrices are much faster than on a GPU."""
    values, vectors = torch.linalg.eig(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


def solve(vectors: Complex[Tensor, "*batch n n"], vector: Complex[Tensor, "*batch n"]) -> Complex[Tensor, "*batch n"]:
    """``vectors^-1 vector``; NaN where the matrix is singular, for the caller to find."""
    solution, failed = torch.linalg.solve_ex(vectors, vector.unsqueeze(-1))
    return torch.where((failed != 0).unsqueeze(-1), math.nan, solution.squeeze(-1))


def evolve(
    transition: Float[Tensor, "*batch n n"], start: Float[Tensor, "*batch n"], horizon: float
) -> Float[Tensor, "*batch n"]:
    """``transition^horizon start`` for a whole, a real or an infinite horizon >= 0."""
    if math.isinf(horizon):
        return _limit(transition, start)
    whole = int(horizon)
    reached = (torch.linalg.matrix_power(transition, whole) @ start.unsqueeze(-1)).squeeze(-1)
    if horizon == whole:
        return reached
    return _part_of_a_step(transition, reached, horizon - whole)


def clamp_modulus(
    transition: Float[Tensor, "*batch n n"], start: Float[Tensor, "*batch n"], max_modulus: float
) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch n"]]:
    """Draw eigenvalues beyond `max_modulus` in to it; `start` too, as it has one step of the operator before it."""
    values, vectors = eig(transition)
    modulus = values.abs()
    over = modulus > max_modulus * (1 + ON_CIRCLE)
    factor = torch.where(over, max_modulus / modulus, 1.0)
    inverse, failed = torch.linalg.inv_ex(vectors)
    rebuilt = (vectors * values.unsqueeze(-2)) @ inverse
    scale = transition.abs().amax(dim=(-2, -1))
    sound = (failed == 0) & ((rebuilt - transition).abs().amax(dim=(-2, -1)) <= TRUSTED * scale)
    clamped = ((vectors * (values * factor).unsqueeze(-2)) @ inverse).real
    first = ((vectors * factor.unsqueeze(-2)) @ inverse @ start.to(values.dtype).unsqueeze(-1)).squeeze(-1).real
    # Without a basis of eigenvectors the patch is scaled as a whole.
    whole = factor.amin(dim=-1)
    clamped = torch.where(sound[..., None, None], clamped, transition * whole[..., None, None])
    first = torch.where(sound[..., None], first, start * whole[..., None])
    touched = over.any(dim=-1)
    return torch.where(touched[..., None, None], clamped, transition), torch.where(touched[..., None], first, start)


def _part_of_a_step(transition: Tensor, vector: Tensor, fraction: float) -> Tensor:
    """The principal real power, or a straight line to the next step where the eigenvectors cannot carry it."""
    following = (transition @ vector.unsqueeze(-1)).squeeze(-1)
    straight = vector + fraction * (following - vector)
    values, vectors = eig(transition)
    weights = solve(vectors, vector.to(values.dtype))
    again = (vectors @ (values * weights).unsqueeze(-1)).squeeze(-1).real
    sound = (again - following).norm(dim=-1) <= TRUSTED * following.norm(dim=-1)
    powered = torch.where(values == 0, 0.0, values.pow(fraction))
    curved = (vectors @ (powered * weights).unsqueeze(-1)).squeeze(-1).real
    return torch.where(sound.unsqueeze(-1), curved, straight)


def _limit(transition: Tensor, start: Tensor) -> Tensor:
    values, vectors = eig(transition)
    modulus = values.abs()
    one = (values - 1).abs() <= ON_CIRCLE
    require_none(modulus > 1 + ON_CIRCLE, "grow (|lambda| > 1)")
    require_none((modulus >= 1 - ON_CIRCLE) & ~one, "turn for ever (|lambda| = 1, lambda != 1)")
    kept = torch.where(one.unsqueeze(-2), vectors, 0.0)
    # Columns that are left out count as orthogonal, so only parallel kept ones make a small singular value.
    overlap = kept.mH @ kept + torch.diag_embed((~one).to(kept.dtype))
    drifting = torch.linalg.eigvalsh(overlap)[..., 0] < PARALLEL**2
    require_none(drifting.unsqueeze(-1), "drift along a straight line")
    weights = solve(vectors, start.to(values.dtype))
    return (kept @ torch.where(one, weights, 0.0).unsqueeze(-1)).squeeze(-1).real


def require_none(bad: Bool[Tensor, "*batch n"], what: str) -> None:
    """Refuse an infinite horizon, naming the patches for which it does not exist."""
    patches = bad.any(dim=-1)
    if bool(patches.any()):
        raise ValueError(
            f"horizon inf has no limit: patches {name_patches(patches)} {what}; pass a finite horizon, or max_modulus below 1"
        )


def name_patches(bad: Bool[Tensor, "*batch"]) -> str:
    """The first few indices of the marked patches, as one would write them in an index."""
    found = bad.nonzero().tolist()
    shown = ", ".join(str(tuple(index)) if len(index) != 1 else str(index[0]) for index in found[:5])
    return "(the only one)" if bad.dim() == 0 else shown + (f" and {len(found) - 5} more" if len(found) > 5 else "")
