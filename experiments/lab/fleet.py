"""Energy of a service with teacher and student, from its request rate or from a claimed saving."""

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
    """Computes the energy of a service with teacher and student, at one request per accelerator at a time.

    The energy of a request is power x PUE x latency; idle accelerators use none. `rate` follows from `kwh` if that is
    given instead.

    Args:
        watts: power of an accelerator with its share of the server, under load.
        pue: power usage effectiveness of the data centre.
        teacher_ms: latency of a request to the teacher in milliseconds.
        student_ms: latency of a request to the student in milliseconds.
        kwh: energy saved per year.
        rate: requests per second.

    Returns:
        JSON types: for `teacher`, `student` and `saved` the `joules` per request, `kwh_a_year`, average `megawatts`,
        and average number of `busy` accelerators (Little's law: rate x latency); `requests_a_second`, `requests_a_day`.

    Raises:
        AntgmmError: not exactly one of `kwh` and `rate` is given, or `kwh` although a request saves nothing.
    """
    seconds = {"teacher": teacher_ms / 1e3, "student": student_ms / 1e3, "saved": (teacher_ms - student_ms) / 1e3}
    joules = {name: watts * pue * taken for name, taken in seconds.items()}
    if kwh is not None and rate is None:
        if joules["saved"] <= 0:
            raise AntgmmError("a request saves nothing at this power and these latencies: no rate saves energy")
        rate = kwh / kwh_a_year(joules["saved"], 1.0)
    elif rate is None or kwh is not None:
        raise AntgmmError(
            "specify either --kwh-a-year (which rate saves that much?) or --rate (how much does it save?)"
        )
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
