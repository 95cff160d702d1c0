import numpy as np
import torch
from monai.transforms import Compose

from monai_vslp.data import ItemRandomDataset
from monai_vslp.transforms import RandStainJitterd

ITEMS = [{"image": torch.full((3, 4, 4), 0.2 + 0.1 * i)} for i in range(6)]


def load(order, seed=3):
    data = ItemRandomDataset(ITEMS, Compose([RandStainJitterd("image", prob=0.8)])).set_random_state(seed)
    return {index: np.asarray(data[index]["image"]) for index in order}


def test_an_item_looks_the_same_whoever_loads_it():
    whole = load(range(6))
    for part in ([5, 4, 3, 2, 1, 0], [0, 2, 4], [1, 3, 5], [3]):
        for index, image in load(part).items():
            np.testing.assert_array_equal(image, whole[index])


def test_items_and_epochs_differ():
    same = [{"image": torch.full((3, 4, 4), 0.4)}] * 8
    data = ItemRandomDataset(same, Compose([RandStainJitterd("image", prob=1.0)]))
    assert len({float(data[i]["image"][0, 0, 0]) for i in range(8)}) == 8
    first, second = load(range(6), 3), load(range(6), 4)
    assert any(not np.array_equal(first[i], second[i]) for i in first)


def test_without_random_transforms_nothing_is_asked_of_them():
    assert ItemRandomDataset(ITEMS)[2]["image"] is ITEMS[2]["image"]
    assert ItemRandomDataset(ITEMS, lambda item: item["image"].sum())[0].shape == ()
