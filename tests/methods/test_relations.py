"""The MiniLM relation loss against a plain reference."""

from __future__ import annotations

import math

import pytest
import torch

from optimum_flexcompress.methods.distillation import relations
from optimum_flexcompress.methods.distillation.relations import relation_loss


def reference(student, teacher, heads, valid=None, causal=False):
    """The formula read literally: a loop over samples and heads, padding cut off."""
    total = 0.0
    for index in range(len(student)):
        keep = valid[index] if valid is not None else torch.ones(student.shape[1], dtype=torch.bool)
        length = int(keep.sum())
        if not length:
            continue
        relation = []
        for vectors in (student[index][keep], teacher[index][keep]):
            size = vectors.shape[-1] // heads
            maps = []
            for head in range(heads):
                part = vectors[:, head * size : (head + 1) * size]
                scores = part @ part.T / math.sqrt(size)
                if causal:
                    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
                maps.append(scores.softmax(-1))
            relation.append(maps)
        for ours, theirs in zip(*relation, strict=True):
            terms = torch.where(
                theirs > 0, theirs * (theirs.clamp_min(1e-300).log() - ours.clamp_min(1e-300).log()), 0
            )
            total = total + terms.sum() / (heads * length)
    return total


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 7, 24, generator=generator, dtype=torch.float64)
    teacher = torch.randn(3, 7, 48, generator=generator, dtype=torch.float64) * 1.5
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]]).bool()
    return student, teacher, valid


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [1, 4, 12])
def test_loss_and_gradient_match_the_formula(vectors, heads, padded, causal):
    student, teacher, valid = vectors
    valid = valid if padded else None
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = relation_loss(ours, teacher, heads, valid, causal)
    expected = reference(plain, teacher, heads, valid, causal)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_gradient_matches_finite_differences(vectors):
    student, teacher, valid = vectors
    student = student[:, :4, :8].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: relation_loss(s, teacher[:, :4, :8], 2, valid[:, :4]), (student,), atol=1e-6
    )


def test_zero_when_teacher_is_student(vectors):
    student, _, valid = vectors
    student = student.float().requires_grad_()
    value = relation_loss(student, student.detach(), 4, valid)
    value.backward()
    assert abs(value.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_padding_changes_nothing(vectors):
    student, teacher, valid = vectors
    student, teacher = student.float(), teacher.float()
    noisy = student.clone()
    noisy[~valid] = 1e4
    noisy.requires_grad_()
    value = relation_loss(noisy, teacher, 4, valid)
    value.backward()
    torch.testing.assert_close(value, relation_loss(student, teacher, 4, valid))
    assert torch.equal(noisy.grad[~valid], torch.zeros_like(noisy.grad[~valid]))
    longer = torch.cat([student, torch.randn(3, 5, 24)], 1), torch.cat([teacher, torch.randn(3, 5, 48)], 1)
    more = torch.cat([valid, torch.zeros(3, 5, dtype=torch.bool)], 1)
    torch.testing.assert_close(relation_loss(*longer, 4, more), relation_loss(student, teacher, 4, valid))


def test_chunks_do_not_matter(vectors, monkeypatch):
    student, teacher, valid = vectors
    whole = relation_loss(student, teacher, 12, valid)
    for chunk in (1, 5, 1000):
        monkeypatch.setattr(relations, "_chunk_size", lambda length, device, chunk=chunk: chunk)
        torch.testing.assert_close(relation_loss(student, teacher, 12, valid), whole)


def test_large_vectors_stay_finite():
    student = torch.full((1, 4, 8), 300.0, requires_grad=True)
    value = relation_loss(student, -2 * student.detach().flip(1), 2, torch.tensor([[1, 1, 0, 0]]).bool())
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_half_precision_vectors_are_computed_in_float32(vectors):
    student, teacher, valid = vectors
    half = student.bfloat16().requires_grad_()
    value = relation_loss(half, teacher.bfloat16(), 4, valid)
    assert value.dtype is torch.float32
    expected = relation_loss(half.detach().float(), teacher.bfloat16().float(), 4, valid)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert half.grad.dtype is torch.bfloat16


def test_memory_stays_below_one_score_matrix_of_all_heads():
    length, heads = 384, 48
    student, teacher = torch.randn(1, length, 96, requires_grad=True), torch.randn(1, length, 96)
    with torch.profiler.profile(profile_memory=True) as profile:
        relation_loss(student, teacher, heads).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < heads * length**2 * 4 / 4
