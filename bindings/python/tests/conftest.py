import gc


def pytest_sessionfinish():
    gc.collect()  # caches in the frames of caught exceptions, before nanobind looks for leaks
