"""Own prompts for quick measurements; none of them is among the quickstart's training prompts."""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "Explain in simple words why the sky turns red at sunset.",
    "Write a Python function that returns the second largest number of a list, and explain how it works.",
    "A baker sells 14 loaves in the morning and twice as many in the afternoon. How many loaves is that in total?",
    "Write a short, polite email asking a neighbour to keep the noise down after ten in the evening.",
    "Give me five tips for keeping a small balcony garden alive through a hot summer.",
    "Tell a short story about a lighthouse keeper who finds a message in a bottle.",
    "Compare trains and aeroplanes for a journey of five hundred kilometres.",
    "Summarise what photosynthesis does and why it matters for animals.",
)
