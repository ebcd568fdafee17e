"""The ranking, on worlds whose truth is known, and its parts against slower ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect.answers import DocumentSpan
from flagscale.data_inspect.attribution import Equations, attribute, equations_of, parts_of
from flagscale.data_inspect.excess import LIMIT, StepExcess, StepLosses, standardise
from flagscale.data_inspect.rank import Direction, RankedDocument, Ranking, rank
from flagscale.errors import ConfigError, DataError

SEQ_LENGTH = 128
BLOCKS = 8
BATCH = 16
DOCUMENTS = 300
HARD, EASY = range(8), range(8, 12)
EFFECT, SPREAD, NOISE = 2.0, 0.2, 0.6


@dataclass
class World:
    """Documents laid end to end, anew each epoch, cut into samples, and what each costs."""

    seed: int
    epochs: int = 8
    spread: float = SPREAD
    effect: float = EFFECT

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.lengths = rng.integers(24, 160, DOCUMENTS)
        self.truth = rng.normal(0, self.spread, DOCUMENTS)
        self.truth[HARD] += self.effect
        self.truth[EASY] -= self.effect
        self.spans: dict[int, list[tuple[int, int, int, int]]] = {}
        streams = [
            np.concatenate([_tokens(d, self.lengths[d]) for d in rng.permutation(DOCUMENTS)])
            for _ in range(self.epochs)
        ]
        stream = np.concatenate(streams)
        count = (len(stream) - 1) // SEQ_LENGTH
        self.samples = [stream[k * SEQ_LENGTH :][: SEQ_LENGTH + 1] for k in range(count)]
        order = rng.permutation(count)
        steps = count // BATCH
        self.steps = [
            self._step(number, order[number * BATCH :][:BATCH], 6 + 4 * np.exp(-number / 20), rng)
            for number in range(steps)
        ]

    def _step(
        self, number: int, samples: npt.NDArray[np.int64], level: float, rng: np.random.Generator
    ) -> StepLosses:
        owners = np.stack([self.samples[k][1:, 0] for k in samples])
        costs = level + self.truth[owners]
        costs[:, :16] += 0.5  # less text before them
        blocks = costs.reshape(len(samples), BLOCKS, -1).mean(axis=2)
        blocks += rng.normal(0, NOISE, blocks.shape)
        return StepLosses(
            number + 1,
            np.zeros(len(samples), np.int64),
            samples,
            blocks.mean(axis=1).astype(np.float32),
            blocks.astype(np.float32),
        )

    def spans_of(
        self, datasets: npt.NDArray[np.int64], samples: npt.NDArray[np.int64]
    ) -> list[list[DocumentSpan]]:
        return [_spans(self.samples[k]) for k in samples]


def _tokens(document: int, length: int) -> npt.NDArray[np.int64]:
    return np.stack([np.full(length, document), np.arange(length)], axis=1)


def _spans(sample: npt.NDArray[np.int64]) -> list[DocumentSpan]:
    """Token by token: a document ends where another, or its own beginning, follows."""
    cuts = [i for i in range(1, len(sample)) if sample[i, 1] != sample[i - 1, 1] + 1]
    return [
        DocumentSpan(int(d), int(d), int(t), int(t) + end - start, start, 0)
        for start, end in zip([0, *cuts], [*cuts, len(sample)], strict=True)
        for d, t in [sample[start]]
    ]


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


def _rank(world: World, steps: Sequence[StepLosses] | None = None, **options: object) -> Ranking:
    options = {"limit": None, **options}
    given = world.steps if steps is None else steps
    return rank(given, world.spans_of, SEQ_LENGTH, **options)  # type: ignore[arg-type]


def _by_document(ranking: Ranking) -> dict[int, RankedDocument]:
    return {one.document: one for one in ranking.hard}


@pytest.mark.parametrize("blocks", [False, True])
def test_both_ends_are_found(world: World, blocks: bool) -> None:
    ranking = _rank(world, blocks=blocks)
    assert {one.document for one in ranking.hard[: len(HARD)]} == set(HARD)
    assert {one.document for one in ranking.easy[: len(EASY)]} == set(EASY)
    assert all(one.direction is Direction.HARD for one in ranking.hard[: len(HARD)])
    assert all(one.direction is Direction.EASY for one in ranking.easy[: len(EASY)])
    assert ranking.hard == ranking.easy[::-1]
    assert ranking.documents == DOCUMENTS
    assert ranking.block_tokens == (16 if blocks else None)
    for one in ranking.hard[: len(HARD)]:
        assert one.excess == pytest.approx(EFFECT, abs=4 * one.uncertainty + 3 * SPREAD)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(1, 10**6), blocks=st.booleans())
def test_small_effects_are_found_beyond_chance(seed: int, blocks: bool) -> None:
    ranking = _rank(World(seed, effect=0.8), blocks=blocks)
    found = sum(one.document in HARD for one in ranking.hard[:12])
    assert found >= 3  # of 8; by chance 0.3


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("blocks", [False, True])
def test_scores_of_ordinary_documents_are_normal(spread: float, blocks: bool) -> None:
    ranking = _rank(World(seed=3, spread=spread), blocks=blocks)
    ordinary = [one.score for one in ranking.hard if one.document not in {*HARD, *EASY}]
    assert abs(np.mean(ordinary)) < 0.2
    assert 0.85 < np.std(ordinary) < 1.15
    assert np.mean(np.abs(ordinary) > 2) == pytest.approx(0.0455, abs=0.035)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_uncertainty_is_that_of_the_excess(blocks: bool) -> None:
    world = World(seed=4)
    ranking = _rank(world, blocks=blocks)
    middle = np.median(world.truth)
    pulls = [
        (one.excess - (world.truth[one.document] - middle)) / one.uncertainty
        for one in ranking.hard
        if one.document not in {*HARD, *EASY}
    ]
    assert 0.8 < np.std(pulls) < 1.3


def test_more_visits_make_it_smaller(world: World) -> None:
    few = _by_document(_rank(world, iterations=(41, 70)))
    many = _by_document(_rank(world))
    assert all(many[one].visits >= few[one].visits for one in few)
    more = [one for one in few if many[one].visits >= 4 * few[one].visits]
    assert len(more) > 10
    ratio = np.median([many[one].uncertainty / few[one].uncertainty for one in more])
    assert 0.25 < ratio < 0.6


def test_neighbours_are_cleared(world: World) -> None:
    """Those that shared the most samples with bad ones, where only means of samples are known."""
    scores = {d: one.score for d, one in _by_document(_rank(world, blocks=False)).items()}
    shares = np.zeros(DOCUMENTS)
    for sample in world.samples:
        owners = sample[1:, 0]
        if set(owners) & set(HARD):
            np.add.at(shares, owners, 1)
    shares[[*HARD, *EASY]] = 0
    suspects = np.argsort(-shares / world.lengths)[:30]
    assert abs(np.mean([scores[d] for d in suspects])) < 0.5
    assert max(scores[d] for d in suspects) < np.median([scores[d] for d in HARD])


@settings(max_examples=8, deadline=None)
@given(factor=st.floats(0.01, 100), blocks=st.booleans())
def test_the_unit_of_the_loss_does_not_matter(world: World, factor: float, blocks: bool) -> None:
    scaled = [
        replace(
            step,
            losses=step.losses * np.float32(factor),
            block_losses=step.block_losses * np.float32(factor),
        )
        for step in world.steps[:40]
    ]
    plain = _by_document(_rank(world, world.steps[:40], blocks=blocks))
    for document, one in _by_document(_rank(world, scaled, blocks=blocks)).items():
        assert one.score == pytest.approx(plain[document].score, abs=2e-3)
        assert one.excess == pytest.approx(factor * plain[document].excess, abs=2e-3 * factor)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_order_in_a_step_does_not_matter(world: World, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shuffled = [_chosen(step, rng.permutation(len(step.losses))) for step in world.steps[:40]]
    plain = _by_document(_rank(world, world.steps[:40]))
    for document, one in _by_document(_rank(world, shuffled)).items():
        assert one.score == pytest.approx(plain[document].score, abs=1e-3)
        assert (one.samples, one.visits, one.tokens) == (
            plain[document].samples,
            plain[document].visits,
            plain[document].tokens,
        )


def test_what_has_no_loss_counts_for_nothing(world: World) -> None:
    """A sample whose loss is NaN, and one without a counted token."""
    rankings = []
    for first, second in ((np.nan, -1), (-1, np.nan)):
        broken = []
        for step in world.steps:
            losses, blocks = step.losses.copy(), step.block_losses.copy()
            losses[:2] = first, second
            blocks[:2] = [[first], [second]]
            broken.append(replace(step, losses=losses, block_losses=blocks))
        rankings.append(_rank(world, broken))
    kept = [_chosen(step, slice(2, None)) for step in world.steps]
    expected = _by_document(_rank(world, kept))
    for number, ranking in enumerate(rankings):
        assert ranking.nan_samples == len(world.steps)
        visits: dict[int, int] = {}
        for step in world.steps:
            for document in {span.document for span in _spans(world.samples[step.samples[number]])}:
                visits[document] = visits.get(document, 0) + 1
        for one, same in zip(ranking.hard, rankings[0].hard, strict=True):
            assert (one.document, one.score) == (same.document, same.score)
            other = expected[one.document]
            assert one.score == pytest.approx(other.score, abs=1)  # windows are of a few more steps
            assert (one.visits, one.tokens) == (other.visits, other.tokens)
            assert one.samples == other.samples
            assert one.nan_visits == visits.get(one.document, 0)


def _chosen(step: StepLosses, which: slice | npt.NDArray[np.generic]) -> StepLosses:
    arrays = (step.datasets, step.samples, step.losses, step.block_losses)
    return StepLosses(step.iteration, *(array[which] for array in arrays))


def test_a_document_that_never_had_a_loss_is_not_ranked(world: World) -> None:
    step = world.steps[0]
    documents = [{span.document for span in _spans(world.samples[k])} for k in step.samples]
    alone = next(
        (place, mine - set().union(*documents[:place], *documents[place + 1 :]))
        for place, mine in enumerate(documents)
        if mine - set().union(*documents[:place], *documents[place + 1 :])
    )
    losses, blocks = step.losses.copy(), step.block_losses.copy()
    losses[alone[0]], blocks[alone[0]] = np.nan, np.nan
    ranking = _rank(world, [replace(step, losses=losses, block_losses=blocks)])
    assert {one.document for one in ranking.hard} == set().union(*documents) - alone[1]
    assert _rank(world, []) == Ranking((), (), (), (), 0, 0, 0, None)
    nothing = replace(step, losses=np.full_like(losses, -1), block_losses=np.full_like(blocks, -1))
    assert _rank(world, [nothing]).hard == ()


def test_an_infinite_loss_is_hard_and_no_more(world: World) -> None:
    steps = list(world.steps)
    losses, blocks = steps[30].losses.copy(), steps[30].block_losses.copy()
    losses[5], blocks[5] = np.inf, np.inf
    steps[30] = replace(steps[30], losses=losses, block_losses=blocks)
    ranking = _rank(world, steps)
    assert all(np.isfinite(one.score) for one in ranking.hard)
    first = ranking.hard_samples[0]
    assert (first.iteration, first.sample_index) == (31, steps[30].samples[5])
    assert first.score == LIMIT


def test_little_text_does_not_win_by_noise() -> None:
    """Documents of which a few tokens were seen once, beside those that are hard."""
    world = World(seed=6, spread=0.05, effect=0.7)
    ranking = _by_document(_rank(world, world.steps[:104], iterations=(60, 104), blocks=False))
    noisy = sorted(ranking.values(), key=lambda one: one.tokens)[:25]
    assert max(abs(one.excess) for one in noisy) > 0.5
    assert max(one.score for one in noisy) < max(one.score for one in ranking.values()) - 1
    assert np.std([one.score for one in noisy]) < 1.6


def test_documents_are_compared_with_those_of_their_dataset(world: World) -> None:
    """Half of the documents, of a dataset of their own, cost two more; none of them is hard."""
    shifted = World(seed=0)
    shifted.truth[150:] += 2
    rng = np.random.default_rng(1)
    steps = [shifted._step(step.iteration - 1, step.samples, 3.0, rng) for step in shifted.steps]
    documents = {d: int(d >= 150) for d in range(DOCUMENTS)}
    kept = []
    for step in steps:
        owners = [world.samples[k][1:, 0] for k in step.samples]
        pure = np.array([len({documents[int(d)] for d in owner}) == 1 for owner in owners])
        datasets = np.array([documents[int(owner[0])] for owner in owners])
        kept.append(_chosen(replace(step, datasets=datasets), pure))
    ranking = _rank(world, kept)
    top = [one for one in ranking.hard if one.score > 4]
    assert {one.document for one in top} <= set(HARD)
    assert top
    for dataset in (0, 1):
        scores = [one.score for one in ranking.hard if one.dataset == dataset]
        assert abs(np.median(scores)) < 0.3


def test_the_worst_block_is_named(world: World) -> None:
    for one in _rank(world).hard[: len(HARD)]:
        assert one.worst is not None
        sample = world.samples[one.worst.sample_index]
        inside = sample[one.worst.block * 16 + 1 : (one.worst.block + 1) * 16 + 1]
        mine = inside[inside[:, 0] == one.document][:, 1]
        assert one.worst.sample_index in one.samples
        assert mine.min() == one.worst.token_start
        assert mine.max() == one.worst.token_end - 1
        step = world.steps[one.worst.iteration - 1]
        (place,) = np.flatnonzero(step.samples == one.worst.sample_index)
        loss = step.block_losses[place, one.worst.block]
        assert loss > np.median(step.block_losses) + EFFECT
        assert one.worst.score > 3
    for one in _rank(world).easy[: len(EASY)]:
        assert one.worst is not None
        assert one.worst.score < -3


def test_samples_are_ranked(world: World) -> None:
    ranking = _rank(world, limit=10)
    assert len(ranking.hard_samples) == len(ranking.hard) == len(ranking.easy) == 10
    for one in ranking.hard_samples:
        step = world.steps[one.iteration - 1]
        place = step.samples.tolist().index(one.sample_index)
        assert one.loss == step.losses[place]
        assert one.direction is Direction.HARD
        assert set(world.samples[one.sample_index][1:, 0]) & set(HARD)
    assert all(one.score < 0 for one in ranking.easy_samples)
    scores = [one.score for one in ranking.hard_samples]
    assert scores == sorted(scores, reverse=True)


def test_a_range_is_ranked_by_what_was_usual_around_it(world: World) -> None:
    ranking = _rank(world, iterations=(20, 30))
    assert {one.iteration for one in ranking.hard_samples} == set(range(20, 31))
    read = {k for step in world.steps[19:30] for k in step.samples.tolist()}
    assert {k for one in ranking.hard for k in one.samples} == read
    whole = {one.sample_index: one.score for one in _rank(world).hard_samples}
    for sample in ranking.hard_samples:
        assert sample.score == whole[sample.sample_index]


def test_the_level_follows_a_falling_loss(world: World) -> None:
    """Halves of the run, of steps in the steep beginning too, are as often above as below."""
    for first, last in ((3, 20), (20, 60), (60, len(world.steps) - 4)):
        excess = np.concatenate(
            [
                one.excess
                for one in standardise(world.steps)
                if first <= one.losses.iteration <= last
            ]
        )
        assert abs(np.median(excess)) < 0.25
    beginning = [float(np.median(one.excess)) for one in standardise(world.steps)][:4]
    assert np.abs(beginning).max() < 0.6  # it falls by 0.2 a step, which is a deviation
    blocks = np.concatenate([one.unit_excess for one in standardise(world.steps[40:])])
    assert np.abs(np.median(blocks, axis=0)).max() < 0.1
    assert np.median(np.abs(blocks)) * 1.4826 == pytest.approx(1, abs=0.05)


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(st.integers(0, 40), max_size=120),
    width=st.integers(0, 3),
    blocks=st.booleans(),
)
def test_every_step_comes_out_once_in_order(batches: list[int], width: int, blocks: bool) -> None:
    rng = np.random.default_rng(0)
    steps = [
        StepLosses(
            number,
            np.zeros(size, np.int64),
            np.arange(size),
            rng.random(size, np.float32),
            rng.random((size, width), np.float32),
        )
        for number, size in enumerate(batches, 1)
    ]
    got = list(standardise(steps, blocks=blocks))
    assert [one.losses.iteration for one in got] == list(range(1, len(batches) + 1))
    for step, one in zip(steps, got, strict=True):
        units = width if blocks and width else 1
        assert one.excess.shape == (len(step.losses),)
        assert one.unit_excess.shape == (len(step.losses), units)
        assert np.isfinite(one.unit_excess).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_belong_to_the_block_of_their_label(data: st.DataObject) -> None:
    """Shares and merged equations against a count token by token and dense algebra."""
    units, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    length = units * size
    samples, step_spans = data.draw(st.integers(1, 3)), []
    owners = []
    for _ in range(samples):
        inner = st.lists(st.integers(1, length), max_size=4, unique=True)
        cuts = [0, *sorted(data.draw(inner)), length + 1]
        spans, mine = [], []
        for start, end in pairwise(cuts):
            document = data.draw(st.integers(0, 5))
            spans.append(DocumentSpan(document, document, 7, 7 + end - start, start, 0))
            mine += [document] * (end - start)
        step_spans.append(spans)
        owners.append(mine)
    excess = np.array(
        data.draw(
            st.lists(st.floats(-3, 3, width=32), min_size=samples * units, max_size=samples * units)
        ),
        np.float32,
    ).reshape(samples, units)
    zeros = np.zeros(samples, np.int64)
    losses = StepLosses(1, zeros, zeros, np.ones(samples, np.float32), excess)
    step = StepExcess(losses, np.ones(samples, np.float32), excess, 0.0, 1.0)
    parts = parts_of(lambda *_: step_spans, zeros, zeros, length)
    overlap = parts.overlap(length, units)
    dense = np.zeros((samples * units, 6))
    for number, mine in enumerate(owners):
        for position in range(length):
            dense[number * units + position // size, mine[position + 1]] += 1 / size
    totals = np.zeros_like(dense)
    for part, row in enumerate(overlap):
        sample, document = parts.sample[part], parts.document[part]
        totals[sample * units : (sample + 1) * units, document] += row / size
    np.testing.assert_allclose(totals, dense, atol=1e-6)
    equations = equations_of(step, parts, overlap)
    document = parts.document[equations.part]
    sparse = np.zeros((len(equations.excess), 6))
    np.add.at(sparse, (equations.unit, document), equations.share)
    weighted = sparse * equations.weight[:, None]
    np.testing.assert_allclose(weighted.T @ sparse, dense.T @ dense, atol=1e-4)
    np.testing.assert_allclose(weighted.T @ equations.excess, dense.T @ excess.ravel(), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_effects_are_those_of_dense_algebra(seed: int) -> None:
    """Given the variances that were found, each estimate follows from the normal equations."""
    from flagscale.data_inspect.attribution import _System

    rng = np.random.default_rng(seed)
    units, documents = 150, 25
    first, second = rng.integers(documents, size=(2, units))
    share = rng.uniform(0.2, 0.8, units)
    equations = Equations(
        rng.normal(size=units).astype(np.float32),
        rng.integers(1, 4, units).astype(np.float32),
        np.concatenate([np.arange(units)] * 2),
        np.arange(2 * units),
        np.concatenate([share, 1 - share]).astype(np.float32),
    )
    document = np.concatenate([first, second])
    dense = np.zeros((units, documents))
    np.add.at(dense, (equations.unit, document), equations.share)
    ridge, middle = rng.uniform(0.5, 2, documents), rng.normal(size=documents)
    weighted = dense * equations.weight[:, None]
    expected = np.linalg.solve(
        weighted.T @ dense + np.diag(ridge), weighted.T @ equations.excess + ridge * middle
    )
    system = _System(equations, document, documents)
    got = system.solve(ridge, middle, np.zeros(documents))
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert np.isfinite(attribute(equations, document, np.zeros(documents, np.int64)).score).all()


def test_losses_that_do_not_fit_are_refused(world: World) -> None:
    step, other = world.steps[0], world.steps[1]
    narrow = replace(other, block_losses=other.block_losses[:, :4])
    with pytest.raises(DataError, match="do not fit"):
        _rank(world, [step, narrow])
    with pytest.raises(DataError, match="do not fit"):
        _rank(world, [replace(step, losses=step.losses[:3])])
    with pytest.raises(DataError, match="do not fill it"):
        rank([step], world.spans_of, SEQ_LENGTH + 8, limit=None)
    with pytest.raises(ConfigError, match="do not divide"):
        rank([step], world.spans_of, SEQ_LENGTH + 1, limit=None)
    with pytest.raises(ConfigError, match="nothing to rank"):
        _rank(world, iterations=(5, 4))
    with pytest.raises(ConfigError, match="nothing to rank"):
        _rank(world, limit=-1)
