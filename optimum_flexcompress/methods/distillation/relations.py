"""The relation loss of MiniLM, in bounded memory."""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable


# Score entries computed at a time: what the cache of a core holds, for each thread on a CPU, and what keeps an
# accelerator busy.
_ENTRIES_PER_THREAD = 2**17
_ENTRIES_ON_ACCELERATOR = 2**26

# Keeps a masked entry out of every sum, and unlike -inf takes part in differences without making NaN.
_MASKED = -1e30


def relation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    heads: int,
    valid: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """`KL(teacher || student)` between self-relations of vectors (MiniLMv2, section 3.1).

    The features are split into `heads` relation heads of size `d`; the relation of a head is
    `softmax(R R^T / sqrt(d))` over the positions of a sample. The divergence is averaged over heads and valid
    positions of each sample, and summed over samples.

    Args:
        student: Vectors such as queries, `[batch, length, student width]`.
        teacher: The same of the teacher, `[batch, length, teacher width]`; gets no gradient.
        heads: How many relation heads; it divides both widths.
        valid: Booleans `[batch, length]`; positions that are not valid neither count nor are related to.
        causal: Whether a position relates to itself and earlier ones only.

    Returns:
        A scalar in float32, or in float64 for float64 vectors.
    """
    return _RelationLoss.apply(student, teacher, heads, valid, causal)


def _split(vectors: torch.Tensor, heads: int, valid: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`[batch, length, width]` to `[heads * batch, size, length]`, scaled so that products of two are scores."""
    batch, length, width = vectors.shape
    size = width // heads
    split = vectors.detach().to(dtype).mul(size**-0.25)
    if valid is not None:
        split = split * valid[..., None]
    # Length comes last because the products with a (length x length) matrix are several times faster that way round.
    return split.view(batch, length, heads, size).permute(2, 0, 3, 1).reshape(heads * batch, size, length)


class _RelationLoss(torch.autograd.Function):
    """Computes loss and gradient together, chunk by chunk over (relation head, sample) pairs.

    Neither scores nor relations outlive their chunk, so memory does not grow with the square of the length. With
    relations P of the teacher and Q of the student, the gradient of a row's loss with respect to its scores is
    `Q - P`, and scores `R R^T` pass it on to `R` from both sides.
    """

    @staticmethod
    def forward(ctx, student, teacher, heads, valid, causal):
        batch, length, width = student.shape
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        ours, theirs = _split(student, heads, valid, dtype), _split(teacher, heads, valid, dtype)
        if valid is None:
            counted = student.new_ones((batch, length), dtype=dtype)
        else:
            counted = valid.to(dtype)
        weights = counted / (counted.sum(-1, keepdim=True).clamp_min(1) * heads)
        bias = None if valid is None else torch.zeros_like(weights).masked_fill_(~valid, _MASKED).repeat(heads, 1)
        weights = weights.repeat(heads, 1)
        future = None
        if causal:
            future = torch.ones(length, length, dtype=torch.bool, device=student.device).triu_(1)
        chunk = _chunk_size(length, student.device)
        total = weights.new_zeros(())
        gradient = torch.empty_like(ours) if ctx.needs_input_grad[0] else None
        for start in range(0, len(ours), chunk):
            part = slice(start, start + chunk)
            own = ours[part]
            part_bias = None if bias is None else bias[part, None]
            log_p = _log_relation(theirs[part], part_bias, future)
            log_q = _log_relation(own, part_bias, future)
            # Of logarithms that are normalised already, softmax is exp, and the faster of the two.
            p = torch.softmax(log_p, dim=-1)
            rows = torch.linalg.vecdot(p, log_p.sub_(log_q))
            total += torch.linalg.vecdot(rows.reshape(-1), weights[part].reshape(-1))
            if gradient is not None:
                difference = torch.softmax(log_q, dim=-1).sub_(p)
                # Rows of padding drop out of the second product because their vectors are zero.
                both = torch.bmm(own, difference.transpose(1, 2))
                torch.baddbmm(both, own, difference, out=gradient[part])
        if gradient is not None:
            size = width // heads
            gradient = gradient.mul_(weights[:, None]).mul_(size**-0.25)
            gradient = gradient.view(heads, batch, size, length).permute(1, 3, 0, 2).reshape(batch, length, width)
            ctx.save_for_backward(gradient)
            ctx.student_dtype = student.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (grad_output * gradient).to(ctx.student_dtype), None, None, None, None


def _chunk_size(length: int, device: torch.device) -> int:
    """How many relations of `length` positions are computed at a time."""
    if device.type == "cpu":
        return torch.get_num_threads() * math.ceil(_ENTRIES_PER_THREAD / length**2)
    return math.ceil(_ENTRIES_ON_ACCELERATOR / length**2)


def _log_relation(vectors: torch.Tensor, bias: torch.Tensor | None, future: torch.Tensor | None) -> torch.Tensor:
    scores = torch.bmm(vectors.transpose(1, 2), vectors)
    if bias is not None:
        scores += bias
    if future is not None:
        scores.masked_fill_(future, _MASKED)
    return torch.log_softmax(scores, dim=-1)
