"""The device that teachers answer on."""

import dagster as dg
from pydantic import Field

from resources.device import DEVICE_HELP, chosen_device


class TeacherGpuResource(dg.ConfigurableResource):
    """One accelerator, or the CPU, for generation. How many steps may use it at once is the pool ``teacher_gpu``."""

    device: str = Field(default="", description=f"{DEVICE_HELP}. Empty: the environment variable DISTILL_TEACHER_DEVICE.")

    def device_name(self) -> str:
        """The device for the library. Raises ValueError for a name that is no device."""
        return chosen_device(self.device, "DISTILL_TEACHER_DEVICE")
