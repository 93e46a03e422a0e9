"""The divergence in stretches, against PyTorch's on full logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ghostssm.errors import ModelError
from ghostssm.recovery.distill import loss
from ghostssm.recovery.distill.loss import Readout, divergence, window_losses, without_head
from tests.conftest import tiny_model
from tests.families.tiny import CASES, tiny_hybrid

TOKENS, VOCABULARY = 37, 301


@pytest.fixture(autouse=True)
def _several_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_NUMBERS_AT_ONCE", 5 * VOCABULARY)


def _readout(width: int, dtype: torch.dtype, seed: int) -> Readout:
    draw = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(size, width, generator=draw, dtype=torch.float64) for size in (TOKENS, VOCABULARY))
    return Readout(hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_())


def _expected(student: Readout, teacher: Readout) -> torch.Tensor:
    log_student, log_teacher = (F.log_softmax(each.hidden @ each.head.T, -1) for each in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """Of teacher and student of different widths; the loss is multiplied before the backward pass."""
    student, teacher = _readout(12, dtype, 0), _readout(9, dtype, 1)
    exact = Readout(*(part.detach().double().requires_grad_() for part in (student.hidden, student.head)))
    wanted = _expected(exact, Readout(teacher.hidden.detach().double(), teacher.head.detach().double()))
    found = divergence(student, Readout(teacher.hidden.detach(), teacher.head.detach()))
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    (0.7 * found).backward()
    (0.7 * wanted).backward()
    for own, reference in ((student.hidden, exact.hidden), (student.head, exact.head)):
        torch.testing.assert_close(own.grad.double(), reference.grad, rtol=20 * tolerance, atol=20 * tolerance)


def test_no_logits_of_all_tokens() -> None:
    """A frozen head gets no gradient, and nothing of the size tokens x vocabulary is kept for the backward pass."""
    student, teacher = _readout(12, torch.float32, 0), _readout(12, torch.float32, 1)
    student.head.requires_grad_(False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.numel()), lambda value: value):
        found = divergence(student, Readout(teacher.hidden.detach(), teacher.head.detach()))
    assert max(kept, default=0) < TOKENS * VOCABULARY
    found.backward()
    assert student.head.grad is None


def test_equal_models_have_none() -> None:
    student = _readout(12, torch.float64, 0)
    found = divergence(student, Readout(student.hidden.detach(), student.head.detach()))
    found.backward()
    assert abs(found.item()) < 1e-12
    assert student.hidden.grad.abs().max() < 1e-12


def test_losses_by_window() -> None:
    student, teacher = _readout(12, torch.float64, 0), _readout(9, torch.float64, 1)
    pair = [Readout(each.hidden.detach()[:36].view(3, 12, -1), each.head.detach()) for each in (student, teacher)]
    ids = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
    found = window_losses(*pair, ids)
    logits = [each.hidden[:, :-1] @ each.head.T for each in pair]
    for row in range(3):
        logs = [F.log_softmax(each[row], -1) for each in logits]
        expected = [F.kl_div(*logs, reduction="batchmean", log_target=True)]
        expected += [F.cross_entropy(each[row], ids[row, 1:]) for each in logits]
        torch.testing.assert_close(found[:, row], torch.stack(expected))


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_times_head_are_the_logits(case: str) -> None:
    """In every family, whatever it multiplies its logits by."""
    model = tiny_hybrid(case)
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        with without_head(model) as head:
            hidden = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(hidden @ head.T.float(), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, logits)


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(32, 288)
    with pytest.raises(ModelError, match="without a bias"), without_head(model):
        pass
