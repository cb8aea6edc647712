"""What a service's energy comes to with teacher and student, and the way back: from a claim to the rate it implies."""

from typing import Any

from antgmm_jax.errors import AntgmmError
from experiments.report.savings import SECONDS_A_DAY, kwh_a_year


def service(
    watts: float,
    pue: float,
    teacher_ms: float,
    student_ms: float,
    *,
    kwh: float | None = None,
    rate: float | None = None,
) -> dict[str, Any]:
    """A service that moves from teacher to student, each accelerator serving one request at a time.

    A request costs power times overhead times latency; idle accelerators cost nothing. One of `kwh` and `rate` is
    given, the other follows.

    Args:
        watts: power of an accelerator, or of its share of a server, while it serves.
        pue: power of the whole data centre over that of its servers.
        teacher_ms: latency of a request to the teacher.
        student_ms: to the student.
        kwh: energy that a year is to save.
        rate: requests a second.

    Returns:
        JSON types: for `teacher`, `student` and `saved` the `joules` of a request, `kwh_a_year`, `megawatts` on average
        and `busy` accelerators on average (Little's law: rate times latency); `requests_a_second`, `requests_a_day`.

    Raises:
        AntgmmError: not one of `kwh` and `rate`; or a claim where a request saves nothing.
    """
    seconds = {"teacher": teacher_ms / 1e3, "student": student_ms / 1e3, "saved": (teacher_ms - student_ms) / 1e3}
    joules = {name: watts * pue * taken for name, taken in seconds.items()}
    if kwh is not None and rate is None:
        if joules["saved"] <= 0:
            raise AntgmmError("a request saves nothing at this power and these latencies: no rate saves energy")
        rate = kwh / kwh_a_year(joules["saved"], 1.0)
    elif rate is None or kwh is not None:
        raise AntgmmError("give one of --kwh-a-year (which rate saves that much?) and --rate (how much does it save?)")
    return {
        "requests_a_second": rate,
        "requests_a_day": rate * SECONDS_A_DAY,
        **{
            name: {
                "joules": joules[name],
                "kwh_a_year": kwh_a_year(joules[name], rate),
                "megawatts": joules[name] * rate / 1e6,
                "busy": rate * taken,
            }
            for name, taken in seconds.items()
        },
    }
