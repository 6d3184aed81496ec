"""SDFT's divergence and its teacher's tokens, against torch's own."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from spin_ray.config.sections import HealthConfig, OptimizerConfig
from spin_ray.errors import HealthError
from spin_ray.learner import distillation
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.distillation import ReadDivergence, ReadTop, TopTokens, divergence
from spin_ray.learner.head import LogitTransform
from spin_ray.learner.health import HealthMonitor
from spin_ray.learner.packing import build_pack
from spin_ray.learner.step import Objective, PackShape, train_step
from spin_ray.learner.teacher import Teacher, teacher_columns
from spin_ray.run_dir.schemas import TEACHER_SCHEMA
from tests.support.learner_cases import VOCAB, Row, one_rank, one_step, save_model, table_of, tiny_llama

torch.set_num_threads(1)
AT = torch.tensor([0, 1, 1, 4, 2])
IDS = torch.zeros(5, dtype=torch.int64)


def logits_of(seed: int, vocab: int = 11) -> Tensor:
    return torch.randn(5, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top_of(logits: Tensor, k: int) -> TopTokens:
    """The k likeliest tokens and the rest, by log_softmax and a sum."""
    logps, ids = logits.log_softmax(-1).sort(descending=True)
    return TopTokens(ids[:, :k], logps[:, :k], logps[:, k:].exp().sum(-1).log())


def test_with_the_whole_vocabulary_it_is_torchs_kl_div() -> None:
    """Reverse: KL(policy ‖ teacher) = Σ p (log p − log q); kl_div's input is the log of the second distribution."""
    policy, teacher = logits_of(0), logits_of(1)
    logps, against = policy.log_softmax(-1), teacher.log_softmax(-1)
    whole = functional.kl_div(against, logps, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(policy, top_of(teacher, 11)), whole)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_with_k_tokens_it_is_the_kl_of_k_tokens_and_one_for_all_others(k: int) -> None:
    policy, teacher = logits_of(0), logits_of(1)
    top = top_of(teacher, k)
    logps = policy.log_softmax(-1)
    chosen = logps.gather(-1, top.ids)
    coarse = torch.cat([chosen.exp(), 1 - chosen.exp().sum(-1, keepdim=True)], dim=-1)
    against = torch.cat([top.logps, top.rest[:, None]], dim=-1)
    expected = (coarse * (coarse.log() - against)).sum(-1)
    found = divergence(policy, top)
    torch.testing.assert_close(found, expected)
    assert (found <= divergence(policy, top_of(teacher, 11)) + 1e-12).all()
    assert divergence(teacher, top).abs().max() < 1e-12


@pytest.mark.parametrize("k", [4, 11])
def test_tokens_that_the_policy_cannot_choose_add_nothing(k: int) -> None:
    """Logits of -inf: of one of the teacher's tokens; of all others; of one that is impossible for both.

    kl_div counts 0 log 0 as 0. The gradient is that without those tokens.
    """
    policy, teacher = logits_of(0), logits_of(1)
    teacher[2, 0] = policy[2, 0] = -torch.inf
    top = top_of(teacher, k)
    policy[0, top.ids[0, 1]] = -torch.inf
    policy[1, teacher[1].argsort(descending=True)[4:]] = -torch.inf
    policy.requires_grad_()
    found = divergence(policy, top)
    chosen = policy.softmax(-1).gather(-1, top.ids)
    coarse, against = chosen, top.logps
    if k < 11:
        coarse = torch.cat([chosen, (1 - chosen.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
        against = torch.cat([top.logps, top.rest[:, None]], dim=-1)
    torch.testing.assert_close(found, functional.kl_div(against, coarse, reduction="none").nansum(-1))
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    for row in range(5):
        possible = policy[row].isfinite().nonzero()[:, 0]
        inside = {token: place for place, token in enumerate(possible.tolist())}
        kept = [place for place, token in enumerate(top.ids[row].tolist()) if token in inside]
        ids = torch.tensor([[inside[token] for token in top.ids[row, kept].tolist()]])
        fewer = policy[row : row + 1, possible].detach().requires_grad_()
        rest = TopTokens(ids, top.logps[row : row + 1, kept], top.rest[row : row + 1])
        (expected,) = torch.autograd.grad(divergence(fewer, rest).sum(), fewer)
        torch.testing.assert_close(gradient[row, possible], expected[0])
        assert not gradient[row, policy[row].isneginf()].any()


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=3.0, softcap=2.0)])
@pytest.mark.parametrize("k", [3, 11])
def test_gradient_is_the_numerical_one(monkeypatch: pytest.MonkeyPatch, transform: LogitTransform, k: int) -> None:
    """In fp64, in several chunks, through a head with a bias."""
    monkeypatch.setattr(distillation, "_rows", lambda hidden: 33)
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 11, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    reader = ReadDivergence(top_of(logits_of(1), k))

    def read(hidden: Tensor, *_: Tensor) -> Tensor:
        return reader(head, hidden, AT, IDS, transform)

    torch.testing.assert_close(read(hidden), divergence(transform(head(hidden[AT])), reader.teacher))
    assert torch.autograd.gradcheck(read, (hidden, *head.parameters()))


