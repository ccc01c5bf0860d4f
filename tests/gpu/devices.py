"""Which CUDA devices the driver shows, without torch, whose import takes seconds."""

import ctypes
from functools import cache

LIBRARY = "libcuda.so.1"
NAME_BYTES = 256


@cache
def _found() -> tuple[list[str], str]:
    """Names of the devices, and why there is none."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return [], f"no CUDA device: {LIBRARY} is not here"
    if code := driver.cuInit(0):
        return [], f"no CUDA device: the driver's cuInit returns {code}"
    count, name, names = ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES), []
    driver.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        handle = ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(handle), index)
        driver.cuDeviceGetName(name, NAME_BYTES, handle)
        names.append(name.value.decode())
    return names, "" if names else "no CUDA device: the driver shows none"


def cuda_devices() -> list[str]:
    """Their names; none where there is no driver or CUDA_VISIBLE_DEVICES hides them."""
    return list(_found()[0])


def why_none() -> str:
    """Why there is no device, as a clause."""
    return _found()[1]
