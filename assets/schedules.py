"""What happens by the calendar. Off until switched on: measuring takes a GPU for as long as the reports took."""

import dagster as dg

from assets.jobs import REEVALUATION

MONDAY_FOUR_O_CLOCK = "0 4 * * 1"


def weekly_reevaluation() -> dg.ScheduleDefinition:
    """Every report anew, so that a change of libraries, drivers or tasks shows as a change of numbers."""
    return dg.ScheduleDefinition(
        name="weekly_reevaluation",
        job_name=REEVALUATION,
        cron_schedule=MONDAY_FOUR_O_CLOCK,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Measures every student again, Mondays at 04:00 UTC.",
    )
