"""What requests hold and what they are answered with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rlvr_sandbox.specs_code import CodeSpec
from rlvr_sandbox.specs_math import MAX_GOLD_CHARS, MathPolicy, MathSpec
from rlvr_sandbox.specs_reasoning_gym import ReasoningGymSpec
from rlvr_sandbox.verdicts import Judgement, Trust, Verdict

KINDS = ("code", "countdown", "math", "reasoning_gym")
MAX_ITEMS = 4_096
MAX_DEADLINE_S = 3_600.0
MAX_INTEGER = 10**15

PRIORITIES = {"train": 0, "eval": 1}


class Strict(BaseModel):
    """A model that takes nothing it does not know and guesses no types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CountdownSpec(Strict):
    """A Countdown game: the numbers to use and the target to reach."""

    numbers: Annotated[list[Annotated[int, Field(ge=0, le=MAX_INTEGER)]], Field(min_length=1, max_length=16)]
    target: Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]


class CodeItem(Strict):
    """A response that holds a program."""

    kind: Literal["code"]
    response: str
    spec: CodeSpec


class CountdownItem(Strict):
    """A response to a Countdown game."""

    kind: Literal["countdown"]
    response: str
    spec: CountdownSpec


class MathItem(Strict):
    """A response to a mathematical question."""

    kind: Literal["math"]
    response: str
    spec: MathSpec


class ReasoningGymItem(Strict):
    """A response to a task of a reasoning-gym dataset."""

    kind: Literal["reasoning_gym"]
    response: str
    spec: ReasoningGymSpec


Item = CodeItem | CountdownItem | MathItem | ReasoningGymItem
TaggedItem = Annotated[Item, Field(discriminator="kind")]
Deadline = Annotated[float, Field(gt=0, le=MAX_DEADLINE_S, description="seconds within which every item is answered")]
Priority = Annotated[Literal["train", "eval"], Field(description="items of `eval` wait for those of `train`")]


class VerifyRequest(Strict):
    """A batch of items and the seconds within which every one of them is answered."""

    items: Annotated[list[TaggedItem], Field(max_length=MAX_ITEMS)]
    deadline_s: Deadline
    priority: Priority = "train"


class MathPair(Strict):
    """A response to a mathematical question, the reference answer, and how to compare them."""

    gold: Annotated[str, Field(min_length=1, max_length=MAX_GOLD_CHARS)]
    response: str
    policy: MathPolicy = MathPolicy()


class MathRequest(Strict):
    """A batch of pairs and the seconds within which every one of them is answered."""

    items: Annotated[list[MathPair], Field(max_length=MAX_ITEMS)]
    deadline_s: Deadline
    priority: Priority = "train"


class Result(BaseModel):
    """The answer to one item.

    ``detail`` says why, for a human. ``seconds`` is the wall time spent on it. ``trust`` is ``isolated``, or ``inproc``
    where the tests ran in the response's own process, or ``unsafe`` without isolation. ``flags`` are suspicions.
    """

    verdict: Verdict
    detail: str
    seconds: float
    trust: Trust
    flags: list[str]


class StreamedResult(Result):
    """One line of a streamed answer; ``index`` is the item's place in the request."""

    index: int


class VerifyReply(BaseModel):
    """One result for each item, in the order of the request."""

    results: list[Result]


class Refusal(BaseModel):
    """Why a request was refused, in one sentence."""

    detail: str


def result(judgement: Judgement) -> dict[str, Any]:
    """``judgement`` as ``Result`` describes it."""
    return judgement._asdict()
