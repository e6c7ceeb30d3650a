"""What a code item asks for: how the program is judged, with which tests, within which limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlvr_sandbox.execution import Limits
from rlvr_sandbox.typed_json import from_json

Mode = Literal["stdio", "call", "split", "checker", "inproc"]

MAX_TESTS = 1_000
MAX_TEXT_CHARS = 16 << 20
_TESTED_BY_PROGRAM = ("stdio", "checker")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StdioTest(_Strict):
    """One run: what the program reads, and what it should print (in mode ``checker``: a reference output)."""

    stdin: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
    stdout: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class CallTest(_Strict):
    """One call and the value that it should return; JSON, or the typed forms of ``rlvr_sandbox.typed_json``."""

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    expected: Any

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        for value in (*self.args, *self.kwargs.values(), self.expected):
            from_json(value)
        return self


class CompareSpec(_Strict):
    """How an output is compared with the expected one.

    Attributes:
        output: Of printed text: ``exact`` bytes; ``lines``, blind to white space at the ends of lines and of the text;
            ``tokens``, blind to how much white space separates words.
        ignore_case: Compare printed text without regard to ASCII case.
        float_abs: Absolute tolerance of numbers; applies to printed numbers except where ``output`` is ``exact``.
        float_rel: Relative tolerance of numbers, of the larger one.
        allow_empty: Let a test whose expected output is empty be passed by a program that prints nothing.
        bool_is_int: Let ``True`` equal 1 and ``False`` equal 0 in returned values.
        nan_equal: Let NaN equal NaN in returned values.
        tuples_as_lists: Let a tuple equal a list of the same parts in returned values; JSON knows lists only.
    """

    output: Literal["exact", "lines", "tokens"] = "lines"
    ignore_case: bool = False
    float_abs: Annotated[float, Field(ge=0, lt=float("inf"))] = 0.0
    float_rel: Annotated[float, Field(ge=0, lt=1)] = 0.0
    allow_empty: bool = False
    bool_is_int: bool = False
    nan_equal: bool = False
    tuples_as_lists: bool = True


class LimitsSpec(_Strict):
    """What one run may take; a run is one test in ``stdio`` and ``checker``, and all tests together in other modes.

    Attributes:
        cpu_s: CPU seconds; wall time beyond three times that plus 2 s counts as hanging.
        memory_mb: MiB of memory.
        output_kb: KiB of stdout, and the same of stderr.
        processes: Processes and threads at once; 1 forbids new processes.
    """

    cpu_s: Annotated[float, Field(gt=0, le=120)] = 5.0
    memory_mb: Annotated[int, Field(ge=32, le=16_384)] = 512
    output_kb: Annotated[int, Field(ge=1, le=65_536)] = 1_024
    processes: Annotated[int, Field(ge=1, le=256)] = 1

    def limits(self) -> Limits:
        """The same for an executor."""
        return Limits(
            cpu_s=self.cpu_s,
            memory_bytes=self.memory_mb << 20,
            output_bytes=self.output_kb << 10,
            processes=self.processes,
        )


class CodeSpec(_Strict):
    """How a program is judged.

    Attributes:
        language: What the response is written in; modes other than ``stdio`` and ``checker`` know Python only.
        mode: ``stdio`` compares what it prints; ``call`` what ``entry_point`` returns; ``split`` runs ``test_code`` in
            a sandbox of its own, from which ``candidate`` reaches the program; ``checker`` lets the Python program
            ``checker`` judge what it prints; ``inproc`` runs ``test_code`` beside the program, which can forge it.
        entry_point: The function (or class) under test; a method of ``Solution`` is found by its own name.
        tests: For ``stdio`` and ``checker`` of ``{stdin, stdout}``, for ``call`` of ``{args, kwargs, expected}``.
        test_code: For ``split`` and ``inproc``: ``def check(candidate)``, plain asserts, ``test_`` functions or
            ``unittest`` cases.
        checker: For ``checker``: reads ``input.txt``, ``expected.txt`` and ``output.txt``; exits 0 to accept, 1 not to.
        compare: How outputs are compared in ``stdio`` and ``call``.
        inplace: ``call``: where ``None`` is returned, judge the first argument after the call; ``split``: copy changed
            list, dict and set arguments back to the tests.
        objects: ``split``: let what is no plain data stay in the program's sandbox and be used from the tests, as tests
            of classes need; such an object may answer the same question differently each time. Else results are data.
        extract: Whether the program is the last fenced block of the response, or else the whole response.
        limits: What a run may take.
        run_all: Run the tests after a failed one too, so that ``detail`` counts them; the verdict stays the first's.
    """

    language: Annotated[str, Field(min_length=1, max_length=40)] = "python"
    mode: Mode
    entry_point: Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)?$", max_length=200)] | None = None
    tests: Annotated[list[StdioTest | CallTest], Field(max_length=MAX_TESTS)] = []
    test_code: Annotated[str, Field(max_length=MAX_TEXT_CHARS)] | None = None
    checker: Annotated[str, Field(max_length=MAX_TEXT_CHARS)] | None = None
    compare: CompareSpec = CompareSpec()
    inplace: bool = False
    objects: bool = False
    extract: bool = True
    limits: LimitsSpec = LimitsSpec()
    run_all: bool = False

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        for applies, sentence in _RULES:
            if applies(self):
                raise ValueError(sentence.format(mode=self.mode, language=self.language))
        return self


def _has_test_of_other_mode(spec: CodeSpec) -> bool:
    wanted = StdioTest if spec.mode in _TESTED_BY_PROGRAM else CallTest
    return any(not isinstance(test, wanted) for test in spec.tests)


_RULES: tuple[tuple[Callable[[CodeSpec], bool], str], ...] = (
    (
        lambda spec: spec.mode not in _TESTED_BY_PROGRAM and spec.language != "python",
        "mode {mode!r} judges Python only, not {language!r}; use mode 'stdio' or 'checker'",
    ),
    (
        lambda spec: spec.mode in ("split", "inproc") and bool(spec.tests),
        "mode {mode!r} takes its tests from test_code; remove tests",
    ),
    (
        lambda spec: spec.mode in ("split", "inproc") and not (spec.test_code or "").strip(),
        "mode {mode!r} needs test_code and has none; add it",
    ),
    (
        lambda spec: spec.mode in ("stdio", "call", "checker") and spec.test_code is not None,
        "mode {mode!r} does not run test_code; remove it or use mode 'split'",
    ),
    (
        lambda spec: spec.mode in ("stdio", "call", "checker") and not spec.tests,
        "mode {mode!r} needs at least one test, and tests is empty; a program without tests proves nothing",
    ),
    (
        _has_test_of_other_mode,
        "tests holds one that mode {mode!r} cannot run; "
        "'stdio' and 'checker' take {{stdin, stdout}}, 'call' takes {{args, kwargs, expected}}",
    ),
    (
        lambda spec: spec.mode in ("call", "split") and spec.entry_point is None,
        "mode {mode!r} needs entry_point, the name of the function under test; add it",
    ),
    (
        lambda spec: (spec.mode == "checker") != bool((spec.checker or "").strip()),
        "checker and mode 'checker' go together, and the mode is {mode!r}; give both or neither",
    ),
)
