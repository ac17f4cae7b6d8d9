"""The noise is uniform, independent over everything it is keyed by, and the same bits in whatever company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from foredraft.noise import Stream, exponential, fold, mix, uniform

ROWS, VOCAB = 64, 512
LIKELY = 1e-4  # the smallest p-value that a sound generator may show; inputs are fixed, so no test is flaky


def grid(seed: int = 7, stream: int = Stream.TOKEN, first: int = 0) -> torch.Tensor:
    return uniform(seed, range(first, first + ROWS), VOCAB, stream)


def independent(a: torch.Tensor, b: torch.Tensor, bins: int = 16) -> float:
    """p-value of a chi-square test that pairs fill a bins x bins table evenly."""
    cells = (a.flatten() * bins).long() * bins + (b.flatten() * bins).long()
    return float(stats.chisquare(cells.bincount(minlength=bins * bins).numpy()).pvalue)


def low_bits(numbers: torch.Tensor) -> torch.Tensor:
    """Uniforms made of the bits below the 16 highest: a weak mixer shows there first."""
    return (numbers * 2**16) % 1


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
@pytest.mark.parametrize("bits", [lambda u: u, low_bits], ids=["all", "low"])
def test_uniform(seed, bits):
    assert stats.kstest(bits(grid(seed)).flatten().numpy(), "uniform").pvalue > LIKELY


@pytest.mark.parametrize("bits", [lambda u: u, low_bits], ids=["all", "low"])
@pytest.mark.parametrize(
    "pair",
    [
        lambda: (grid()[:, :-1], grid()[:, 1:]),
        lambda: (grid()[:, : VOCAB // 2], grid()[:, VOCAB // 2 :]),
        lambda: (grid()[:-1], grid()[1:]),
        lambda: (grid(), grid(first=2**20)),
        lambda: (grid(), grid(seed=8)),
        lambda: (grid(seed=0), grid(seed=2**62)),
        lambda: (grid(), grid(stream=Stream.DRAFT)),
        lambda: (grid(stream=Stream.RESIDUAL), grid(stream=Stream.BONUS)),
        lambda: (grid(seed=7)[1:], grid(seed=8)[:-1]),  # seed + position must not be what counts
    ],
    ids=["token", "half", "position", "far", "seed", "bit", "stream", "verifier", "diagonal"],
)
def test_neighbours_are_independent(pair, bits):
    a, b = pair()
    assert independent(bits(a), bits(b)) > LIKELY


def test_planted_seed_plus_position_is_found():
    def naive(seed: int) -> torch.Tensor:
        return torch.cat([grid(seed + position)[:1] for position in range(ROWS)])

    assert independent(naive(7)[1:], naive(8)[:-1]) < LIKELY


def test_streams_and_folds_differ():
    assert len({fold(seed, value) for seed in range(100) for value in range(100)}) == 10_000
    assert len({mix(value) for value in range(10_000)}) == 10_000


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**20), min_size=1, max_size=6), st.integers(1, 70))
def test_a_number_does_not_depend_on_its_company(seed, positions, vocab):
    together = exponential(seed, positions, vocab)
    for row, position in enumerate(positions):
        assert torch.equal(exponential(seed, [position], vocab)[0], together[row])
    some = torch.randperm(vocab)[: vocab // 2 + 1]
    assert torch.equal(exponential(seed, positions, some), together[:, some])
    own_ids = some.expand(len(positions), -1)
    assert torch.equal(exponential([seed] * len(positions), positions, own_ids), together[:, some])


def test_known_values():
    """The generator is part of the promise `same seed, same text`: changing it is a breaking change."""
    bits = (uniform(3, [0, 1], 3) * 2**52).to(torch.int64).tolist()
    assert bits == [
        [2340338343718095, 1119990873126926, 1979316221854489],
        [3818566529860402, 843513166451119, 3894414246457628],
    ]


def test_exponential_numbers_have_their_distribution():
    numbers = exponential(5, range(ROWS), VOCAB)
    assert stats.kstest(numbers.flatten().numpy(), "expon").pvalue > LIKELY
    assert stats.kstest(-numbers.log().flatten().numpy(), "gumbel_r").pvalue > LIKELY


def test_noise_is_never_zero_or_infinite(monkeypatch):
    monkeypatch.setattr("foredraft.noise._unclamped", lambda *_: torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    for numbers in (uniform(0, [0], 2), exponential(0, [0], 2)):
        assert bool(((numbers > 0) & numbers.isfinite()).all())
    assert float(uniform(0, [0], 2).max()) < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_bits_on_every_device():
    here, there = (exponential(9, range(33), 32_000, device=device).cpu() for device in ("cpu", "cuda"))
    assert torch.equal(uniform(9, range(33), 32_000), uniform(9, range(33), 32_000, device="cuda").cpu())
    assert int((here != there).sum()) <= 1  # a float64 logarithm that rounds the other way: 1 in 2**28
