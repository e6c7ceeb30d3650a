"""What a ``reasoning_gym`` item is scored with."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class ReasoningGymEntry(BaseModel):
    """One entry as the dataset made it, in JSON: tuples may have become lists.

    Attributes:
        question: The task as the policy read it.
        answer: The dataset's own answer; absent where it keeps none because several are right.
        metadata: What the dataset scores with.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str = ""
    answer: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class ReasoningGymSpec(BaseModel):
    """A dataset of reasoning-gym and the entry of it to score an answer to.

    Attributes:
        dataset: Its name in reasoning-gym's registry, such as ``spell_backward``.
        entry: The entry.
        config: The dataset's settings where they are not the default; scores may depend on them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    dataset: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    entry: ReasoningGymEntry
    config: dict[str, Any] = Field(default_factory=dict)
