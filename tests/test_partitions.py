import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.method.partitions import PARTITIONS, Partition, contiguous, random, strided

SHAPES = [(8, 1), (8, 2), (8, 4), (8, 8), (12, 3)]


@pytest.mark.parametrize("make", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize(("length", "subsets"), SHAPES)
def test_partition(make, length, subsets):
    partition = make(length, subsets)
    assert partition.subsets == subsets

    masks = partition.masks_SxT
    assert masks.shape == (subsets, length)
    np.testing.assert_array_equal(masks.sum(axis=0), 1)  # disjoint, and all positions covered
    for mask, positions in zip(masks, partition.positions_SxP, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(mask), positions)

    in_slot_order = partition.positions_SxP.reshape(-1)
    np.testing.assert_array_equal(in_slot_order[partition.slots_T], np.arange(length))
    previous = partition.previous_slots_SxP
    for position, slot in zip(in_slot_order, previous.reshape(-1), strict=True):
        assert 0 <= slot < length
        assert position == 0 or in_slot_order[slot] == position - 1


@pytest.mark.parametrize("make", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize(("length", "subsets"), SHAPES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_split_and_merge(make, length, subsets, axis):
    partition = make(length, subsets)
    shape = [2, 3, 5]
    shape[axis] = length
    array = np.arange(np.prod(shape)).reshape(shape)
    split = partition.split(jnp.asarray(array), axis)
    axis %= 3
    assert split.shape == (*shape[:axis], subsets, length // subsets, *shape[axis + 1 :])
    for index, positions in enumerate(partition.positions_SxP):
        np.testing.assert_array_equal(
            np.take(np.asarray(split), index, axis=axis), np.take(array, positions, axis=axis)
        )
    np.testing.assert_array_equal(partition.merge(split, axis), array)


@pytest.mark.parametrize(("length", "subsets"), SHAPES)
def test_strided_reshapes_equal_the_general_gathers(length, subsets):
    fast = strided(length, subsets)
    np.testing.assert_array_equal(
        fast.positions_SxP % subsets, np.arange(subsets)[:, None] + np.zeros_like(fast.positions_SxP)
    )
    general = Partition(fast.positions_SxP)
    array = jnp.asarray(np.random.default_rng(0).normal(size=(2, length, 3)))
    split = general.split(array, 1)
    np.testing.assert_array_equal(fast.split(array, 1), split)
    np.testing.assert_array_equal(fast.merge(split, 1), general.merge(split, 1))
    np.testing.assert_array_equal(fast.masks_SxT, general.masks_SxT)


def test_each_partition_is_what_its_name_says():
    np.testing.assert_array_equal(contiguous(8, 2).positions_SxP, [[0, 1, 2, 3], [4, 5, 6, 7]])
    dealt = random(64, 4).positions_SxP
    np.testing.assert_array_equal(dealt, random(64, 4).positions_SxP)  # in every step and run
    # Neighbours are mostly in other subsets, but not always.
    owner = np.argsort(dealt.reshape(-1)) // 16
    assert 0.05 < np.mean(owner[1:] == owner[:-1]) < 0.5


@pytest.mark.parametrize("make", PARTITIONS.values(), ids=PARTITIONS)
def test_subsets_must_divide_the_positions(make):
    with pytest.raises(ValueError, match="3 subsets do not divide 8 positions"):
        make(8, 3)
