"""What a device may be called in a resource's configuration."""

import os
import re

DEVICE_PATTERN = r"auto|cpu|cuda(:\d+)?"
DEVICE_HELP = "auto (the first CUDA device, else the CPU), cpu, cuda or cuda:N"


def chosen_device(configured: str, variable: str) -> str:
    """The configured device, else the one that an environment variable names, else ``auto``.

    Raises ValueError for a name that is no device; the message says where it came from.
    """
    device = configured or os.environ.get(variable) or "auto"
    if not re.fullmatch(DEVICE_PATTERN, device):
        origin = "the resource's device" if configured else f"the environment variable {variable}"
        raise ValueError(f"{origin} is {device!r}; it must be {DEVICE_HELP}.")
    return device
