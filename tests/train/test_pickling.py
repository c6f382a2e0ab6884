import functools
import pickle
import threading

import pytest

from lepton_ray.errors import ConfigError
from lepton_ray.train import pickling


def closing_over(lock):
    def loss(outputs, target):
        with lock:
            return (outputs - target).square().mean()

    return loss


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (closing_over(threading.Lock()), r"loss: its variable lock \(a _thread\.lock\) cannot be sent"),
        (functools.partial(max, key=threading.Lock()), r"loss\(key\) \(a _thread\.lock\)"),
        ([1, {"a": (2, threading.Lock())}], r"loss\[1\]\['a'\]\[1\] \(a _thread\.lock\)"),
    ],
)
def test_what_cannot_be_pickled_is_named(value, message):
    with pytest.raises(ConfigError, match=message):
        pickling.dumps(value, "loss")


def test_functions_travel_by_value():
    factor = 3
    assert pickle.loads(pickling.dumps(lambda x: factor * x, "loss"))(2) == 6
