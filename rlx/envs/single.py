"""The environment of a plain question: one prompt, one completion, done."""

from __future__ import annotations

from rlx.types import Message, Reply, Task


class SingleTurn:
    """Ask the task's prompt and end the episode with the policy's first message; rewards come from the recipe."""

    def reset(self, task: Task) -> tuple[Message, ...]:
        """Return the prompt of `task`."""
        return task.prompt

    def step(self, said: Message) -> Reply:
        """End the episode, with no message and no reward."""
        return Reply(done=True)
