from __future__ import annotations

import asyncio

import pytest
from rlvr_sandbox import languages
from rlvr_sandbox.execution import Ending, Limits, Outcome, Program
from rlvr_sandbox.isolation import open_executor
from rlvr_sandbox.isolation.compiling import Compiler
from rlvr_sandbox.isolation.executor import SlotExecutor
from rlvr_sandbox.isolation.messages import Order
from rlvr_sandbox.verdicts import SandboxError

ADD = {
    "python": "a, b = map(int, input().split())\nprint(a + b)",
    "cpp": "#include <bits/stdc++.h>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }",
    "c": '#include <stdio.h>\nint main(void) { long a, b; scanf("%ld %ld", &a, &b); printf("%ld\\n", a + b); }',
    "javascript": "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number); console.log(a + b);",
    "bash": "read -r a b; echo $((a + b))",
    "perl": "my ($a, $b) = split ' ', <STDIN>; print $a + $b, \"\\n\";",
}
FAIL = {
    "cpp": ("int main() { int *p = nullptr; *p = 1; }", Ending.SIGNALLED),
    "c": ("int main(void) { return 3; }", Ending.EXITED),
    "javascript": ("throw new Error('x')", Ending.EXITED),
    "bash": ("exit 3", Ending.EXITED),
    "perl": ("die 'x'", Ending.EXITED),
}
MEMORY = {
    "cpp": "#include <vector>\nint main() { std::vector<char*> v; for (;;) { v.push_back(new char[1 << 20]()); } }",
    "javascript": "const a = []; for (;;) a.push(new Array(100000).fill(7));",
}
LOOP = {
    "cpp": "int main() { for (volatile int i = 0;; ++i) {} }",
    "javascript": "for (;;) {}",
    "bash": "while :; do :; done",
}
LIMITS = Limits(cpu_s=5.0, memory_bytes=512 << 20)


@pytest.fixture(scope="module", params=["ns", "none"])
def outcomes(request: pytest.FixtureRequest) -> dict[tuple[str, str], Outcome]:
    """All outcomes of one executor, by what and language."""

    async def collect() -> dict[tuple[str, str], Outcome]:
        try:
            executor = await open_executor(request.param, slots=2, unsafe=request.param == "none")
        except SandboxError as error:
            pytest.skip(f"this machine has no {request.param}: {error}")
        try:
            return await run_all(executor)
        finally:
            await executor.close()

    return asyncio.run(collect())


async def run_all(executor: SlotExecutor) -> dict[tuple[str, str], Outcome]:
    cases: dict[tuple[str, str], tuple[str, Limits]] = {}
    for name in executor.languages:
        cases["add", name] = (ADD[name], LIMITS)
        for what, table in (
            ("fail", {key: text for key, (text, _) in FAIL.items()}),
            ("memory", MEMORY),
            ("loop", LOOP),
        ):
            if name in table:
                tight = Limits(cpu_s=0.3) if what == "loop" else LIMITS
                cases[what, name] = (table[name], tight)
    cases["broken", "cpp"] = ("int main( {", LIMITS)
    found = await asyncio.gather(
        *(executor.run(Program(name, text), limits, b"19 23\n") for (_, name), (text, limits) in cases.items())
    )
    return dict(zip(cases, found, strict=True))


def _of(outcomes: dict[tuple[str, str], Outcome], what: str, language: str) -> Outcome:
    if (what, language) not in outcomes:
        pytest.skip(f"needs {languages.LANGUAGES[language].tool}")
    return outcomes[what, language]


@pytest.mark.parametrize("language", ADD)
def test_a_program_reads_and_prints(outcomes: dict[tuple[str, str], Outcome], language: str) -> None:
    outcome = _of(outcomes, "add", language)
    assert (outcome.ending, outcome.exit_status, outcome.stdout) == (Ending.EXITED, 0, b"42\n"), outcome


@pytest.mark.parametrize("language", FAIL)
def test_a_failure_is_seen(outcomes: dict[tuple[str, str], Outcome], language: str) -> None:
    outcome = _of(outcomes, "fail", language)
    assert outcome.ending is FAIL[language][1], outcome
    assert outcome.exit_status != 0


@pytest.mark.parametrize("language", MEMORY)
def test_memory_is_bounded(outcomes: dict[tuple[str, str], Outcome], language: str) -> None:
    assert _of(outcomes, "memory", language).ending is Ending.MEMORY_LIMIT, outcomes["memory", language]


@pytest.mark.parametrize("language", LOOP)
def test_time_is_bounded(outcomes: dict[tuple[str, str], Outcome], language: str) -> None:
    assert _of(outcomes, "loop", language).ending is Ending.TIME_LIMIT


def test_the_compiler_says_what_is_wrong(outcomes: dict[tuple[str, str], Outcome]) -> None:
    outcome = _of(outcomes, "broken", "cpp")
    assert outcome.ending is Ending.COMPILE_ERROR
    assert b"main.cpp:1" in outcome.stderr


def test_a_missing_toolchain_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "TOOL_PATH", "/nowhere")

    async def run() -> None:
        executor = await open_executor("none", slots=1, unsafe=True)
        try:
            assert executor.languages == ("python",)
            with pytest.raises(SandboxError, match=r"'cpp' is not available here; install g\+\+"):
                await executor.run(Program("cpp", ""), LIMITS)
            with pytest.raises(SandboxError, match="'cobol' is not available here; use one of python"):
                await executor.run(Program("cobol", ""), LIMITS)
        finally:
            await executor.close()

    asyncio.run(run())


def test_the_same_text_is_compiled_once() -> None:
    if languages.find_tool(languages.LANGUAGES["cpp"]) is None:
        pytest.skip("needs g++")
    calls: list[bytes] = []

    async def compile_order(order: Order, payload: bytes, limits: Limits) -> Outcome:
        calls.append(payload)
        await asyncio.sleep(0.01)
        status = 1 if b"broken" in payload else 0
        return Outcome(Ending.EXITED, status, None, b"binary of " + payload, b"words", 0.1, 0.1)

    async def run() -> None:
        compiler, cpp = Compiler(compile_order), languages.LANGUAGES["cpp"]
        both = await asyncio.gather(compiler.artifact(cpp, "a"), compiler.artifact(cpp, "a"))
        assert both == [b"binary of a"] * 2
        assert await compiler.artifact(cpp, "a") == b"binary of a"
        assert await compiler.artifact(languages.LANGUAGES["c"], "a") == b"binary of a"
        for _ in range(2):
            failed = await compiler.artifact(cpp, "broken")
            assert isinstance(failed, Outcome)
            assert (failed.ending, failed.stdout, failed.stderr) == (Ending.COMPILE_ERROR, b"", b"words")
        assert calls == [b"a", b"a", b"broken", b"broken"]

    asyncio.run(run())
