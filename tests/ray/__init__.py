"""Tests on a real Ray. Its actors cannot import a module of the tests, so the fakes go to them by value."""

import ray.cloudpickle

from tests.support import fakes

ray.cloudpickle.register_pickle_by_value(fakes)