def test_the_likeliest_tokens_and_the_rest_of_them() -> None:
    """A head of the identity: hidden states are logits. With k beyond the vocabulary there is no rest."""
    logits = logits_of(0)
    for k, kept in ((4, 4), (99, 11)):
        found = ReadTop(k)(nn.Identity(), logits, torch.arange(5), IDS, LogitTransform())
        expected = top_of(logits, kept)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.logps, expected.logps)
        torch.testing.assert_close(found.rest, expected.rest)


def test_a_pack_without_targets_still_reaches_every_weight() -> None:
    """FSDP2's ranks would wait otherwise."""
    head, hidden = nn.Linear(8, 11), torch.randn(5, 8, requires_grad=True)
    none = TopTokens(torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3), torch.empty(0))
    found = ReadDivergence(none)(head, hidden, AT[:0], IDS[:0], LogitTransform())
    assert found.shape == (0,)
    found.sum().backward()
    assert head.weight.grad is not None and not head.weight.grad.any()


ROWS: list[Row] = [([5, 6], [7, 2], []), ([5, 9], [7, 8, 8, 2], []), ([4], [3, 2, 1, 2], [])]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fsdp2Backend]:
    folder = tmp_path_factory.mktemp("model")
    with one_rank(tmp_path_factory.mktemp("group")):
        settings = BackendSettings(
            max_length=48, precision="fp32", optimizer=OptimizerConfig(), learning_rate=0.01, total_steps=4
        )
        yield Fsdp2Backend(save_model(folder, tiny_llama()), settings, torch.device("cpu"))


def test_what_is_stored_of_a_teacher_is_transformers_own_distribution_and_is_found_again(
    backend: Fsdp2Backend, tmp_path: Path
) -> None:
    """Rows come back in the order of a pack, whatever order they were stored in; a model is no distance from itself."""
    (pack,) = one_step(ROWS).packs
    batch = build_pack(pack, table_of(ROWS), pack_length=48, pad_id=0)
    names = ["a", "b", "c"]
    with torch.no_grad():
        stored = teacher_columns(names, backend.read(batch, ReadTop(5)), batch).cast(TEACHER_SCHEMA)
    for (prompt, response, _), name in zip(ROWS, names, strict=True):
        (row,) = stored.filter(pa.compute.equal(stored["pair_id"], name)).to_pylist()
        alone = tiny_llama()(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = alone[len(prompt) - 1 : -1].topk(5)
        assert row["top_ids"] == expected.indices.flatten().tolist()
        assert row["top_logps"] == pytest.approx(expected.values.flatten().tolist(), abs=1e-4)
        assert [
            1 - sum(torch.tensor(row["top_logps"]).exp().view(-1, 5)[i].tolist()) for i in range(len(response))
        ] == (pytest.approx(torch.tensor(row["rest_logps"]).exp().tolist(), abs=1e-5))
    backwards = [stored.slice(2, 1), stored.slice(0, 2).take([1, 0])]
    teacher = Teacher.of(backwards, {name: row for row, name in enumerate(names)})
    found = backend.read(batch, ReadDivergence(teacher.of_pack(batch)))
    assert found.shape == batch.target_ids.shape and found.abs().max() < 1e-5
    with pytest.raises(ValueError, match="2 rows for 3 pairs"):
        Teacher.of(backwards[1:], {name: row for row, name in enumerate(names)})
    assert stored["top_ids"].combine_chunks().flatten().to_numpy().max() < VOCAB
    metrics = train_step(
        backend, one_step(ROWS), table_of(ROWS), PackShape(pack_length=48, global_batch_pairs=3, pad_id=0),
        Objective(loss=None, top_k=5), None, Teacher.of(backwards, {name: row for row, name in enumerate(names)}),
    )  # fmt: skip
    assert abs(metrics["loss"]) < 1e-5
    with pytest.raises(HealthError, match=r"the loss is 3 .*max_loss 2: .*; lower train\.learning_rate \(or raise the"):
        HealthMonitor(HealthConfig(steps=1, max_loss=2.0), 9).check(0, metrics | {"loss": 3.0})
