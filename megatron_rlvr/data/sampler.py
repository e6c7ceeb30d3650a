"""The order in which a run sees its prompts, and the position it resumes from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rlvr.core import Prompt, RLVRError


class PromptSampler:
    """Draws prompts without replacement, epoch after epoch, each epoch in an order of its own.

    The order of an epoch is a function of the seed and the epoch number alone. It is a sort by BLAKE2b hashes and not a
    library's shuffle, so it is the same on every machine and in every version of Python.

    Args:
        prompts: What to draw from; kept by reference, so do not change it afterwards.
        seed: Fixes every epoch's order.

    Raises:
        RLVRError: If ``prompts`` is empty.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """See the class."""
        if not prompts:
            raise RLVRError("the prompt source is empty; give the sampler at least one prompt")
        self._prompts = prompts
        self._seed = seed
        self._fingerprint = _fingerprint(prompts)
        self._taken = 0
        self._returned: list[str] = []
        self._order = self._permutation(0)

    @property
    def epoch(self) -> int:
        """Epoch (from 0) of the last prompt taken; 0 before the first."""
        return max(self._taken - 1, 0) // len(self._prompts)

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts, first those that were given back.

        Where they cross an epoch's end, a prompt may occur on both sides of it.
        """
        if count < 0:
            raise ValueError(f"cannot take {count} prompts")
        again, self._returned = self._returned[:count], self._returned[count:]
        taken = [self._by_id[prompt_id] for prompt_id in again]
        for _ in range(count - len(taken)):
            epoch, offset = divmod(self._taken, len(self._prompts))
            if offset == 0 and epoch > 0:
                self._order = self._permutation(epoch)
            taken.append(self._prompts[self._order[offset]])
            self._taken += 1
        return taken

    def give_back(self, prompts: Sequence[Prompt]) -> None:
        """Have ``prompts``, taken and not used, come first again."""
        self._returned.extend(prompt.id for prompt in prompts)

    @functools.cached_property
    def _by_id(self) -> dict[str, Prompt]:
        return {prompt.id: prompt for prompt in self._prompts}

    def state_dict(self) -> dict[str, Any]:
        """The position, small and JSON-able: prompts taken so far, those given back, and what the count refers to."""
        return {
            "taken": self._taken,
            "returned": list(self._returned),
            "seed": self._seed,
            "size": len(self._prompts),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position saved by :meth:`state_dict`; the prompts that follow are those that followed then.

        Raises:
            RLVRError: If the state has other keys, is damaged, or belongs to other prompts or another seed; the sampler
                is unchanged then.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise RLVRError(
                f"the saved data position has the keys {sorted(state)} and not {sorted(own)}; resume from a checkpoint "
                "that this version wrote"
            )
        mends = {
            "size": "resume with the prompt source the run began with",
            "fingerprint": "the prompts were changed or reordered, so resume with the source the run began with",
            "seed": "resume with the seed the run began with",
        }
        for key, mend in mends.items():
            if state[key] != own[key]:
                raise RLVRError(f"the saved data position has {key} {state[key]!r} and this run {own[key]!r}; {mend}")
        taken = state["taken"]
        if type(taken) is not int or taken < 0:
            raise RLVRError(f"the saved data position has taken {taken!r}, which is no count; use an intact checkpoint")
        if not set(state["returned"]) <= self._by_id.keys():
            raise RLVRError(
                "the saved data position gives back prompts that there are none of; use an intact checkpoint"
            )
        self._taken, self._returned = taken, list(state["returned"])
        self._order = self._permutation(taken // len(self._prompts))

    def _permutation(self, epoch: int) -> list[int]:
        def key(index: int) -> bytes:
            return hashlib.blake2b(f"{self._seed}/{epoch}/{index}".encode(), digest_size=16).digest()

        return sorted(range(len(self._prompts)), key=key)


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of every field of every prompt, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.text, prompt.kind, dict(prompt.spec)], sort_keys=True).encode())
    return digest.hexdigest()
