"""The device that students, teachers and baselines are measured on."""

import dagster as dg
from pydantic import Field

from resources.device import DEVICE_HELP, chosen_device
from resources.student_gpu import StudentGpuResource


class EvaluatorResource(dg.ConfigurableResource):
    """Where reports are measured: beside the students unless told otherwise, so that one GPU serves both in turn."""

    device: str = Field(
        default="",
        description=f"{DEVICE_HELP}. Empty: the environment variable DISTILL_EVALUATOR_DEVICE, else the students' device.",
    )

    def device_name(self, student_gpu: StudentGpuResource) -> str:
        """The device for the library. Raises ValueError for a name that is no device."""
        device = chosen_device(self.device, "DISTILL_EVALUATOR_DEVICE")
        return student_gpu.device_name() if device == "auto" else device
