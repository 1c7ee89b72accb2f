"""Questions about pictures: generated from what an episode store records (`embodied`, `general`), or read from files
(`data`); `benchmark` asks them of a model."""

from vlm4vla_core.vqa.embodied import (
    CLEARLY,
    KINDS,
    MIXES,
    Question,
    availability,
    beside,
    pictures,
    questions,
    several,
)

__all__ = ["CLEARLY", "KINDS", "MIXES", "Question", "availability", "beside", "pictures", "questions", "several"]
