"""Markdown tables of the serving bench."""

from __future__ import annotations

from pathlib import Path

from prism_trt.bench.report import markdown_table, number_text
from prism_trt.bench.serving.results import (
    Fault,
    Fuzzing,
    LoadPoint,
    Memory,
    Outcomes,
    Percentiles,
    ServingResult,
    Soak,
)
from prism_trt.manifest import atomic_file

_MIB = 2**20


def markdown(result: ServingResult) -> str:
    """All tables of a result, with the command and the machine above them."""
    engine, environment = result.engine, result.environment
    drafting = "no drafter" if engine.drafter_sha256 is None else f"drafter {engine.drafter_sha256[:12]}"
    parts = [
        f"```text\n{result.command}\n```",
        f"Machine: {environment.processor}, {result.processors} processors, load average {result.load_average:.1f} "
        f"before the run, niceness {result.niceness}. Engine: {engine.runtime}, {engine.dtype}, {drafting}, "
        f"{result.slots} slots, {engine.threads} threads. prism_trt {environment.prism_trt}, "
        f"torch {environment.torch}. Greedy answers of up to {result.answer_tokens} tokens. "
        f"From the launch to the first token: {result.start_seconds:.1f} s.",
    ]
    if result.load:
        parts.append(load_table(result.load))
    if result.faults:
        parts.append(fault_table(result.faults))
    if result.fuzzing is not None:
        parts.append(fuzzing_tables(result.fuzzing))
    if result.soak is not None:
        parts.append(soak_table(result.soak))
    return "\n\n".join(parts) + "\n"


def write_markdown(result: ServingResult, path: Path) -> None:
    """Write the tables, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")


def load_table(points: tuple[LoadPoint, ...]) -> str:
    """One line per number of clients."""
    header = (
        "streams",
        "seconds",
        "answers",
        "refused or failed",
        "lost",
        "different",
        "tokens/s",
        "first text p50 / p99, s",
        "inter-token p50 / p99, ms",
        "gap p50 / p99, ms",
        "server + model memory, MiB",
    )
    lines = [
        (
            str(point.streams),
            f"{point.seconds:.0f}",
            str(point.outcomes.answers),
            str(point.outcomes.refused + point.outcomes.failed),
            str(point.outcomes.lost),
            str(point.different),
            f"{point.tokens_per_second:.1f}",
            _percentiles(point.first_text, 1, 2),
            _percentiles(point.inter_token, 1000, 0),
            _percentiles(point.gap, 1000, 0),
            f"{_resident(point.memory_before)} → {_resident(point.memory_after)}",
        )
        for point in points
    ]
    return markdown_table(header, lines)


def fault_table(faults: tuple[Fault, ...]) -> str:
    """One line per fault."""
    header = ("fault", "passed", "open requests", "lost", "what was measured", "problems")
    lines = [
        (
            fault.name,
            "yes" if fault.passed else "NO",
            _outcomes(fault.outcomes),
            str(fault.outcomes.lost),
            "; ".join(f"{name} {_figure(name, value)}" for name, value in fault.figures.items()),
            "; ".join(fault.problems) or "-",
        )
        for fault in faults
    ]
    return markdown_table(header, lines)


def fuzzing_tables(fuzzing: Fuzzing) -> str:
    """What became of the broken requests, by kind, and of the valid ones between them."""
    header = ("kind", "sent", "refused", "valid after all", "unreadable", "silent", "connection lost", "leaks")
    lines = [
        (
            kind,
            *(str(count) for count in (c.sent, c.refused, c.accepted, c.closed, c.silent, c.connection_lost, c.leaks)),
        )
        for kind, c in fuzzing.kinds.items()
    ]
    total = [str(sum(int(line[column]) for line in lines)) for column in range(1, len(header))]
    sentence = (
        f"Broken requests (seed {fuzzing.seed}, {fuzzing.seconds:.0f} s) between valid ones, of which "
        f"{fuzzing.valid.answers} were answered, {fuzzing.valid.refused + fuzzing.valid.failed} failed, "
        f"{fuzzing.valid.lost} were lost and {fuzzing.different} were not answered as before. "
        f"Server and model memory {_resident(fuzzing.memory_before)} → {_resident(fuzzing.memory_after)} MiB, "
        f"shared {fuzzing.memory_before.shared / _MIB:.0f} → {fuzzing.memory_after.shared / _MIB:.0f} MiB."
    )
    return f"{sentence}\n\n{markdown_table(header, [*lines, ('all', *total)])}"


def soak_table(soak: Soak) -> str:
    """Memory at the start, the quarter and the end, and its slope."""
    quarter = next(sample for sample in soak.samples if sample.seconds >= soak.samples[-1].seconds / 4)
    moments = (soak.samples[0], quarter, soak.samples[-1])
    header = (
        "memory, MiB",
        *(f"at {moment.seconds / 60:.1f} min" for moment in moments),
        "slope after the quarter, MiB/h",
    )
    lines = [
        (
            name,
            *(f"{getattr(moment.memory, name) / _MIB:.1f}" for moment in moments),
            number_text(soak.slope.get(name), 2),
        )
        for name in Memory.model_fields
    ]
    sentence = (
        f"Soak: {soak.streams} streams for {soak.seconds / 60:.1f} minutes; {_outcomes(soak.outcomes)}, "
        f"{soak.cancelled} cancelled by the client, {soak.malformed} broken requests; {soak.different} answers "
        f"differed, {soak.outcomes.lost} requests were lost. {len(soak.incidents)} times a server was replaced."
    )
    incidents = "".join(f"\n\n    {line}" for line in soak.incidents)
    return f"{sentence}{incidents}\n\n{markdown_table(header, lines)}"


def _percentiles(sample: Percentiles | None, scale: float, digits: int) -> str:
    return "-" if sample is None else f"{scale * sample.p50:.{digits}f} / {scale * sample.p99:.{digits}f}"


def _resident(memory: Memory) -> str:
    return f"{memory.server / _MIB:.0f} + {memory.model / _MIB:.0f}"


def _outcomes(outcomes: Outcomes) -> str:
    return ", ".join(f"{count} {name}" for name, count in outcomes.model_dump().items() if count) or "none"


def _figure(name: str, value: float) -> str:
    return f"{value:g}" if name.endswith("(number)") else f"{value:.2f} s"
