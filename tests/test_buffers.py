"""The swap buffer: everything comes out once, in batches of one size, mixed, and never more than it may hold."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_sae_kit.buffers import mix


def blocks_of(sizes):
    numbers = torch.arange(sum(sizes), dtype=torch.float16)[:, None]
    return [{"a": part, "b": -part.expand(-1, 3)} for part in numbers.split(list(sizes))]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    batch_size=st.integers(1, 40),
    capacity=st.integers(0, 100),
    seed=st.integers(0, 5),
)
def test_every_token_comes_out_once_with_its_fellows(sizes, batch_size, capacity, seed):
    batches = list(mix(blocks_of(sizes), batch_size, capacity, np.random.default_rng(seed)))
    assert sorted(torch.cat([batch["a"] for batch in batches]).flatten().tolist()) == list(range(sum(sizes)))
    assert all(len(batch["a"]) == batch_size for batch in batches[:-1])
    assert 0 < len(batches[-1]["a"]) <= batch_size
    assert all(torch.equal(batch["b"], -batch["a"].expand(-1, 3)) for batch in batches)
    assert all(batch["a"].dtype == torch.float32 for batch in batches)


@given(batch_size=st.integers(1, 8), capacity=st.integers(8, 60))
def test_no_token_comes_out_before_the_buffer_was_full(batch_size, capacity):
    taken = []

    def source():
        for number in range(300):
            taken.append(number)
            yield {"a": torch.tensor([[float(number)]])}

    first = next(mix(source(), batch_size, capacity, np.random.default_rng(0)))
    assert len(taken) == capacity + 1
    assert first["a"].max() < capacity


def test_tokens_wait_as_long_as_chance_has_it():
    """From a buffer of 1,000, of which 10 leave at a time, a token leaves after 1,000 others on average."""
    blocks = [{"a": torch.arange(i, i + 10, dtype=torch.float32)[:, None]} for i in range(0, 60_000, 10)]
    out = torch.cat([batch["a"] for batch in mix(blocks, 10, 1000, np.random.default_rng(0))]).flatten().numpy()
    place = np.empty(60_000)
    place[out.astype(int)] = np.arange(60_000)
    waits = (place - np.arange(60_000) + 1000)[5_000:50_000]
    assert abs(waits.mean() - 1000) < 30
    assert abs(waits.std() - 1000) < 50  # exponential


def test_nothing_in_nothing_out():
    assert list(mix([], 4, 10, np.random.default_rng(0))) == []
