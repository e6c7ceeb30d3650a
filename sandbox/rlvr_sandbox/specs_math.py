"""What a ``math`` item is compared with, and how; the conventions are explained in ``checkers/math_answer.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_GOLD_CHARS = 4_096


class MathPolicy(BaseModel):
    """How an answer is compared with the reference.

    Attributes:
        percent: ``gold``: a bare number counts as percent where the reference has the sign. ``value``: ``50%`` is 1/2
            and nothing else. ``ignore``: the sign counts for nothing.
        units: ``gold``: where the reference and the answer both name a unit they must agree. ``strict``: they must name
            the same one or none. ``ignore``: units count for nothing.
        tolerance: Largest ``|answer - reference| / |reference|`` of a number; absent, numbers must be equal exactly.
        ordered: Whether the order of listed values matters; absent, brackets decide: ``(1,2)`` is ordered, ``{1,2}``
            and a bare ``1, 2`` are not.
        chain: ``all``: every side of ``a = b = c`` must be right. ``last``: only the last one.
        decimal_comma: Whether ``1,5`` may also be the number 1.5.
        evaluated: Whether a number must be written out where the reference is: ``9+1`` is then wrong for ``10``.
        reading: ``exact``: the cascade of ``math_answer``. ``math_verify``: math-verify's own reading of the whole
            response, with its loose ends, for comparison with runs that used it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    percent: Literal["gold", "value", "ignore"] = "gold"
    units: Literal["gold", "strict", "ignore"] = "gold"
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    ordered: bool | None = None
    chain: Literal["all", "last"] = "all"
    decimal_comma: bool = False
    evaluated: bool = False
    reading: Literal["exact", "math_verify"] = "exact"


class MathSpec(MathPolicy):
    r"""The reference answer of one mathematical question and the policy of comparing with it.

    Attributes:
        answer: The reference, as text or LaTeX, with or without ``$`` and ``\boxed``.
    """

    answer: Annotated[str, Field(min_length=1, max_length=MAX_GOLD_CHARS)]
