"""Dense float64 kernels on small batched matrices: factors of tall data, leading subspaces, powers."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Complex, Float
    from torch import Tensor

EPS = torch.finfo(torch.float64).eps
SQUARABLE = torch.finfo(torch.float64).tiny ** 0.5  # numbers below this have no square in float64
ON_CIRCLE = 1e-8  # |lambda| this close to 1 counts as 1: a defective pair splits by sqrt(eps)
TRUSTED = 1e-6  # relative error above which an eigendecomposition is not used
WORST_BASIS = 1e6  # condition number of eigenvectors above which they are not used: clamping is not smooth
PARALLEL = 1e-3  # eigenvectors of eigenvalue 1 closer than this are one defective pair, which drifts
SUBSPACE_ERROR = 1e-8  # largest angle accepted from a Gram matrix
OVERSAMPLING = 4
SWEEPS = 3
FEW = 128  # rows in all up to which a full eigendecomposition takes less time than the calls of a sweep
CHUNK = 4096  # columns of a tall factor at a time, so that a piece stays in cache
WIDE_CHUNK = 16 * CHUNK  # where a piece is only multiplied
CACHED = 2**18  # numbers of such a piece that a processor's cache holds
FILLING = 2**26  # numbers of a piece on a CUDA device: half a GiB
BATCHED = 32  # rows and columns up to which CUDA decomposes many matrices at once; beyond it takes them one by one


def all_finite(values: Tensor) -> bool:
    """Whether none is NaN or Inf: by the sum, which is quick, and where that overflows one by one.

    >>> all_finite(torch.tensor([1.0, 3e38, 3e38])), all_finite(torch.tensor([float("inf")]))
    (True, False)
    """
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def triangular_factor(
    rows: Float[Tensor, "*batch time state"], prepare: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "*batch prepared rank"]:
    """``R^T`` of ``rows^T = Q R``: the snapshots in an orthonormal basis of their span, chunk by chunk in float64.

    Args:
        rows: snapshots in any floating-point dtype, at least one weight wide.
        prepare: applied to each float64 piece `(*batch, time, columns)`; may change the number of rows.

    Returns:
        `(*batch, time, min(time, state))` float64.

    Source: Demmel, Grigori, Hoemmen & Langou (2012), sequential TSQR.

    >>> triangular_factor(torch.tensor([[3.0, 4.0]])).abs()
    tensor([[5.]], dtype=torch.float64)
    """
    factor = None
    for piece in _pieces(rows, _tall(rows), prepare):
        tall = piece.mT if factor is None else torch.cat([factor, piece.mT], dim=-2)
        with one_thread_each(tall):
            factor = torch.linalg.qr(tall, mode="r").R
    assert factor is not None
    return factor.mT


def gram(
    rows: Float[Tensor, "*batch time state"], prepare: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "*batch prepared prepared"]:
    """``rows rows^T`` accumulated in float64, chunk by chunk; arguments as :func:`triangular_factor`.

    >>> gram(torch.tensor([[3.0, 4.0]]))
    tensor([[25.]], dtype=torch.float64)
    """
    total = None
    for piece in _pieces(rows, _width(rows), prepare):
        product = piece @ piece.mT
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def factor_of_gram(squared: Float[Tensor, "*batch time time"]) -> Float[Tensor, "*batch time time"]:
    """Rows with this Gram matrix: like :func:`triangular_factor`, cheaper, and only good to the root of eps.

    >>> factor_of_gram(torch.diag(torch.tensor([1.0, 9.0]))).abs()
    tensor([[0., 1.],
            [3., 0.]])
    """
    values, vectors = eigh(squared)
    return vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)


def share_of_rounding(rounding: float, snapshots: float, size: float, least: float = EPS) -> float:
    """The share of the largest singular value up to which rounding fills in others, for a factor that does not show it.

    Args:
        rounding: of one snapshot, absolute.
        snapshots: how many there are.
        size: norm of what is fitted.
        least: what is returned at least.

    >>> share_of_rounding(1e-3, 4, 0.1)
    0.02
    """
    return min(0.5, max(least, rounding * snapshots**0.5 / size)) if size > 0 else least


def combine(
    coefficients: Float[Tensor, "*batch time"],
    rows: Float[Tensor, "*batch time state"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch state"]:
    """``coefficients @ rows`` accumulated in float64, chunk by chunk, returned in `dtype` (None: that of `rows`).

    >>> combine(torch.tensor([-1.0, 2.0]), torch.tensor([[1.0], [2.0]]))
    tensor([3.])
    """
    weights = coefficients.to(torch.float64).unsqueeze(-2)
    shape = (*torch.broadcast_shapes(weights.shape[:-2], rows.shape[:-2]), rows.shape[-1])
    combined = torch.empty(shape, dtype=dtype or rows.dtype, device=rows.device)
    width = _width(rows)
    for piece, place in zip(_pieces(rows, width), combined.split(width, dim=-1), strict=True):
        place.copy_((weights @ piece).squeeze(-2))
    return combined


def combine_columns(
    coefficients: Complex[Tensor, "*batch time r"], rows: Float[Tensor, "*batch time state"]
) -> Complex[Tensor, "*batch state r"]:
    """``rows^T coefficients``, chunk by chunk.

    >>> combine_columns(torch.tensor([[1j], [1.0]]), torch.tensor([[3.0], [4.0]]))
    tensor([[4.+3.j]], dtype=torch.complex128)
    """
    columns = coefficients.to(torch.complex128)
    return torch.cat([piece.mT.to(columns.dtype) @ columns for piece in _pieces(rows, WIDE_CHUNK)], dim=-2)


def inner(
    rows: Float[Tensor, "*batch time state"], vector: Float[Tensor, "*batch state"]
) -> Float[Tensor, "*batch time"]:
    """``rows @ vector`` accumulated in float64, chunk by chunk.

    >>> inner(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 1.0]))
    tensor([7.], dtype=torch.float64)
    """
    total = torch.zeros(rows.shape[:-1], dtype=torch.float64, device=rows.device)
    for piece, part in zip(_pieces(rows, WIDE_CHUNK), _pieces(vector, WIDE_CHUNK), strict=True):
        total += (piece @ part.unsqueeze(-1)).squeeze(-1)
    return total


def products(left: Float[Tensor, "m state"], right: Float[Tensor, "k state"]) -> Float[Tensor, "m k"]:
    """``left right^T`` accumulated in float64, chunk by chunk.

    On the CPU float32 and less are multiplied in float32, to some 7 digits of the product of the norms: to make float64
    of them first takes longer than the product.

    >>> products(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
    tensor([[7., 6.]], dtype=torch.float64)
    """
    short = all(rows.is_cpu and rows.dtype.itemsize <= 4 for rows in (left, right))
    dtype = torch.float32 if short else torch.float64
    width = WIDE_CHUNK if left.dtype == right.dtype == dtype else _width(left)
    if left.shape[1] <= width:
        return (left.to(dtype) @ right.to(dtype).T).to(torch.float64)
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for piece, part in zip(left.split(width, dim=1), right.split(width, dim=1), strict=True):
        total += piece.to(dtype) @ part.to(dtype).T
    return total


def _width(rows: Tensor) -> int:
    """Columns of a piece that is only multiplied: on the CPU few enough for its cache, where all is not."""
    if rows.is_cuda or rows.numel() <= CACHED:
        return WIDE_CHUNK
    return min(WIDE_CHUNK, max(1, CACHED // max(1, rows.shape[:-1].numel()) // CHUNK) * CHUNK)


def _tall(rows: Tensor) -> int:
    """Columns of a piece that is factored: few enough for a processor's cache, on CUDA as many as fill it."""
    return max(CHUNK, FILLING // max(1, rows.shape[:-1].numel())) if rows.is_cuda else CHUNK


def _pieces(rows: Tensor, width: int, prepare: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
    for piece in rows.split(width, dim=-1):
        exact = piece.to(torch.float64)
        yield exact if prepare is None else prepare(exact)


@contextlib.contextmanager
def one_thread_each(matrices: Tensor) -> Iterator[None]:
    """Factor a batch of matrices on the CPU with one thread: they are taken one by one, and threads only wait in each.

    >>> with one_thread_each(torch.zeros(2, 3, 3)):
    ...     torch.get_num_threads()
    1
    """
    threads = torch.get_num_threads()
    if threads == 1 or matrices.dim() == 2 or matrices.shape[:-2].numel() < 2:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def svd(
    matrix: Float[Tensor, "*batch m n"],
) -> tuple[Float[Tensor, "*batch m r"], Float[Tensor, "*batch r"], Float[Tensor, "*batch n r"]]:
    """The thin singular value decomposition ``matrix = left diag(values) right^T``; computed where that is fastest.

    >>> left, values, right = svd(torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
    >>> values
    tensor([5., 3.])
    """
    if matrix.is_cuda and max(matrix.shape[-2:]) > BATCHED:
        return _svd_of_large(matrix)
    with one_thread_each(matrix):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right.mT


def _svd_of_large(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU, but for what can be reduced to matrices that CUDA takes many at once."""
    if matrix.shape[-2] < matrix.shape[-1]:
        right, values, left = _svd_of_large(matrix.mT)
        return left, values, right
    near = matrix.cpu()
    if matrix.shape[-1] > BATCHED:
        left, values, right = (part.to(matrix.device) for part in svd(near))
        return left, values, right
    with one_thread_each(near):
        frame, small = (part.to(matrix.device) for part in torch.linalg.qr(near))
    left, values, right = svd(small)
    return frame @ left, values, right


def _orthonormal(matrix: Tensor) -> Tensor:
    with one_thread_each(matrix):
        return torch.linalg.qr(matrix).Q


def eigh_there(
    symmetric: Float[Tensor, "*batch n n"],
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
    """Eigenvalues, rising, and eigenvectors, found where the matrices are: in float32 not always if many rows are zero.

    Raises:
        torch.linalg.LinAlgError: if they are not found in float64 either.

    >>> eigh_there(torch.diag(torch.tensor([9.0, 1.0])))[0]
    tensor([1., 9.])
    """
    try:
        return torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage], as it is documented
        values, vectors = torch.linalg.eigh(symmetric.double())
        return values.to(symmetric.dtype), vectors.to(symmetric.dtype)


def eigh(symmetric: Float[Tensor, "*batch n n"]) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
    """Eigenvalues, falling, and orthonormal eigenvectors of symmetric matrices; computed where that is fastest.

    >>> eigh(torch.diag(torch.tensor([1.0, 9.0])))[0]
    tensor([9., 1.])
    """
    there = symmetric.is_cuda and symmetric.shape[-1] <= BATCHED
    with one_thread_each(symmetric):
        found = eigh_there(symmetric if there else symmetric.cpu())
    values, vectors = (part.to(symmetric.device).flip(-1) for part in found)
    return values, vectors


def leading_eigenvectors(
    symmetric: Float[Tensor, "batch n n"], count: int
) -> tuple[Float[Tensor, "batch count"], Float[Tensor, "batch n count"], Bool[Tensor, " batch"]]:
    """The largest eigenvalues of positive semidefinite matrices, by subspace iteration where a few sweeps will do.

    Args:
        symmetric: `(batch, n, n)` float64, finite.
        count: how many eigenvalues, at most n.

    Returns:
        Eigenvalues (falling), orthonormal eigenvectors, and which matrices have their leading subspace to
        ``SUBSPACE_ERROR``: residual and rounding over the gap (Davis & Kahan). The others need a factor that is not
        squared.

    Source: Halko, Martinsson & Tropp (2011), Algorithm 4.4; Davis & Kahan (1970).

    >>> values, _, settled = leading_eigenvectors(torch.diag(torch.tensor([1.0, 9.0, 4.0]).double())[None], 2)
    >>> values.round(), settled
    (tensor([[9., 4.]], dtype=torch.float64), tensor([True]))
    """
    size = symmetric.shape[-1]
    if symmetric.is_cuda and size > BATCHED:
        values, block, settled = leading_eigenvectors(symmetric.cpu(), count)
        return values.to(symmetric.device), block.to(symmetric.device), settled.to(symmetric.device)
    scale = symmetric.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
    scale = torch.where(scale > 0, scale, 1.0)
    symmetric = symmetric / scale[:, None, None]  # so that its own square exists
    width = min(size, count + OVERSAMPLING)
    if len(symmetric) * size <= FEW or symmetric.is_cuda:
        block, _, values, settled = _rayleigh_ritz(symmetric, eigh(symmetric)[1][..., :width], count)
        return values[..., :count] * scale.unsqueeze(-1), block[..., :count], settled
    generator = torch.Generator("cpu").manual_seed(0)  # a fixed start: the same data always give the same operator
    block = torch.randn(size, width, generator=generator, dtype=torch.float64, device="cpu")
    block = _orthonormal(symmetric @ (symmetric @ block))
    block, image, values, settled = _rayleigh_ritz(symmetric, block, count)
    missed = ~settled
    for _ in range(SWEEPS):
        if not bool(missed.any()):
            break
        block = _orthonormal(symmetric @ _orthonormal(image))
        block, image, values, settled = _rayleigh_ritz(symmetric, block, count)
        lost = values[:, count - 1] * SUBSPACE_ERROR < EPS * values[:, 0]  # in the rounding of the matrix itself
        missed = ~settled & ~lost
    if bool(missed.any()):
        missed = missed.nonzero().squeeze(-1)
        slow = symmetric[missed]
        exact = _rayleigh_ritz(slow, eigh(slow)[1][..., :width], count)
        block, _, values, settled = (
            old.index_copy(0, missed, new) for old, new in zip((block, image, values, settled), exact, strict=True)
        )
    return values[..., :count] * scale.unsqueeze(-1), block[..., :count], settled


def _rayleigh_ritz(symmetric: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best eigenvectors within the span of a block, their image, their eigenvalues, and whether they will do."""
    image = symmetric @ block
    values, rotation = eigh(block.mT @ image)
    block, image = block @ rotation, image @ rotation
    error = (image - block * values.unsqueeze(-2))[..., :count].norm(dim=(-2, -1)) + EPS * values[..., 0]
    gap = values[..., count - 1] - (values[..., count] if values.shape[-1] > count else 0.0)
    return block, image, values, (error <= SUBSPACE_ERROR * gap) & (gap > 0)


def eig(matrix: Float[Tensor, "*batch n n"]) -> tuple[Complex[Tensor, "*batch n"], Complex[Tensor, "*batch n n"]]:
    """Eigenvalues and eigenvectors; on the CPU, where batches of small matrices are much faster than on a GPU.

    >>> eig(torch.tensor([[2.0]]))[0]
    tensor([2.+0.j])
    """
    with one_thread_each(matrix):
        values, vectors = torch.linalg.eig(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


def solve(vectors: Complex[Tensor, "*batch n n"], vector: Complex[Tensor, "*batch n"]) -> Complex[Tensor, "*batch n"]:
    """``vectors^-1 vector``, by the pseudo-inverse where the matrix is singular.

    >>> solve(torch.tensor([[2.0 + 0j]]), torch.tensor([3.0 + 0j]))
    tensor([1.5000+0.j])
    """
    solution, failed = torch.linalg.solve_ex(vectors, vector.unsqueeze(-1))
    if bool(failed.any()):
        least = torch.linalg.pinv(vectors) @ vector.unsqueeze(-1)
        solution = torch.where((failed != 0)[..., None, None], least, solution)
    return solution.squeeze(-1)


def evolve(
    transition: Float[Tensor, "*batch n n"], start: Float[Tensor, "*batch n"], horizon: float
) -> Float[Tensor, "*batch n"]:
    """``transition^horizon start``.

    Args:
        transition: `(*batch, n, n)` float64.
        start: `(*batch, n)` float64.
        horizon: >= 0. Whole: by powers, also for defective matrices. Real: the last part of a step by the principal
            branch, along a straight line where the eigenvectors do not carry it. Infinite: the limit.

    Returns:
        `(*batch, n)` float64.

    Raises:
        ValueError: at an infinite horizon, naming the patches that have no limit.

    >>> evolve(torch.tensor([[4.0]]).double(), torch.tensor([1.0]).double(), 1.5)
    tensor([8.], dtype=torch.float64)
    """
    if math.isinf(horizon):
        return _limit(transition, start)
    whole = int(horizon)
    reached = (torch.linalg.matrix_power(transition, whole) @ start.unsqueeze(-1)).squeeze(-1)
    if horizon == whole:
        return reached
    return _part_of_a_step(transition, reached, horizon - whole)


def clamping_factor(transition: Float[Tensor, "*batch n n"], max_modulus: float) -> Float[Tensor, "*batch n n"]:
    """The matrix that commutes with `transition` and draws its eigenvalues beyond `max_modulus` in to it.

    Args:
        transition: `(*batch, n, n)` float64.
        max_modulus: positive.

    Returns:
        `(*batch, n, n)` float64, the identity where nothing is to be done. Without a good basis of eigenvectors it is
        a number times the identity: the patch is scaled as a whole.

    >>> clamping_factor(torch.tensor([[2.0]]).double(), 1.0)
    tensor([[0.5000]], dtype=torch.float64)
    """
    values, vectors = eig(transition)
    modulus = values.abs()
    over = modulus > max_modulus * (1 + ON_CIRCLE)
    shares = torch.where(over, max_modulus / modulus, 1.0)
    inverse, failed = torch.linalg.inv_ex(vectors)
    sound = (failed == 0) & (vectors.norm(dim=(-2, -1)) * inverse.norm(dim=(-2, -1)) <= WORST_BASIS)
    factor = ((vectors * shares.unsqueeze(-2)) @ inverse).real
    eye = torch.eye(values.shape[-1], dtype=factor.dtype, device=factor.device)
    factor = torch.where(sound[..., None, None], factor, shares.amin(dim=-1)[..., None, None] * eye)
    return torch.where(over.any(dim=-1)[..., None, None], factor, eye)


def _part_of_a_step(transition: Tensor, vector: Tensor, fraction: float) -> Tensor:
    """The principal real power, or a straight line to the next step where the eigenvectors cannot carry it."""
    following = (transition @ vector.unsqueeze(-1)).squeeze(-1)
    straight = vector + fraction * (following - vector)
    values, vectors = eig(transition)
    weights = solve(vectors, vector.to(values.dtype))
    again = (vectors @ (values * weights).unsqueeze(-1)).squeeze(-1).real
    sound = (again - following).norm(dim=-1) <= TRUSTED * following.norm(dim=-1)
    powered = torch.where(values == 0, 0.0, values.pow(fraction))  # 0^x is NaN on some devices
    curved = (vectors @ (powered * weights).unsqueeze(-1)).squeeze(-1).real
    return torch.where(sound.unsqueeze(-1), curved, straight)


def _limit(transition: Tensor, start: Tensor) -> Tensor:
    values, vectors = eig(transition)
    modulus = values.abs()
    one = (values - 1).abs() <= ON_CIRCLE
    _require_limit(modulus > 1 + ON_CIRCLE, "growth (|lambda| > 1)")
    _require_limit((modulus >= 1 - ON_CIRCLE) & ~one, "turning for ever (|lambda| = 1, lambda != 1)")
    kept = torch.where(one.unsqueeze(-2), vectors, 0.0)
    # Columns that are left out count as orthogonal, so only parallel kept ones make a small singular value.
    overlap = kept.mH @ kept + torch.diag_embed((~one).to(kept.dtype))
    _require_limit(torch.linalg.eigvalsh(overlap)[..., :1] < PARALLEL**2, "drift along a straight line")
    # By left eigenvectors, since those of the modes that die out need not be independent.
    values, vectors = eig(transition.mT)
    left = torch.where(((values - 1).abs() <= ON_CIRCLE).unsqueeze(-2), vectors, 0.0).mT
    weights = torch.linalg.pinv(left @ kept) @ left @ start.to(kept.dtype).unsqueeze(-1)
    return (kept @ weights).squeeze(-1).real


def _require_limit(bad: Tensor, what: str) -> None:
    patches = bad.any(dim=-1)
    if bool(patches.any()):
        raise ValueError(
            f"horizon is inf, but {what} in {name_patches(patches)} has no limit; "
            "pass a finite horizon, or fit with center or difference and pass max_modulus below 1"
        )


def name_patches(bad: Bool[Tensor, "*batch"]) -> str:
    """The first few marked patches by index, for messages.

    >>> name_patches(torch.tensor([True, False, True]))
    'patches 0, 2'
    """
    if bad.dim() == 0:
        return "the only patch"
    found = bad.nonzero().tolist()
    shown = ", ".join(str(index[0]) if len(index) == 1 else str(tuple(index)) for index in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"{'patch' if len(found) == 1 else 'patches'} {shown}{more}"
